"""This module measures what an export costs: anonymous memory, seconds and disk, stage by stage.

    python -m latentc.benchmarks.models sdxl build/sdxl --dtype fp16
    python -m latentc.benchmarks.export_cost build/sdxl --target onnx --precision fp16 --no-verify

Anonymous memory (Linux's RssAnon) is what a process cannot do without. Mapped files count as
resident too, but the system drops them when memory is short. What
`latentc.exporter.compiler.preflight` expects stands beside what was measured, and its constants
come from this command.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.benchmarks.measure import (
    ChildFailed,
    anonymous_memory,
    gib,
    machine,
    peak_memory,
    report,
    run_child,
    table,
    write_json,
)
from latentc.exporter.targets import TARGETS
from latentc.runtimes.terminal import say

if TYPE_CHECKING:
    from latentc.exporter.progress import Event

INTERVAL = 0.02  # seconds between two looks


class Peak:
    """The most anonymous memory since the last `take`, in bytes, and in all."""

    def __init__(self) -> None:
        self._now = self.whole = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look on in a thread for as long as the block runs."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(INTERVAL):
                self._now = max(self._now, anonymous_memory())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def take(self) -> int:
        """Return the peak since the last time."""
        peak = max(self._now, anonymous_memory())
        self._now, self.whole = 0, max(self.whole, peak)
        return peak


def export(source: str, output: str, targets: Sequence[str], precision: str, verify: bool) -> Any:
    """Compile in a fresh process, and tell what each stage took."""
    from latentc.exporter.compiler.export import export as compiler
    from latentc.exporter.compiler.export import preflight

    options: dict[str, Any] = {"targets": targets, "precision": precision, "verify": verify}
    expected = preflight(source, output, **options)
    stages: list[dict[str, Any]] = []
    peak = Peak()
    cpu = [time.process_time()]

    def note(event: Event) -> None:
        if event.seconds is None:
            return
        stages.append(
            {
                "subject": event.subject,
                "stage": event.stage,
                "seconds": event.seconds,
                "cpu": time.process_time() - cpu[0],
                "size": event.size,
                "anonymous": peak.take(),
            }
        )
        cpu[0] = time.process_time()
        print(json.dumps(stages[-1]), file=sys.stderr, flush=True)

    begun, used = time.perf_counter(), time.process_time()
    with peak.watched():
        bundle = compiler(source, output, preflight=False, report=note, **options)
    peak.take()
    return {
        "stages": stages,
        "seconds": time.perf_counter() - begun,
        "cpu": time.process_time() - used,
        "anonymous": peak.whole,
        "resident": peak_memory(),
        "size": sum(file.size for file in bundle.manifest.files()),
        "expected": {
            "memory": expected.memory,
            "disk": expected.disk,
            "seconds": expected.seconds,
        },
    }


def show(found: dict[str, Any], title: str) -> str:
    """Return what was measured, as a table."""
    rows = [
        (
            f"{each['subject']}: {each['stage']}",
            f"{each['seconds']:.1f}",
            f"{each['cpu']:.1f}",
            f"{each['size'] / 1e6:.0f}" if each["size"] else "",
            gib(each["anonymous"]),
        )
        for each in found["stages"]
    ]
    size = f"{found['size'] / 1e6:.0f}"
    whole = (f"{found['seconds']:.1f}", f"{found['cpu']:.1f}", size, gib(found["anonymous"]))
    expected = found["expected"]
    guess = (f"{expected['seconds']:.0f}", "", f"{expected['disk'] / 1e6:.0f}")
    rows += [("all", *whole), ("expected", *guess, gib(expected["memory"]))]
    head = (title, "seconds", "processor s", "MB", "anonymous peak")
    return f"{table(head, rows)}\nresident at its peak, mapped files included: " + gib(
        found["resident"]
    )


@click.command(
    epilog="""
    \b
    Examples:
      python -m latentc.benchmarks.export_cost build/sdxl --target onnx --precision fp16 --no-verify
      python -m latentc.benchmarks.export_cost build/sd15 --target openvino --json cost.json
    """
)
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/export-cost"),
    show_default=True,
    help="Where the bundle goes; it is removed in the end.",
)
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(list(TARGETS)),
    default=("onnx",),
    show_default=True,
    help="May be repeated.",
)
@click.option("-p", "--precision", default="fp32", show_default=True, help="As in an export.")
@click.option("--verify/--no-verify", default=True, help="As in an export.  [default: on]")
@click.option("--keep", is_flag=True, help="Keep the bundle.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a file.")
def main(
    model: Path,
    output: Path,
    targets: Sequence[str],
    precision: str,
    verify: bool,
    keep: bool,
    json_file: Path | None,
) -> None:
    """Export the diffusers folder MODEL in a fresh process and say what it cost."""
    if output.exists():
        raise click.ClickException(f"{output} is in the way: this command removes what it makes")
    asked = [str(model), str(output), list(targets), precision, verify]
    say(machine().line())
    try:
        child = run_child(
            ["-m", "latentc.benchmarks.export_cost", _CHILD, json.dumps(asked)], echo=True
        )
    except ChildFailed as error:
        raise click.ClickException(str(error)) from error
    finally:
        if not keep:
            shutil.rmtree(output, ignore_errors=True)
    say(show(child.result, f"{model.name} to {', '.join(targets)} in {precision}"))
    if json_file is not None:
        write_json(json_file, child.result)


_CHILD = "--child"

if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        report(export(*json.loads(sys.argv[2])))
    else:
        main()
