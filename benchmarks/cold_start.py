"""From a new process to the first image: latentc against a bare script.

    python -m latentc.benchmarks.cold_start BUNDLE

Every run is a new process that imports, loads, makes one image and saves it; wall time and
peak memory are those of the whole process. The files are in the system's cache: the first
round is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from latentc.benchmarks import importtime
from latentc.benchmarks.measure import (
    Child,
    ChildFailed,
    Summary,
    machine,
    mib,
    run_child,
    run_script,
    summarise,
    table,
    take_turns,
    write_json,
)
from latentc.exporter.targets import TARGETS
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.storage.files import temporary_folder
from latentc.runtimes.terminal import say

LIMIT = 1.3  # of the bare script's time and memory
SCHEDULER = "ddim"  # what the bare script knows
BARE = "bare onnxruntime"

LATENTC = """
import sys
import latentc
bundle, build, backend, prompt, steps, guidance, seed, out = sys.argv[1:]
pipe = latentc.load(bundle, backend=backend, build=build)
result = pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(guidance),
              seed=int(seed), scheduler="ddim")
result.images[0].save(out)
"""

DIFFUSERS = """
import sys
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
folder, prompt, steps, guidance, seed, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
result = pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(guidance),
              generator=torch.Generator().manual_seed(int(seed)))
result.images[0].save(out)
"""

# The same as LATENTC, with a clock.
STAGES = """
import sys
from time import perf_counter
marks = [perf_counter()]
import latentc
bundle, build, backend, prompt, steps, guidance, seed, out = sys.argv[1:]
load = latentc.load
marks.append(perf_counter())
pipe = load(bundle, backend=backend, build=build)
marks.append(perf_counter())
result = pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(guidance),
              seed=int(seed), scheduler="ddim")
marks.append(perf_counter())
result.images[0].save(out)
marks.append(perf_counter())
from latentc.benchmarks.measure import report
times = result.timings
stages = dict(zip(["import", "load", "call", "save"], (b - a for a, b in zip(marks, marks[1:]))))
inside = dict(tokenize=times.tokenize, encode=times.encode, denoise=times.denoise,
              decode=times.decode)
report(dict(stages=stages, call=inside))
"""


@dataclass(frozen=True)
class Settings:
    """The settings say what every case is asked for."""

    bundle: Path
    prompt: str
    steps: int
    guidance: float
    seed: int

    def arguments(self) -> list[str]:
        return [self.prompt, str(self.steps), str(self.guidance), str(self.seed)]


@dataclass(frozen=True)
class Row:
    """One case: wall and processor seconds, peak bytes; ratios to the bare script."""

    seconds: Summary
    cpu: Summary
    memory: Summary
    time_ratio: float | None = None
    memory_ratio: float | None = None


def cases(
    settings: Settings,
    manifest: Manifest,
    builds: Sequence[Build],
    diffusers: Path | None,
    out: Path,
) -> dict[str, Callable[[], Child]]:
    """Return the processes to compare, by name; the bare script where the bundle has fp32 ONNX."""
    processes: dict[str, Callable[[], Child]] = {}
    common, image = settings.arguments(), str(out / "image.png")
    if any(build.name == "onnx-fp32" for build in manifest.builds):
        spec = manifest.latents
        sides = [spec.default_height // spec.factor, spec.default_width // spec.factor]
        shape = ",".join(str(side) for side in (1, spec.channels, *sides))
        # Given as text, like the others: a script's own file would be compiled at each start.
        bare = Path(__file__).with_name("bare_onnx.py").read_text(encoding="utf-8")
        arguments = [str(settings.bundle), *common, shape, image]
        processes[BARE] = partial(run_script, bare, arguments)
    for build in builds:
        backend = TARGETS[build.target].backend
        arguments = [str(settings.bundle), build.name, backend, *common, image]
        processes[f"latentc {build.name}"] = partial(run_script, LATENTC, arguments)
    if diffusers is not None:
        arguments = [str(diffusers), *common, image]
        processes["diffusers"] = partial(run_script, DIFFUSERS, arguments)
    return processes


def evaluate(results: Mapping[str, Sequence[Child]]) -> dict[str, Row]:
    """Return medians, and ratios of medians to the bare script's."""
    rows = {
        name: Row(
            summarise([child.seconds for child in children]),
            summarise([child.cpu for child in children]),
            summarise([child.peak_memory for child in children]),
        )
        for name, children in results.items()
    }
    bare = rows.get(BARE)
    if bare is None:
        return rows
    return {
        name: Row(
            row.seconds,
            row.cpu,
            row.memory,
            row.seconds.median / bare.seconds.median,
            row.memory.median / bare.memory.median,
        )
        for name, row in rows.items()
    }


