"""Scores a pipeline folder on held-out prompts: ``python -m examples.shapes.evaluate --help``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from latentc.benchmarks.shapes.captions import held_out_prompts
from latentc.benchmarks.shapes.judge import look, reasons
from latentc.benchmarks.shapes.scenes import CANVAS, Prompt

GUIDANCE = 2.0
STEPS = 25


@dataclass(frozen=True)
class Result:
    """One image and what is wrong with it (nothing, where the judge agrees)."""

    prompt: Prompt
    image: Image.Image
    faults: list[str]


def generate(
    pipeline: StableDiffusionPipeline,
    texts: list[str],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> list[Image.Image]:
    """Return one image per text; image ``i`` starts from noise seeded with ``seed + i``."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    output = pipeline(
        texts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        height=CANVAS,
        width=CANVAS,
    )
    images: list[Image.Image] = output.images
    return images


def evaluate(
    pipeline: StableDiffusionPipeline,
    prompts: list[Prompt],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    batch: int = 20,
) -> list[Result]:
    """Draw each prompt once and judge the images."""
    pipeline.set_progress_bar_config(disable=True)
    results: list[Result] = []
    for start in tqdm(range(0, len(prompts), batch), desc="images", unit="batch"):
        part = prompts[start : start + batch]
        images = generate(pipeline, [prompt.text for prompt in part], steps, guidance, seed + start)
        results += [
            Result(prompt, image, reasons(image, prompt))
            for prompt, image in zip(part, images, strict=True)
        ]
    return results


def share_right(results: list[Result]) -> float:
    """Return the share of the images that agree with their prompts, from 0 to 1."""
    return sum(not result.faults for result in results) / max(len(results), 1)


def sheet(images: list[Image.Image], columns: int = 10, scale: int = 2) -> Image.Image:
    """Return the images side by side, enlarged."""
    side = CANVAS * scale
    rows = -(-len(images) // columns)
    paper = Image.new("RGB", (columns * (side + 2), rows * (side + 2)), "grey")
    for i, image in enumerate(images):
        large = image.resize((side, side), Image.Resampling.BICUBIC)
        paper.paste(large, (i % columns * (side + 2), i // columns * (side + 2)))
    return paper


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompts", default=200, show_default=True, help="Half of one shape, half of two.")
@click.option("--steps", default=STEPS, show_default=True, help="Sampling steps.")
@click.option("--guidance", default=GUIDANCE, show_default=True, help="Guidance scale.")
@click.option("--seed", default=0, show_default=True, help="Chooses the prompts and the noise.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--sheet", "sheet_path", type=click.Path(path_type=Path), help="Save all images.")
def main(
    folder: Path,
    prompts: int,
    steps: int,
    guidance: float,
    seed: int,
    device: str,
    sheet_path: Path | None,
) -> None:
    """Score the pipeline in FOLDER on prompts whose images were kept out of training."""
    pipeline = DiffusionPipeline.from_pretrained(folder).to(device)
    everything: list[Result] = []
    started = time.perf_counter()
    lines = []
    for objects in (1, 2):
        asked = held_out_prompts(prompts // 2, objects, seed)
        results = evaluate(pipeline, asked, steps, guidance, 1000 * objects + seed)
        lines.append(_score_line(objects, results))
        everything += results
    for result in everything:
        if result.faults:
            shown = ", ".join(map(str, look(result.image))) or "nothing"
            click.echo(f"{result.prompt.text!r}: {'; '.join(result.faults)} [{shown}]")
    click.echo("\n".join(lines))
    click.echo(f"{len(everything)} images in {time.perf_counter() - started:.1f} s")
    if sheet_path is not None:
        sheet([result.image for result in everything]).save(sheet_path)


def _score_line(objects: int, results: list[Result]) -> str:
    right = sum(not result.faults for result in results)
    kind = "one-shape" if objects == 1 else "two-shape"
    return f"{kind} prompts: {right} of {len(results)} right ({100 * share_right(results):.1f}%)"


if __name__ == "__main__":
    main()
