"""Fuzz every parser: ``python -m tests.fuzz --minutes 30`` (`make fuzz`).

Each parser of the list (`tests.fuzz.targets`) is fuzzed in a process of its own, two at a time, for
its share of the time, and for at least `--least` inputs. What was reached is kept under build/fuzz,
so that the next run goes on from there; what was found is kept there as well, and is an error. The
figures go to a record (`--record`) that docs/reliability.md is made from.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click

from tests import reliability
from tests.fuzz import targets

KEPT = targets.ROOT / "build" / "fuzz"
_MEGABYTES = 3000  # of memory for one process
_SLOWEST = 20  # seconds for one input
_LONGEST = 1 << 14  # bytes of an input
_FAULTS = 5  # of one parser, after which it is left alone
_LINE = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+)")
_TOTAL = re.compile(r"\((\d+) inline 8-bit counters\)|\((\d+) counters?\)")
_RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


@dataclass(frozen=True)
class Figures:
    """The figures say what fuzzing one parser gave: how many inputs, how many branches of Python
    code they reached, how many inputs are kept because they reach something of their own, seconds,
    and the files of inputs that are faults.
    """

    parser: str
    inputs: int = 0
    branches: int = 0
    kept: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def fuzz(name: str, seconds: float, least: int) -> Figures:
    """Fuzz one parser for `seconds`, and for at least `least` inputs."""
    figures = Figures(name)
    corpus = KEPT / "corpus" / _file_name(name)
    corpus.mkdir(parents=True, exist_ok=True)
    _lay_out(name, corpus)
    began = time.monotonic()
    while len(figures.faults) < _FAULTS:
        left = seconds - (time.monotonic() - began)
        missing = least - figures.inputs
        if left < 1 and missing <= 0:
            break
        bound = f"-max_total_time={int(left)}" if left >= 1 else f"-runs={missing}"
        figures = _once(figures, corpus, bound, max(left, 60) * 4 + 120)
    figures = replace(figures, seconds=round(time.monotonic() - began, 1))
    return replace(figures, kept=sum(1 for _ in corpus.iterdir()))


def _once(figures: Figures, corpus: Path, bound: str, patience: float) -> Figures:
    found = KEPT / "faults" / _file_name(figures.parser)
    found.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    command = [
        *(sys.executable, "-m", "tests.fuzz.one", figures.parser, bound, "-print_final_stats=1"),
        *(f"-rss_limit_mb={_MEGABYTES}", f"-timeout={_SLOWEST}", f"-max_len={_LONGEST}"),
        *(f"-artifact_prefix={found}{os.sep}", "-reload=0", str(corpus)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(targets.ROOT), "OMP_NUM_THREADS": "1"}
    log = KEPT / "logs" / f"{_file_name(figures.parser)}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        ended = subprocess.run(
            command,
            cwd=targets.ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=output,
            timeout=patience,
            check=False,
        )
    said = log.read_text("utf-8", errors="replace")
    lines = _LINE.findall(said)
    runs = [int(count) for count in _RUNS.findall(said)] or [int(lines[-1][0]) if lines else 0]
    faults = sorted(str(path.relative_to(KEPT)) for path in set(found.iterdir()) - before)
    if ended.returncode and not faults:
        faults = [f"no input: see {log.relative_to(KEPT)}"]
    return replace(
        figures,
        inputs=figures.inputs + runs[-1],
        branches=max([figures.branches, *(int(reached) for _, reached in lines)]),
        faults=[*figures.faults, *faults],
    )


def _lay_out(name: str, corpus: Path) -> None:
    """Put a parser's good inputs, and what was found earlier, where the fuzzer starts from."""
    for data in [*targets.target(name).seeds, *found_inputs(name)]:
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)


def found_inputs(name: str) -> list[bytes]:
    """Return the inputs of a parser that were faults once."""
    folder = targets.FOUND / _file_name(name)
    return [path.read_bytes() for path in sorted(folder.glob("*"))] if folder.is_dir() else []


def _file_name(name: str) -> str:
    return name.replace(":", ".")


@click.command()
@click.option("--minutes", type=float, default=30.0, show_default=True, help="In all.")
@click.option("--jobs", type=int, default=2, show_default=True, help="Processes at a time.")
@click.option(
    "--least", type=int, default=20_000, show_default=True, help="Inputs for each parser."
)
@click.option("--only", multiple=True, help="Parsers whose names contain this.")
@click.option("--record", type=click.Path(path_type=Path), help="Where the figures go.")
def main(minutes: float, jobs: int, least: int, only: Sequence[str], record: Path | None) -> None:
    """Fuzz every parser of what comes from outside."""
    names = [name for name in targets.names() if not only or any(part in name for part in only)]
    share = minutes * 60 * jobs / max(1, len(names))
    began = time.monotonic()

    def work(name: str) -> Figures:
        figures = fuzz(name, share, least)
        click.echo(
            f"{figures.parser:<55} {figures.inputs:>9,} inputs {figures.branches:>6,} branches"
            f" {len(figures.faults):>3} faults"
        )
        return figures

    with ThreadPoolExecutor(jobs) as pool:
        figures = list(pool.map(work, names))
    faults = [fault for each in figures for fault in each.faults]
    total = sum(each.inputs for each in figures)
    click.echo(f"{total:,} inputs in {time.monotonic() - began:,.0f} s, {len(faults)} faults")
    reliability.save(
        "fuzz",
        {
            "minutes": round((time.monotonic() - began) / 60, 1),
            "jobs": jobs,
            "inputs": total,
            "faults": len(faults),
            "parsers": [asdict(each) for each in figures],
        },
        record,
    )
    for fault in faults:
        click.echo(f"fault: {KEPT / fault}", err=True)
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
