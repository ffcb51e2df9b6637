"""The demo: the model in the box, compiled, verified, and run on every backend.

    python -m latentc.demo -o build/demo

leaves ``bundle/``, ``styled/`` (with a LoRA), the image grid ``grid.png`` (prompts and tasks ×
backends, PyTorch's own images first), ``parity.json`` with the figures that are also printed, and
a short benchmark in ``bench/``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from latentc import builtin_model, demo_tasks
from latentc.runtimes.backends.backend import get
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.commands.report import print_verification
from latentc.runtimes.errors import LatentcError
from latentc.runtimes.images.image import grid, save
from latentc.runtimes.pipeline.pipeline import load
from latentc.runtimes.storage.outputs import check_folder
from latentc.runtimes.terminal import markup, say
from latentc.runtimes.verification.verify import psnr, relative_l2

PROMPTS = (
    "a large red circle",
    "a small green triangle on the left",
    "a blue square above a yellow star",
    "a purple star to the left of an orange circle",
)
TARGETS = {"onnxruntime": "onnx", "openvino": "openvino", "torch": "torch"}
STEPS = 25
SEED = 42
GUIDANCE_SCALE = 2.0  # the built-in model's best, see its card


@dataclass(frozen=True)
class Parity:
    """One backend's images of the demo's prompts against the diffusers pipeline's."""

    backend: str
    build: str
    latents_relative_l2: float
    image_max_difference: int
    image_psnr: float
    seconds_per_image: float