def show(rows: Mapping[str, Row]) -> str:
    """Return the rows as a table, and how latentc on ONNX Runtime does against the limit."""
    lines = [
        (
            name,
            f"{row.seconds.median:.3f}",
            f"{row.seconds.low:.3f}-{row.seconds.high:.3f}",
            f"{row.cpu.median:.3f}",
            _ratio(row.time_ratio),
            mib(row.memory.median),
            _ratio(row.memory_ratio),
        )
        for name, row in rows.items()
    ]
    head = ("new process to image", "s", "range", "cpu s", "ratio", "peak", "ratio")
    text = table(head, lines)
    ours = rows.get("latentc onnx-fp32")
    if ours and ours.time_ratio and ours.memory_ratio:
        text += (
            f"\nlatentc on ONNX Runtime to the bare script: time {ours.time_ratio:.2f}, "
            f"memory {ours.memory_ratio:.2f} (target: at most {LIMIT} each)"
        )
    return text


def breakdown(settings: Settings, build: Build, out: Path) -> str:
    """Return a table of where latentc's time goes: stages of the script, and imports by package."""
    backend = TARGETS[build.target].backend
    rest = [str(settings.bundle), build.name, backend, *settings.arguments()]
    rest.append(str(out / "image.png"))
    stages = run_child(["-c", STAGES, *rest]).result
    rows = [(name, f"{1e3 * value:.1f}") for name, value in stages["stages"].items()]
    rows += [(f"  call: {name}", f"{1e3 * value:.1f}") for name, value in stages["call"].items()]
    log = out / "imports.txt"
    run_child(["-X", "importtime", "-c", LATENTC, *rest], output=log)
    spent = importtime.by_package(log.read_text(errors="replace"))
    return (
        f"{table((f'stages of {build.name}', 'ms'), rows)}\n\n"
        f"{table(('imports', 'modules', 'ms'), importtime.rows(spent))}"
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


@click.command(
    epilog="""
    \b
    Examples:
      python -m latentc.benchmarks.cold_start build/demo/bundle
      python -m latentc.benchmarks.cold_start build/demo/bundle --breakdown --runs 15
      python -m latentc.benchmarks.cold_start build/demo/bundle --diffusers latentc/models/shapes
    """
)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--runs", default=9, show_default=True, help="Processes of each case.")
@click.option("--steps", default=4, show_default=True, help="Denoising steps.")
@click.option("--prompt", default="a large red circle", show_default=True)
@click.option("--build", "builds", multiple=True, help="Only this build; may be repeated.")
@click.option(
    "--diffusers",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Also run this diffusers folder with diffusers.",
)
@click.option("--breakdown", "detailed", is_flag=True, help="Also show stages and imports.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a file.")
def main(
    bundle: Path,
    runs: int,
    steps: int,
    prompt: str,
    builds: Sequence[str],
    diffusers: Path | None,
    detailed: bool,
    json_file: Path | None,
) -> None:
    """Compare new process to first image for every build in BUNDLE with a bare script.

    BUNDLE must hold sampling plans for the scheduler "ddim", which every default export has.
    """
    settings = Settings(bundle, prompt, steps, guidance=5.0, seed=0)
    manifest = Manifest.load(bundle)
    if SCHEDULER not in {schedule.name for schedule in manifest.schedules}:
        raise click.ClickException(f"no plans: latentc schedule {bundle} --scheduler {SCHEDULER}")
    chosen = tuple(b for b in manifest.builds if not builds or b.name in builds)
    if not chosen:
        raise click.ClickException(f"{bundle} has none of these builds: {', '.join(builds)}")
    say(machine().line())
    with temporary_folder() as out:
        try:
            compared = cases(settings, manifest, chosen, diffusers, out)
            take_turns(compared, 1)
            rows = evaluate(take_turns(compared, runs))
            say(f"{bundle.name}, {steps} steps, median of {runs}\n\n{show(rows)}")
            if detailed:
                say(f"\n{breakdown(settings, chosen[0], out)}")
        except ChildFailed as error:
            raise click.ClickException(str(error)) from error
    if json_file is not None:
        document: dict[str, Any] = {"steps": steps, "runs": runs, "limit": LIMIT}
        document["rows"] = {name: asdict(row) for name, row in rows.items()}
        write_json(json_file, document)


if __name__ == "__main__":
    main()
