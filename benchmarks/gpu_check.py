"""This module checks what runs on this machine's NVIDIA GPU, and that it agrees with PyTorch on the
CPU.

    make gpu-check
    python -m latentc.benchmarks.gpu_check --source ./my-pipeline --only tensorrt

Exports a pipeline (the built-in one by default), builds TensorRT engines where TensorRT is, runs
every probe and a whole image through each engine on the GPU, and compares with what PyTorch made
on the CPU at export. What cannot run here is skipped by name. The record goes to docs/verified/.
Exit code 6: something disagrees; 5: nothing could run.
"""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from latentc.runtimes.errors import (
    BackendError,
    BackendUnavailable,
    DeviceUnavailable,
    LatentcError,
)
from latentc.runtimes.terminal import say
from latentc.runtimes.version import __version__

_EMPTY_INDEX = "# Verified on GPUs\n\n| Date | GPU | Record |\n|---|---|---|\n"


@dataclass(frozen=True)
class Case:
    """One build on one engine and device. `engines` says that engines are built first."""

    target: str
    precision: str
    backend: str
    device: str
    engines: bool = False

    @property
    def build(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def name(self) -> str:
        return f"{self.build} on {self.backend} {self.device}"


CASES = (
    Case("torch", "fp32", "torch", "cuda"),
    Case("onnx", "fp32", "onnxruntime", "cuda"),
    Case("tensorrt", "fp16", "onnxruntime", "cuda"),
    Case("onnx", "fp32", "onnxruntime", "tensorrt"),
    Case("tensorrt", "fp32", "tensorrt", "cuda", engines=True),
    Case("tensorrt", "fp16", "tensorrt", "cuda", engines=True),
    Case("tensorrt", "bf16", "tensorrt", "cuda", engines=True),
)


@dataclass(frozen=True)
class Outcome:
    """An outcome says what became of a case: ``ok``, ``MISS``, ``FAILED`` or ``skipped``, and its
    figures.
    """

    case: Case
    verdict: str
    reason: str = ""
    version: str = ""
    component: float | None = None
    latents: float | None = None
    image: int | None = None
    seconds: float | None = None


@click.command(epilog="Exit codes: 0 all agree · 5 nothing could run here · 6 something disagrees.")
@click.option("--source", help="Hub id or diffusers folder.  [default: the built-in model]")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/gpu-check"))
@click.option("--records", type=click.Path(path_type=Path), default=Path("docs/verified"))
@click.option("--only", multiple=True, help="Backends to check; may be repeated.  [default: all]")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="To time.")
def main(source: str | None, folder: Path, records: Path, only: tuple[str, ...], runs: int) -> None:
    """Check the engines of this machine's NVIDIA GPU and write a dated record."""
    cases = [case for case in CASES if not only or case.backend in only]
    possible = {case: _obstacle(case) for case in cases}
    bundle = folder / "bundle"
    wanted = [case for case, obstacle in possible.items() if not obstacle]
    if wanted:
        _export(source, bundle, wanted)
    outcomes = []
    for case, obstacle in possible.items():
        outcome = Outcome(case, "skipped", obstacle) if obstacle else _check(case, bundle, runs)
        outcomes.append(outcome)
        say(f"{case.name}: {outcome.verdict} {outcome.reason}".rstrip())
    if not wanted:
        say("nothing here can run on a GPU: no record is written", err=True)
        sys.exit(BackendError.exit_code)
    path = write_record(records, machine(), outcomes, source or "the built-in model")
    say(path)
    sys.exit(6 if any(each.verdict in ("MISS", "FAILED") for each in outcomes) else 0)


def _obstacle(case: Case) -> str:
    """Return why a case cannot run here; "" if it can."""
    from latentc.runtimes.backends import backend as engines

    try:
        engines.get(case.backend).device(case.device)
    except (BackendUnavailable, DeviceUnavailable) as error:
        return str(error)
    return ""


def _export(source: str | None, bundle: Path, cases: Iterable[Case]) -> None:
    """Export all builds that the cases need, into one bundle."""
    from latentc.exporter.cli import builtin_folder
    from latentc.exporter.compiler.export import export

    wanted: dict[str, list[str]] = {}
    for case in cases:
        wanted.setdefault(case.target, []).append(case.precision)
    for target, precisions in wanted.items():
        say(f"exporting for {target}: {', '.join(dict.fromkeys(precisions))}", err=True)
        export(
            source or builtin_folder(),
            bundle,
            targets=[target],
            precision=list(dict.fromkeys(precisions)),
            schedulers=(),
        )


