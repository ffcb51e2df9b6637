"""The report as Markdown, CSV and lines on a terminal; numbers with their units."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from latentc.benchmarks.bench.model import SCENARIOS, CaseRecord, Report, Row

# the scenario that decides which build is said to be the fastest, the first that was measured
_DECISIVE = ("end_to_end", "denoiser_step", "cold_start")


def seconds(value: float) -> str:
    """Return a time with three digits in a fitting unit: ``12.3 ms``, ``1.23 s``."""
    for unit, scale, limit in (("µs", 1e6, 1e-3), ("ms", 1e3, 1.0)):
        if value < limit:
            return f"{digits(value * scale)} {unit}"
    return f"{digits(value)} s"


def digits(value: float) -> str:
    """Return a number with three significant digits, never an exponent."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float) -> str:
    """Return a ratio as a text: ``1.85×``."""
    return f"{digits(value)}×"


def percent(value: float) -> str:
    """Return a share of 1 as a text: ``12%``; with a decimal below ten percent."""
    return f"{100 * value:.0f}%" if value >= 0.0995 else f"{100 * value:.1f}%"


def mebibytes(value: float) -> str:
    """Return bytes as a text in MiB, or in GiB from one GiB on."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def winner(report: Report) -> tuple[Row, CaseRecord, CaseRecord] | None:
    """Return the row of the fastest case of latentc, that case, and its baseline; None if none."""
    for scenario in _DECISIVE:
        rows = [
            (row, report.case(row.case))
            for row in report.rows
            if row.scenario == scenario and row.speedup
        ]
        ours = [(row, case) for row, case in rows if case.engine == "latentc"]
        if ours:
            row, case = max(ours, key=lambda each: each[0].speedup.value)  # type: ignore[union-attr]
            assert row.speedup is not None
            return row, case, report.case(row.speedup.baseline)
    return None


def verdict_sentence(report: Report) -> str:
    """Return a sentence with the winner and by how much it won."""
    fastest = winner(report)
    if fastest is None:
        return "No build was compared with a baseline."
    row, case, baseline = fastest
    faster = row.speedup
    assert faster is not None
    what = SCENARIOS[row.scenario]
    span = f"95% interval {times(faster.interval.low)} to {times(faster.interval.high)}"
    if faster.verdict == "no difference":
        return (
            f"No build is faster than {baseline.label} beyond the noise: the best, {case.label}, "
            f"has {times(faster.value)} its speed ({what}; {span})."
        )
    if faster.verdict == "slower":
        return (
            f"{baseline.label} is the fastest: the best build, {case.label}, has "
            f"{times(faster.value)} its speed ({what}; {span})."
        )
    return (
        f"{case.label} is the fastest: {times(faster.value)} the speed of {baseline.label} "
        f"({what}; {span})."
    )


def scenarios_of(report: Report) -> list[str]:
    """Return the scenarios that have rows, in the usual order."""
    have = {row.scenario for row in report.rows}
    return [name for name in SCENARIOS if name in have]


def markdown(report: Report) -> str:
    """Return the report as Markdown, for a README or an issue."""
    return "\n".join(_markdown(report)) + "\n"


def table_csv(report: Report) -> str:
    """Return one line per row of the report, its case's facts beside it.

    Numbers are plain, in SI units.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV)
    for case in report.cases:
        rows: Sequence[Row | None] = report.rows_of(case.id) or [None]
        for row in rows:
            writer.writerow(_csv_row(case, row))
    return out.getvalue()


_CSV = (
    *("case", "label", "engine", "variant", "precision", "computed_in", "backend", "version"),
    *("device", "batch", "height", "width", "threads", "steps", "status", "scenario", "count"),
    *("rounds", "p50_s", "p90_s", "p99_s", "low_s", "high_s", "noise", "speedup", "speedup_low"),
    *("speedup_high", "verdict", "baseline", "limit_s", "limit_fraction", "bound"),
    *("file_size_bytes", "peak_memory_bytes", "device_memory_bytes", "energy_j_per_image"),
    *("psnr_db", "ssim", "latents_relative_l2", "judge_right", "judge_images"),
)


