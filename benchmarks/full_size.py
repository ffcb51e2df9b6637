"""Does a full-size pipeline export within bounds, and does the result run?

    python -m latentc.benchmarks.models sd15 build/sd15
    python -m latentc.benchmarks.full_size build/sd15 -o build/full-size

Every export and every run is a process of its own, so that each peak of memory is its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from latentc.benchmarks import jobs
from latentc.benchmarks.measure import Child, ChildFailed, gib, machine, table, write_json
from latentc.exporter.targets import TARGETS
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import LatentcError
from latentc.runtimes.terminal import say

LIMIT = 6.0  # GiB, of an export

Measured = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One target of one pipeline, and the settings of its runs."""

    source: Path
    output: Path
    target: str
    verify: bool
    size: int
    steps: int
    runs: int

    @property
    def bundle(self) -> Path:
        return self.output / f"bundle-{self.target}"

    def settings(self) -> dict[str, Any]:
        """Return what a stored result must have been measured with to be used again."""
        return {
            "source": str(self.source.resolve()),
            "verify": self.verify,
            "size": self.size,
            "steps": self.steps,
            "runs": self.runs,
        }


def measure(case: Case, keep: bool) -> dict[str, Measured]:
    """Return all pieces of a case by name; those that an earlier, interrupted run finished are
    read.
    """
    names = ("export", *_components(case.source), "pipeline")
    pieces = {name: result for name in names if (result := _stored(case, name))}
    if len(pieces) < len(names):
        if "export" not in pieces or not case.bundle.exists():
            pieces["export"] = _piece(case, "export", lambda: _export(case))
        for name in names[1:]:
            if name not in pieces:
                pieces[name] = _piece(case, name, lambda name=name: _run(case, name))  # type: ignore[misc]
    if not keep:
        shutil.rmtree(case.bundle, ignore_errors=True)
    return {name: pieces[name] for name in names}


def show(case: Case, pieces: Mapping[str, Measured]) -> str:
    """Return the measurements of a case as tables."""
    export = pieces["export"]
    stages = [
        (
            f"{stage['subject']}: {stage['stage']}",
            f"{stage['seconds']:.1f}",
            f"{stage['size'] / 1e6:.1f}" if stage["size"] else "",
            gib(stage["memory"]),
            gib(stage["peak_memory"]),
        )
        for stage in export["stages"]
    ]
    whole = ("all", f"{export['seconds']:.1f}", f"{export['size'] / 1e6:.1f}", "")
    stages.append((*whole, gib(export["peak_memory"])))
    head = (f"export to {case.target}", "seconds", "MB", "memory after", "peak so far")
    runs = [
        (
            name,
            f"{piece['load']:.2f}",
            f"{piece['first']:.2f}" if "first" in piece else f"{piece['steps'][0]:.2f}",
            f"{piece['median']:.2f}",
            gib(piece["memory_loaded"]),
            gib(piece["peak_memory"]),
        )
        for name, piece in pieces.items()
        if name != "export"
    ]
    title = f"{TARGETS[case.target].backend}, {case.size}x{case.size}"
    columns = (title, "load s", "first s", "median s", "loaded", "peak")
    verified = "verified" if export["verified"] else "not verified"
    return f"{table(head, stages)}\n({verified})\n\n{table(columns, runs)}"


def _components(source: Path) -> Iterator[str]:
    from latentc.exporter.families import family_of

    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    yield from family_of(index["_class_name"]).COMPONENTS


def _export(case: Case) -> Measured:
    arguments = {
        "source": str(case.source),
        "output": str(case.bundle),
        "target": case.target,
        "verify": case.verify,
    }
    child = jobs.run("export", arguments, echo=True)
    return _result(child)


def _run(case: Case, name: str) -> Measured:
    backend = TARGETS[case.target].backend
    arguments = {"bundle": str(case.bundle), "backend": backend, "size": case.size}
    if name == "pipeline":
        child = jobs.run("pipeline", {**arguments, "steps": case.steps})
    else:
        child = jobs.run("component", {**arguments, "name": name, "runs": case.runs})
    return _result(child)


def _result(child: Child) -> Measured:
    return {**child.result, "peak_memory": child.peak_memory, "max_rss": child.max_rss}


def _piece(case: Case, name: str, make: Callable[[], Measured]) -> Measured:
    say(f"{case.target}: {name} …", err=True)
    result = make()
    path = _path(case, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": case.settings(), "result": result}, indent=2) + "\n")
    return result


def _stored(case: Case, name: str) -> Measured | None:
    try:
        document = json.loads(_path(case, name).read_text())
    except (OSError, ValueError):
        return None
    if document.get("settings") != case.settings():
        return None
    result: Measured = document["result"]
    return result


def _path(case: Case, name: str) -> Path:
    return case.output / "pieces" / f"{case.target}-{name}.json"


def _refuse_foreign(output: Path) -> None:
    """Refuse to go on where something else than a bundle stands: this command deletes what is
    there.
    """
    for target in TARGETS:
        bundle = output / f"bundle-{target}"
        if bundle.exists():
            try:
                Manifest.load(bundle)
            except LatentcError as error:
                raise click.ClickException(f"{bundle} is in the way: {error}") from error


@click.command(
    epilog="""
    \b
    Examples:
      python -m latentc.benchmarks.full_size build/sd15 -o build/full-size
      python -m latentc.benchmarks.full_size build/sd15 -o build/full-size --target openvino \\
          --runs 5 --json build/full-size.json
    """
)
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the bundles (removed in the end) and for what was measured (kept).",
)
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(list(TARGETS)),
    default=("onnx", "openvino"),
    show_default=True,
    help="May be repeated.",
)
@click.option("--size", default=512, show_default=True, help="Of the image, in pixels.")
@click.option("--steps", default=3, show_default=True, help="Of the whole image.")
@click.option("--runs", default=3, show_default=True, help="Calls per component; the median.")
@click.option("--limit", default=LIMIT, show_default=True, help="GiB that an export may take.")
@click.option("--verify/--no-verify", default=True, help="As in an export.  [default: on]")
@click.option("--fresh", is_flag=True, help="Measure again what an earlier run has finished.")
@click.option("--keep", is_flag=True, help="Keep the bundles: some gigabytes each.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a file.")
def main(
    model: Path,
    output: Path,
    targets: Sequence[str],
    size: int,
    steps: int,
    runs: int,
    limit: float,
    verify: bool,
    fresh: bool,
    keep: bool,
    json_file: Path | None,
) -> None:
    """Export the diffusers folder MODEL and run it: seconds and peak memory.

    An interrupted run goes on where it stopped. Ends with exit code 1 if an export took more
    memory than the limit.
    """
    _refuse_foreign(output)
    if fresh:
        shutil.rmtree(output / "pieces", ignore_errors=True)
    say(machine().line())
    results = {}
    for target in targets:
        case = Case(model, output, target, verify, size, steps, runs)
        try:
            results[target] = measure(case, keep)
        except ChildFailed as error:
            raise click.ClickException(str(error)) from error
        say(f"\n{show(case, results[target])}\n")
    if json_file is not None:
        settings = {"model": model.name, "size": size, "steps": steps, "runs": runs}
        write_json(json_file, {**settings, "limit_gib": limit, "targets": results})
    over = [t for t in targets if results[t]["export"]["peak_memory"] > limit * 2**30]
    say(
        f"peak memory of the export above {limit:g} GiB: {', '.join(over)}"
        if over
        else f"peak memory of every export within {limit:g} GiB"
    )
    if over:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
