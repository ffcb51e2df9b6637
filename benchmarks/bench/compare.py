"""Two reports: what became faster, what slower, and what nobody can tell.

Seconds of two runs differ because the machine does. Where both reports hold the same baseline in
the same versions, each case is divided by its own run's baseline first, which shared the moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Unpack

from latentc.benchmarks.bench import statistics
from latentc.benchmarks.bench.bench_arguments import CompareArguments
from latentc.benchmarks.bench.cases import check_scenarios
from latentc.benchmarks.bench.model import SCENARIOS, CaseRecord, Report
from latentc.benchmarks.bench.pages.texts import percent, seconds, times
from latentc.benchmarks.measure import table
from latentc.runtimes.errors import InputError
from latentc.runtimes.options import complete, takes, tuple_of

CONFIDENCE = 0.99  # of many rows, some would leave 95% by chance
_DECIDING_PACKAGES = ("torch", "diffusers", "transformers")

Change = Literal[
    "slower", "faster", "no difference", "fails now", "works now", "missing", "yardstick"
]


@dataclass(frozen=True)
class Line:
    """One scenario of one case: medians in seconds, how many times as long it takes now (divided
    by the baseline if `divided`), its interval, and the noise of both runs. The baseline itself is
    the yardstick then: that its seconds differ says something about the machine only."""

    case: str
    label: str
    scenario: str
    change: Change
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    noise: float | None = None
    divided: bool = False


@dataclass(frozen=True)
class Comparison:
    """All lines. `remarks` say in what else the reports differ."""

    lines: tuple[Line, ...]
    threshold: float
    remarks: tuple[str, ...]

    @property
    def slower(self) -> tuple[Line, ...]:
        """Return the lines that make `latentc bench compare` fail."""
        return tuple(
            line for line in self.lines if line.change in ("slower", "fails now", "missing")
        )


@takes(CompareArguments)
def compare(before: Report, after: Report, **arguments: Unpack[CompareArguments]) -> Comparison:
    """Compare two reports.

    Args:
        before, after: the reports, the older one first.
        {options}

    Raises:
        InputError: they have no case in common, or an argument that cannot be used.
    """
    options = complete(CompareArguments, arguments)
    scenarios, threshold = check_scenarios(tuple_of(options["scenarios"])), options["threshold"]
    known = {case.id: case for case in after.cases}
    common = [case for case in before.cases if case.id in known]
    if not common:
        raise InputError(
            "the reports have no case in common: they differ in builds, sizes, steps or threads"
        )
    same = not options["seconds"] and _same_baseline(before, after)
    lines: list[Line] = []
    for old in before.cases:
        new = known.get(old.id)
        if new is None:
            lines.append(Line(old.id, old.label, "", "missing"))
        elif old.status == "ok" != new.status:
            lines.append(Line(old.id, old.label, "", "fails now"))
        elif new.status == "ok" != old.status:
            lines.append(Line(old.id, old.label, "", "works now"))
        elif new.status == "ok":
            lines += _lines(before, after, old, new, threshold, scenarios, same)
    return Comparison(tuple(lines), threshold, tuple(_remarks(before, after)))


def as_text(found: Comparison) -> str:
    """Return the comparison as a table and a sentence."""
    rows = [
        (
            f"{line.scenario:14} {line.label}",
            seconds(line.before) if line.before else "",
            seconds(line.after) if line.after else "",
            times(line.ratio) if line.ratio else "",
            f"{times(line.low)}–{times(line.high)}" if line.low and line.high else "",
            f"±{percent(line.noise)}" if line.noise is not None else "",
            line.change + (" *" if line.divided else ""),
        )
        for line in found.lines
    ]
    text = table(("", "before", "after", "takes", "99% interval", "noise", ""), rows)
    if any(line.divided for line in found.lines):
        text += "\n* each divided by its own run's baseline, which has the same versions in both"
    text += "".join(f"\nthe reports differ: {remark}" for remark in found.remarks)
    return f"{text}\n{sentence(found)}"


def as_json(found: Comparison) -> str:
    """Return the comparison as JSON."""
    import json

    document = {**asdict(found), "slower": len(found.slower)}
    return json.dumps(document, indent=2)


def sentence(found: Comparison) -> str:
    """Return a sentence that says how many lines changed, and how."""
    counts: dict[str, int] = {}
    for line in found.lines:
        counts[line.change] = counts.get(line.change, 0) + 1
    told = ", ".join(f"{count} {change}" for change, count in counts.items())
    if set(counts) <= {"no difference", "yardstick"}:
        return f"no difference beyond the noise and {percent(found.threshold)} ({told})"
    return told


def _lines(
    before: Report,
    after: Report,
    old: CaseRecord,
    new: CaseRecord,
    threshold: float,
    scenarios: Sequence[str],
    same: bool,
) -> list[Line]:
    found = []
    for scenario in SCENARIOS:
        a, b = old.samples.get(scenario), new.samples.get(scenario)
        if not a or not b or (scenarios and scenario not in scenarios):
            continue
        bases = _baselines(before, after, old, new, scenario) if same else None
        noises = [statistics.noise(a), statistics.noise(b)]
        if bases:
            ratio = statistics.ratio_of_ratios((b, bases[1]), (a, bases[0]), CONFIDENCE)
            noises += [statistics.noise(each) for each in bases]
        else:
            ratio = statistics.ratio(b, a, CONFIDENCE)
        word = statistics.verdict(ratio, *noises, threshold=threshold)
        changes: dict[str, Change] = {"more": "slower", "less": "faster", "same": "no difference"}
        medians = statistics.summarise(a).p50, statistics.summarise(b).p50
        interval = ratio.value, ratio.low, ratio.high
        change = "yardstick" if same and old.id in before.baselines else changes[word]
        about = old.id, old.label, scenario, change
        found.append(Line(*about, *medians, *interval, max(noises), bases is not None))
    return found


def _baselines(
    before: Report, after: Report, old: CaseRecord, new: CaseRecord, scenario: str
) -> tuple[statistics.Rounds, statistics.Rounds] | None:
    if not old.baseline or old.baseline != new.baseline:
        return None
    first = before.case(old.baseline).samples.get(scenario)
    second = after.case(new.baseline).samples.get(scenario)
    return (first, second) if first and second else None


def _same_baseline(before: Report, after: Report) -> bool:
    """Return whether the baselines are the same programs: else what changed may be they."""
    a, b = before.machine.versions, after.machine.versions
    return all(a.get(name) == b.get(name) for name in _DECIDING_PACKAGES)


def _remarks(before: Report, after: Report) -> list[str]:
    a, b = before.machine, after.machine
    found = [
        f"{what}: {first} and {second}"
        for what, first, second in (
            ("processor", a.cpu, b.cpu),
            ("cores", a.cores, b.cores),
            ("latentc", before.latentc, after.latentc),
            ("source", before.bundle.fingerprint[:12], after.bundle.fingerprint[:12]),
        )
        if first != second
    ]
    for name in sorted({*a.versions, *b.versions}):
        first, second = a.versions.get(name, "none"), b.versions.get(name, "none")
        if first != second:
            found.append(f"{name}: {first} and {second}")
    return found