@click.command()
@click.option(
    "-o",
    "--output",
    default="build/demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where everything goes.",
)
def main(output: Path) -> None:
    """Export the built-in model, verify it, and draw the same images on every backend."""
    try:
        run(output)
    except LatentcError as error:
        say(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def run(output: Path) -> list[Parity]:
    """The whole demo; returns the parity figures of each backend."""
    check_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    bundle = output / "bundle"
    manifest = compile_builtin(bundle)
    print_verification(manifest)
    say(f"Drawing {len(PROMPTS)} prompts with PyTorch and {len(TARGETS)} backends …")
    images, latents, seconds = from_diffusers()
    rows: list[list[Any]] = [[image] for image in images]
    figures = []
    for name, target in TARGETS.items():
        found, figure = from_bundle(bundle, name, target, images, latents)
        figures.append(figure)
        for row, image in zip(rows, found, strict=True):
            row.append(image)
    more, judged = draw_tasks(bundle, output / "styled", [images[0], images[2]])
    rows += more
    sheet = grid(
        [image for row in rows for image in row],
        len(rows),
        1 + len(TARGETS),
        row_labels=[*PROMPTS, *(row.label for row in demo_tasks.ROWS)],
        col_labels=["PyTorch (diffusers)", *TARGETS],
        scale=3,
    )
    save(sheet, output / "grid.png")
    report = {
        "prompts": PROMPTS,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": SEED,
        "diffusers_seconds_per_image": seconds,
        "backends": [asdict(figure) for figure in figures],
        "tasks": judged,
    }
    (output / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(figures, seconds)
    for line in judged:
        verdict = "right" if line["right"] else "WRONG"
        say(f"{line['image']}: {verdict} on every backend, by the judge {line['judge']!r}")
    measure(bundle, output / "bench")
    say(f"\n{output / 'grid.png'}: the images\n{bundle}: the bundle; try:")
    say(
        f'  latentc generate {bundle} "a large red circle" --guidance-scale {GUIDANCE_SCALE:g} '
        "--seed 1 -o circle.png"
    )
    return figures


def draw_tasks(
    bundle: Path, styled: Path, given: list[Any]
) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """The rows of what else a bundle does, and what the judges say of them."""
    from latentc.exporter.cli import Reporter
    from latentc.exporter.source.resolving import load as load_pipeline
    from latentc.exporter.source.resolving import resolve

    say("Exporting the built-in model with its LoRA, and drawing the tasks …")
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "seed": SEED}
    with Reporter(quiet=False) as reporter:
        demo_tasks.styled_bundle(styled, tuple(TARGETS.values()), STEPS, reporter.report)
    columns, embeds = [], None
    for name, target in TARGETS.items():
        build = f"{target}-fp32"
        with (
            load(bundle, backend=get(name), build=build) as pipe,
            load(styled, backend=get(name), build=build) as other,
        ):
            columns.append(demo_tasks.from_bundle(pipe, other, given, call))
            embeds = embeds or pipe.encode_prompt(demo_tasks.WEIGHTED, prompt_weighting=True)
    source = load_pipeline(resolve(builtin_model()))
    columns.insert(0, demo_tasks.from_diffusers(source, embeds or {}, given, call))
    verdicts = list(zip(*map(demo_tasks.right, columns), strict=True))
    judged = [
        {"image": row.label, "judge": row.judge, "right": all(each)}
        for row, each in zip(demo_tasks.ROWS, verdicts, strict=True)
    ]
    return [list(row) for row in zip(*columns, strict=True)], judged


def measure(bundle: Path, report: Path) -> None:
    """A short form of `latentc bench`: every fp32 build against PyTorch."""
    from latentc.benchmarks.bench.cli import bench

    say("\nMeasuring the builds …")
    builds = [word for target in TARGETS.values() for word in ("--build", f"{target}-fp32")]
    arguments = [str(bundle), *builds, "--short", "--score", "0", "-o", str(report)]
    bench.main(arguments, prog_name="latentc bench", standalone_mode=False)


def compile_builtin(bundle: Path) -> Manifest:
    """Export the built-in model to every target, with the command line's progress."""
    from latentc.exporter.cli import Reporter
    from latentc.exporter.compiler.export import export

    say(f"Exporting the built-in model to {', '.join(TARGETS.values())} …")
    reporter = Reporter(quiet=False)
    with reporter:
        targets = tuple(TARGETS.values())
        result = export(
            builtin_model(),
            bundle,
            targets=targets,
            tasks=demo_tasks.TASKS,
            overwrite=True,
            report=reporter.report,
        )
    return result.manifest


def from_diffusers() -> tuple[list[Any], np.ndarray[Any, Any], float]:
    """Images and final latents of the real pipeline, and seconds per image."""
    import torch

    from latentc.exporter.source.resolving import load as load_pipeline
    from latentc.exporter.source.resolving import resolve
    from latentc.exporter.verification.reference import watched

    pipe = load_pipeline(resolve(builtin_model()))
    images, latents = [], []
    begun = time.perf_counter()
    for prompt in PROMPTS:
        with watched(pipe, pipe.unet) as seen, torch.no_grad():
            images += pipe(
                prompt,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(SEED),
            ).images
        assert seen.latents is not None
        latents.append(seen.latents.numpy())
    return images, np.concatenate(latents), (time.perf_counter() - begun) / len(PROMPTS)


def from_bundle(
    bundle: Path, backend: str, target: str, expected: list[Any], latents: np.ndarray[Any, Any]
) -> tuple[list[Any], Parity]:
    """Return the same images from one build, and how they compare."""
    with load(bundle, backend=get(backend), build=f"{target}-fp32") as pipe:
        begun = time.perf_counter()
        results = [
            pipe(prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE, seed=SEED)
            for prompt in PROMPTS
        ]
        seconds = (time.perf_counter() - begun) / len(PROMPTS)
        build = pipe.build.name
    images = [result.images[0] for result in results]
    found, wanted = (np.stack([np.asarray(p) for p in each]) for each in (images, expected))
    return images, Parity(
        backend=backend,
        build=build,
        latents_relative_l2=relative_l2(np.concatenate([r.latents for r in results]), latents),
        image_max_difference=int(np.abs(found.astype(int) - wanted.astype(int)).max()),
        image_psnr=psnr(found, wanted),
        seconds_per_image=seconds,
    )


def print_table(figures: list[Parity], diffusers_seconds: float) -> None:
    """The parity figures as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Against the diffusers pipeline, {STEPS} steps, seed {SEED}")
    columns: list[tuple[str, Callable[[Parity], str]]] = [
        ("backend", lambda figure: figure.backend),
        ("build", lambda figure: figure.build),
        ("latents, relative L2", lambda figure: f"{figure.latents_relative_l2:.1e}"),
        ("image, of 255", lambda figure: str(figure.image_max_difference)),
        ("PSNR, dB", lambda figure: f"{figure.image_psnr:.1f}"),
        ("s per image", lambda figure: f"{figure.seconds_per_image:.2f}"),
    ]
    for title, _ in columns:
        table.add_column(title, justify="left" if title in ("backend", "build") else "right")
    for figure in figures:
        table.add_row(*(markup(text(figure)) for _, text in columns))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"diffusers itself: {diffusers_seconds:.2f} s per image")


if __name__ == "__main__":
    main()
