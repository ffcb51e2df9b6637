"""Command line for training: ``python -m examples.shapes.train --help``."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import click
import torch

from .stages import (
    AUTOENCODER_PLAN,
    DENOISER_PLAN,
    TEXT_PLAN,
    Settings,
    train_autoencoder,
    train_denoiser,
    train_text_encoder,
)
from .workers import Worker, run_workers


@click.command()
@click.argument("stage", type=click.Choice(["vae", "text", "denoiser", "all"]))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Working folder.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--steps",
    type=int,
    help=f"Steps of the stage [default: {AUTOENCODER_PLAN.steps} for vae, {TEXT_PLAN.steps} for "
    f"text, {DENOISER_PLAN.steps} for denoiser]; not with 'all'.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoints in OUT.")
@click.option("--compile", "compile_", is_flag=True, help="Compile the denoiser for speed.")
@click.option(
    "--processes",
    default=1,
    show_default=True,
    help="Share each CPU step among single-threaded processes.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    help="Also save the averaged pipeline here at each denoiser checkpoint.",
)
def main(
    stage: str,
    out: Path,
    device: str,
    steps: int | None,
    resume: bool,
    compile_: bool,
    processes: int,
    export: Path | None,
) -> None:
    """Train the shapes pipeline: the autoencoder, the text encoder, the denoiser, or all.

    The finished pipeline folder is OUT/pipeline.
    """
    if steps is not None and stage == "all":
        raise click.UsageError("--steps goes with one stage: 'vae', 'text' or 'denoiser'")
    if processes > 1 and device != "cpu":
        raise click.UsageError("--processes is for --device cpu")
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(out, compile=compile_, export=export)
    if steps is not None:
        name = {"vae": "autoencoder"}.get(stage, stage)
        plan = dataclasses.replace(getattr(settings, name), steps=steps)
        settings = dataclasses.replace(settings, **{name: plan})
    run_workers(processes, partial(train_stages, stage, settings, device, resume))


def train_stages(stage: str, settings: Settings, device: str, resume: bool, worker: Worker) -> None:
    """Train the stages that ``stage`` names, in this process."""
    if stage in ("vae", "all"):
        train_autoencoder(settings, torch.device(device), resume, worker)
    if stage in ("text", "all"):
        train_text_encoder(settings, torch.device(device), resume, worker)
    if stage in ("denoiser", "all"):
        train_denoiser(settings, torch.device(device), resume, worker)


if __name__ == "__main__":
    main()
