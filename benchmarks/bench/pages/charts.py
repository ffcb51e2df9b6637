"""The report's charts: SVG by matplotlib, in the page's own colours.

Colours are written as stand-ins and replaced by the page's CSS variables, so that one drawing
serves light, dark and paper. A label that shows a figure says which one, as the tables do
(`data-ref`).
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from latentc.benchmarks.bench.model import SCENARIOS, CaseRecord, Report, Row
from latentc.benchmarks.bench.pages import texts

_INK, _MUTED, _GRID, _PAPER = "#010101", "#010102", "#010103", "#010104"
_SERIES = [f"#0102{index:02x}" for index in range(8)]
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _PAPER: "--paper"} | {
    colour: f"--series-{index}" for index, colour in enumerate(_SERIES)
}
_POINT = re.compile(r", (batch \d+|\d+×\d+|\d+ threads|all threads|\d+ steps)")
_WIDTH = 9.0  # inches at 72 units: 648 units, the page's column
_NAME = 44  # characters in a line of a case's name: two lines fit beside a bar
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "latentc",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.6,
}


def draw(report: Report) -> dict[str, str]:
    """Return the charts that this report has figures for, by name, as SVG elements."""
    import matplotlib

    matplotlib.use("agg")  # no window: drawings go to text
    drawings: dict[str, Callable[[Report], Any]] = {
        "latency": _latency,
        "fidelity": _fidelity,
        "stages": _stages,
        "memory": _memory,
        "scaling": _scaling,
    }
    charts = {}
    with matplotlib.rc_context(_STYLE):
        for name, drawing in drawings.items():
            figure = drawing(report)
            if figure is not None:
                charts[name] = _svg(figure, name)
    return charts


def shown_cases(report: Report) -> list[CaseRecord]:
    """Return the cases at the first point (batch, size, threads, steps).

    Charts compare like with like.
    """
    first = next((case for case in report.cases if case.status == "ok"), None)
    if first is None:
        return []
    return [c for c in report.cases if c.status == "ok" and _point(c) == _point(first)]


def colour_of(report: Report, case: CaseRecord) -> str:
    """Return a colour for each variant, the baselines' grey ones first."""
    names = list(dict.fromkeys(_series(c) for c in report.cases if c.engine != "torch"))
    if case.engine == "torch":
        return _MUTED
    return _SERIES[names.index(_series(case)) % len(_SERIES)]


def _series(case: CaseRecord) -> str:
    return f"{case.variant} {case.backend} {case.device}"


def _point(case: CaseRecord) -> tuple[int, ...]:
    return case.batch, case.height, case.width, case.threads, case.steps


def _rows(report: Report, scenario: str, cases: Sequence[CaseRecord]) -> list[tuple[int, Row]]:
    """Return (place in the report, row) of the cases that have this scenario, in their order."""
    order = [case.id for case in cases]
    placed = [
        (place, row)
        for place, row in enumerate(report.rows)
        if row.scenario == scenario and row.case in order
    ]
    return sorted(placed, key=lambda each: order.index(each[1].case))


def _latency(report: Report) -> Any:
    cases = shown_cases(report)
    panels = [name for name in ("end_to_end", "denoiser_step", "cold_start")
              if _rows(report, name, cases)]  # fmt: skip
    panels = panels or texts.scenarios_of(report)[:3]
    if not panels:
        return None
    height = 0.42 * len(cases) * len(panels) + 0.75 * len(panels)
    figure, axes = _figure(height, len(panels))
    for axis, scenario in zip(axes, panels, strict=True):
        rows = _rows(report, scenario, cases)
        for position, (place, row) in enumerate(rows):
            case = report.case(row.case)
            low, high = row.p50 - row.interval.low, row.interval.high - row.p50
            axis.barh(position, row.p50, height=0.62, color=colour_of(report, case))
            axis.errorbar(row.p50, position, xerr=[[max(low, 0)], [max(high, 0)]], color=_INK,
                          capsize=3, linewidth=1.1)  # fmt: skip
            _label(axis, row.interval.high, position, texts.seconds(row.p50),
                   f"/rows/{place}/p50", "seconds")  # fmt: skip
        _name_bars(axis, [report.case(row.case).label for _, row in rows])
        axis.set_title(SCENARIOS[scenario], loc="left", fontsize=11)
        _seconds_axis(axis)
        _room(axis)
    return figure


def _fidelity(report: Report) -> Any:
    cases = [case for case in shown_cases(report) if case.fidelity]
    scenario = next((name for name in ("end_to_end", "denoiser_step", "cold_start")
                     if _rows(report, name, cases)), None)  # fmt: skip
    if scenario is None:
        return None
    figure, (axis,) = _figure(3.4)
    seen: set[str] = set()
    for case in cases:
        row = report.row(case.id, scenario)
        if row is None or case.fidelity is None:
            continue
        label = _wrapped(_series_label(report, case))
        axis.scatter(row.p50, case.fidelity.psnr, s=54, color=colour_of(report, case),
                     edgecolors=_PAPER, label=None if label in seen else label,
                     marker=_marker(report, case))  # fmt: skip
        seen.add(label)
    for case in shown_cases(report):
        row = report.row(case.id, scenario)
        if row and case.fidelity is None and case.engine == "torch":
            axis.axvline(row.p50, color=_MUTED, linestyle=":", label=f"{case.label} (reference)")
    axis.set_xlabel(f"{SCENARIOS[scenario]}, median seconds (left is faster)")
    axis.set_ylabel("PSNR against fp32 PyTorch, dB")
    axis.set_xlim(left=0)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 20), max(high, 102))
    axis.grid(color=_GRID, linewidth=0.6)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9)
    return figure


