"""The pages of a report: its texts, charts and HTML."""