def _csv_row(case: CaseRecord, row: Row | None) -> list[object]:
    facts: list[object] = [
        case.id, case.label, case.engine, case.variant, case.precision, case.computed_in,
        case.backend, case.version, case.device, case.batch, case.height, case.width,
        case.threads, case.steps, case.status,
    ]  # fmt: skip
    measured: list[object] = []
    if row is not None:
        faster, limit = row.speedup, row.limit
        measured = [
            row.scenario, row.count, row.rounds, row.p50, row.p90, row.p99,
            row.interval.low, row.interval.high, row.noise,
            *((faster.value, faster.interval.low, faster.interval.high, faster.verdict,
               faster.baseline) if faster else [None] * 5),
            *((limit.seconds, limit.fraction, limit.bound) if limit else [None] * 3),
        ]  # fmt: skip
    near, score = case.fidelity, case.score
    rest: list[object] = [case.file_size, case.peak_memory, case.device_memory, case.energy]
    rest += [near.psnr, near.ssim, near.latents_relative_l2] if near else [None] * 3
    rest += [score.right, score.images] if score else [None] * 2
    return [*facts, *(measured + [None] * (17 - len(measured))), *rest]


def _markdown(report: Report) -> Iterator[str]:
    bundle, machine = report.bundle, report.machine
    yield f"## {bundle.source}: latentc {report.latentc} on {machine.cpu}"
    yield ""
    yield verdict_sentence(report)
    yield ""
    for scenario in scenarios_of(report):
        yield f"**{SCENARIOS[scenario][0].upper()}{SCENARIOS[scenario][1:]}**"
        yield ""
        heads = ("", "p50", "95% interval", "p90", "noise", "speed-up", "of the limit")
        yield from _table(heads, [_time_cells(report, r) for r in report.rows
                                  if r.scenario == scenario])  # fmt: skip
        yield ""
    yield "**Fidelity and size**"
    yield ""
    columns = ("", "computed in", "PSNR", "SSIM", "latents", "judge", "peak memory", "files", "J")
    yield from _table(columns, [_fact_cells(case) for case in report.cases])
    yield ""
    yield from _circumstances(report)


def _circumstances(report: Report) -> Iterator[str]:
    machine, settings = report.machine, report.settings
    yield (
        f"{machine.cpu}, {machine.cores} cores, {mebibytes(machine.memory)}, {machine.system}, "
        f"Python {machine.python}; load {machine.load_before:.1f} before, "
        f"{machine.load_after:.1f} after; {settings.rounds} rounds of fresh processes with "
        f"{settings.repeats} calls each after the first; {report.created}."
    )
    yield ""
    yield "; ".join(f"{name} {version}" for name, version in machine.versions.items())
    for gpu in machine.gpus:
        yield f"{gpu.name}, driver {gpu.driver}, {mebibytes(gpu.memory)}"
    if report.peaks:
        yield ""
        yield "Measured peaks: " + ", ".join(
            f"{p.name} {digits(p.value / 1e9)} {'G' + p.unit.replace('operations', 'op')}"
            + (f" ({p.threads} threads)" if p.threads else "")
            for p in report.peaks
        )
    if report.notes:
        yield ""
        yield from (f"- {note}" for note in report.notes)
    yield ""
    yield f"`{' '.join(report.command)}`"


def _time_cells(report: Report, row: Row) -> tuple[str, ...]:
    faster, limit = row.speedup, row.limit
    speed = ""
    if faster:
        low, high = times(faster.interval.low), times(faster.interval.high)
        speed = f"{times(faster.value)} ({low}–{high})"
        speed += ", within the noise" if faster.verdict == "no difference" else ""
    return (
        report.case(row.case).label,
        seconds(row.p50),
        f"{seconds(row.interval.low)} – {seconds(row.interval.high)}",
        seconds(row.p90),
        f"±{percent(row.noise)}",
        speed,
        f"{percent(limit.fraction)} ({limit.peak}, {limit.bound})" if limit else "",
    )


def last_line(case: CaseRecord) -> str:
    """Return the last line of what a case that failed has said."""
    lines = case.message.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _fact_cells(case: CaseRecord) -> tuple[str, ...]:
    if case.status != "ok":
        return (case.label, f"**{case.status}**: {last_line(case)}", *[""] * 7)
    near, score = case.fidelity, case.score
    latents = near.latents_relative_l2 if near else None
    return (
        case.label,
        case.computed_in or "",
        f"{near.psnr:.1f} dB" if near else "",
        f"{near.ssim:.4f}" if near else "",
        f"{latents:.1e}" if latents is not None else "",
        f"{score.right} of {score.images}" if score else "",
        mebibytes(case.peak_memory) if case.peak_memory else "",
        f"{case.file_size / 1e6:,.1f} MB" if case.file_size else "",
        digits(case.energy) if case.energy else "",
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|---|{'---:|' * (len(heads) - 1)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