def _stages(report: Report) -> Any:
    stages = ("text_encode", "denoiser_step", "vae_decode")
    cases = [case for case in shown_cases(report) if report.row(case.id, "denoiser_step")]
    if not cases or not any(report.row(case.id, "vae_decode") for case in cases):
        return None
    figure, (axis,) = _figure(0.42 * len(cases) + 1.1)
    for position, case in enumerate(cases):
        left = 0.0
        for index, stage in enumerate(stages):
            row = report.row(case.id, stage)
            if row is None:
                continue
            width = row.p50 * (case.steps if stage == "denoiser_step" else 1)
            axis.barh(position, width, left=left, height=0.62, color=_SERIES[index],
                      label=_stage_label(stage) if position == 0 else None)  # fmt: skip
            left += width
    _name_bars(axis, [case.label for case in cases])
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=9)
    _seconds_axis(axis)
    return figure


def _memory(report: Report) -> Any:
    cases = [case for case in shown_cases(report) if case.peak_memory]
    if not cases:
        return None
    figure, (axis,) = _figure(0.42 * len(cases) + 0.8)
    for position, case in enumerate(cases):
        assert case.peak_memory is not None
        axis.barh(position, case.peak_memory / 2**20, height=0.62, color=colour_of(report, case))
        place = report.cases.index(case)
        _label(axis, case.peak_memory / 2**20, position, texts.mebibytes(case.peak_memory),
               f"/cases/{place}/peak_memory", "bytes")  # fmt: skip
    _name_bars(axis, [case.label for case in cases])
    axis.set_xlabel("MiB, peak of the whole process")
    _room(axis)
    return figure


def _scaling(report: Report) -> Any:
    """Return a figure of curves over what varies (images per call, pixels, threads), or None."""
    axes_of: dict[str, Callable[[CaseRecord], float]] = {
        "images in a call": lambda case: case.batch,
        "pixels": lambda case: case.height * case.width,
        "threads": lambda case: case.threads,
    }
    scenario = next((n for n in ("end_to_end", "denoiser_step")
                     if any(row.scenario == n for row in report.rows)), None)  # fmt: skip
    varied = {
        name: value
        for name, value in axes_of.items()
        if len({value(case) for case in report.cases if case.status == "ok"}) > 1
    }
    if scenario is None or not varied:
        return None
    figure, axes = _figure(3.2, columns=len(varied))
    for axis, (name, value) in zip(axes, varied.items(), strict=True):
        for label, cases in _curves(report, value).items():
            measured = [(value(c), report.row(c.id, scenario), c) for c in cases]
            points = sorted((x, row.p50 / case.batch) for x, row, case in measured if row)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label,
                      color=colour_of(report, cases[0]),
                      linestyle="--" if cases[0].engine == "torch" else "-")  # fmt: skip
        axis.set_xlabel(name)
        ticks = {value(c): _tick(name, c) for c in report.cases if c.status == "ok"}
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set_ylim(bottom=0)
        axis.grid(color=_GRID, linewidth=0.6)
    axes[0].set_ylabel(f"{SCENARIOS[scenario]}, seconds per image")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    return figure


def _tick(name: str, case: CaseRecord) -> str:
    if name == "pixels":
        return f"{case.width}×{case.height}"
    return str(case.batch if name == "images in a call" else case.threads or "all")


def _curves(report: Report, value: Callable[[CaseRecord], float]) -> dict[str, list[CaseRecord]]:
    """Return the cases that differ in one thing only, and are at the first value of all others."""
    first = next(case for case in report.cases)
    cases_by_label: dict[str, list[CaseRecord]] = {}
    for case in report.cases:
        others = [
            (case.batch, first.batch),
            (case.height * case.width, first.height * first.width),
            (case.threads, first.threads),
        ]
        apart = sum(a != b for a, b in others)
        if case.status == "ok" and (apart == 0 or (apart == 1 and value(case) != value(first))):
            cases_by_label.setdefault(_wrapped(_series_label(report, case)), []).append(case)
    return {label: cases for label, cases in cases_by_label.items() if len(cases) > 1}


def _series_label(report: Report, case: CaseRecord) -> str:
    """Return the label without the point: what cases of one curve have in common."""
    return _POINT.sub("", case.label)


def _marker(report: Report, case: CaseRecord) -> str:
    return {"torch": "s", "peer": "D"}.get(case.engine, "o")


def _stage_label(stage: str) -> str:
    return "all denoiser steps" if stage == "denoiser_step" else SCENARIOS[stage]


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _name_bars(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [_wrapped(name) for name in names])
    axis.tick_params(axis="y", length=0, labelcolor=_INK, labelsize=9)
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axis.grid(axis="x", color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines["left"].set_visible(False)


def _wrapped(name: str) -> str:
    """Return a name in lines that leave the bars most of the width."""
    return "\n".join(textwrap.wrap(name, _NAME, break_long_words=False, break_on_hyphens=False))


def _seconds_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: texts.seconds(x) if x > 0 else "0"))


def _room(axis: Any) -> None:
    """Leave room for the labels at the ends of the bars."""
    axis.set_xlim(0, axis.get_xlim()[1] * 1.12)


def _label(axis: Any, x: float, y: float, text: str, pointer: str, unit: str) -> None:
    axis.annotate(text, (x, y), xytext=(7, 0), textcoords="offset points", va="center",
                  fontsize=9, gid=f"ref:{pointer}:{unit}")  # fmt: skip


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an element for an HTML page: nothing outside of it is referred to."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'id="ref:([^":]+):(\w+)"', r'data-ref="\1" data-unit="\2"', text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
