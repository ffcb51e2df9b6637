"""The first start of a bundle on a machine against the second: what kept graphs are worth.

    python -m latentc.benchmarks.second_start BUNDLE --build openvino-bf16 --static

Every round is three new processes with an empty folder for what latentc keeps: the first reads
and hashes the bundle's files, compiles the graphs and keeps them; the second finds them; the
third knows the hashes, and compiles again (``cache=False``). The files are in the system's
cache: the first round is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from latentc.benchmarks.measure import (
    Child,
    ChildFailed,
    Summary,
    machine,
    run_child,
    summarise,
    table,
    write_json,
)
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.storage.files import temporary_folder
from latentc.runtimes.terminal import say
from latentc.runtimes.unknown_names import suggestion

FIRST, SECOND, UNCACHED = "first start", "second start", "second, compiled again"
SCRIPT = """
import json, sys
from time import perf_counter
from latentc.benchmarks.measure import report
import latentc
bundle, build, compute, static, cache = sys.argv[1:]
begun = perf_counter()
latentc.load(
    bundle,
    build=build,
    compute=compute or None,
    static=json.loads(static),
    cache=json.loads(cache),
)
report(perf_counter() - begun)
"""


@dataclass(frozen=True)
class Start:
    """Seconds of the whole process, and of `latentc.load` in it."""

    process: Summary
    load: Summary


def measure(arguments: Sequence[str], runs: int) -> dict[str, Start]:
    """Return the starts of `runs` rounds, after one that is not counted.

    Args:
        arguments: bundle, build, compute and static sizes, as the script takes them.
    """
    children_by_start: dict[str, list[Child]] = {FIRST: [], SECOND: [], UNCACHED: []}
    for _ in range(runs + 1):
        with temporary_folder() as kept:
            for name, children in children_by_start.items():
                cache = "false" if name == UNCACHED else "true"
                place = {"LATENTC_CACHE": str(kept)}
                children.append(run_child(["-c", SCRIPT, *arguments, cache], place))
    return {name: _start(children[1:]) for name, children in children_by_start.items()}


def _start(children: Sequence[Child]) -> Start:
    return Start(
        summarise([child.seconds for child in children]),
        summarise([float(child.result) for child in children]),
    )


def show(starts: Mapping[str, Start]) -> str:
    """Return the starts as a table, and how many times as fast as the first they are."""
    first = starts[FIRST]
    rows = [
        (
            name,
            f"{start.process.median:.2f}",
            f"{start.load.median:.2f}",
            f"{first.process.median / start.process.median:.1f}×",
            f"{first.load.median / start.load.median:.1f}×",
        )
        for name, start in starts.items()
    ]
    return table(("", "process, s", "load, s", "process", "load"), rows)


@click.command(
    epilog="""
    \b
    Examples:
      python -m latentc.benchmarks.second_start build/demo/bundle --build openvino-fp32
      python -m latentc.benchmarks.second_start build/sd15-bundle --build openvino-bf16 --static
      --runs 3
    """
)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--build", required=True, help="By name.")
@click.option("--compute", default="", help="Precision to compute in, such as bf16.")
@click.option("--static", is_flag=True, help="For the bundle's own size only.")
@click.option("--runs", default=5, show_default=True, help="Rounds of three processes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a file.")
def main(
    bundle: Path, build: str, compute: str, static: bool, runs: int, json_file: Path | None
) -> None:
    """Compare the first start of a BUNDLE on this machine with the second."""
    known = [each.name for each in Manifest.load(bundle).builds]
    if build not in known:
        hint = suggestion(build, known, "it has")
        raise click.ClickException(f"{bundle} has no build {build!r}; {hint}")
    say(machine().line())
    try:
        starts = measure([str(bundle), build, compute, "{}" if static else "null"], runs)
    except ChildFailed as error:
        raise click.ClickException(str(error)) from error
    say(f"{bundle.name}, {build}, median of {runs}\n\n{show(starts)}")
    if json_file is not None:
        rows = {name: asdict(start) for name, start in starts.items()}
        write_json(json_file, {"build": build, "static": static, "runs": runs, "rows": rows})


if __name__ == "__main__":
    main()