def _check(case: Case, bundle: Path, runs: int) -> Outcome:
    try:
        return _measured(case, bundle, runs)
    except DeviceUnavailable as error:  # listed, but its libraries are not here
        return Outcome(case, "skipped", str(error))
    except LatentcError as error:
        return Outcome(case, "FAILED", str(error))


def _measured(case: Case, bundle: Path, runs: int) -> Outcome:
    from latentc.runtimes.backends import backend as engines
    from latentc.runtimes.bundle.manifest import Manifest
    from latentc.runtimes.commands.report import worst_checks
    from latentc.runtimes.pipeline.pipeline import load
    from latentc.runtimes.verification.verify import check_build

    if case.engines:
        _build_engines(case, bundle)
    manifest = Manifest.load(bundle)
    build = next(each for each in manifest.builds if each.name == case.build)
    engine = engines.get(case.backend)
    found = check_build(bundle, manifest, build, engine, case.device)
    with load(bundle, case.backend, case.device, build=case.build) as pipe:
        prompt = "a large red circle" if manifest.tokenizers else None
        results = [pipe(prompt, seed=1, output_type="latent") for _ in range(runs + 1)]
    return Outcome(
        case,
        "ok" if found.passed else "MISS",
        version=found.version,
        component=max(error for _, error, _, _ in worst_checks(found)),
        latents=found.loop.latents_relative_l2 if found.loop else None,
        image=found.loop.image_max_difference if found.loop else None,
        seconds=statistics.median(result.timings.total for result in results[1:]),
    )


def _build_engines(case: Case, bundle: Path) -> None:
    from latentc.runtimes.backends import backend as engines
    from latentc.runtimes.backends.backend import SessionOptions
    from latentc.runtimes.bundle.files import Bundle, graph_digest

    opened = Bundle.open(bundle)
    build = next(each for each in opened.manifest.builds if each.name == case.build)
    for component in opened.manifest.components:
        options = SessionOptions(key=graph_digest(build.artifacts[component.name]))
        entry = opened.entry(build, component.name, engines.find(case.backend))
        engines.get(case.backend).build(entry, component, case.device, options)


def machine() -> dict[str, str]:
    """Return what the record says about this machine."""
    command = (
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    )
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout
        gpu, driver, memory = (part.strip() for part in shown.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        gpu, driver, memory = "unknown GPU", "unknown", "unknown"
    return {
        "GPU": gpu,
        "Driver": driver,
        "GPU memory": memory,
        "System": platform.platform(terse=True),
        "Python": platform.python_version(),
        "latentc": __version__,
    }


def write_record(
    folder: Path, facts: dict[str, str], outcomes: Sequence[Outcome], source: str
) -> Path:
    """Write ``<date>-<gpu>.md`` and its line in the folder's README.md; returns its path."""
    day = datetime.now(UTC).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", facts["GPU"].lower()).strip("-")
    path = folder / f"{day}-{slug}.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_record(day, facts, outcomes, source)), "utf-8")
    index = folder / "README.md"
    line = f"| {day} | {facts['GPU']} | [{path.stem}]({path.name}) |"
    text = index.read_text("utf-8") if index.is_file() else _EMPTY_INDEX
    if line not in text:
        index.write_text(f"{text.rstrip()}\n{line}\n", "utf-8")
    return path


def _record(
    day: str, facts: dict[str, str], outcomes: Sequence[Outcome], source: str
) -> Iterable[str]:
    yield f"# {facts['GPU']}, {day}"
    yield ""
    yield f"By `make gpu-check`, with {source}. Errors are against PyTorch on the CPU: relative L2,"
    yield "the largest of all components and probes, then the final latents of a whole image."
    yield ""
    yield from _table(("", ""), list(facts.items()))
    yield ""
    heads = ("Build", "Engine", "Component", "Latents", "Image, of 255", "s per image", "")
    yield from _table(heads, [_row(outcome) for outcome in outcomes])
    skipped = [each for each in outcomes if each.reason]
    if skipped:
        yield ""
        yield from (
            f"- {outcome.case.name}, {outcome.verdict}: {outcome.reason}" for outcome in skipped
        )
    yield ""


def _row(each: Outcome) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    case = each.case
    engine = f"{case.backend} {each.version} {case.device}".replace("  ", " ")
    errors = number(each.component, ".1e"), number(each.latents, ".1e")
    rest = number(each.image, "d"), number(each.seconds, ".3f"), each.verdict
    return case.build, engine, *errors, *rest


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


if __name__ == "__main__":
    main()
