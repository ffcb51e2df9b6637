def page(report, output):
    return ""
