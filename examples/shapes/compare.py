"""The judge's scores of a bundle's builds, beside those of PyTorch itself.

python -m examples.shapes.compare BUNDLE --help
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

import latentc
from latentc.benchmarks.shapes.captions import held_out_prompts
from latentc.benchmarks.shapes.judge import reasons
from latentc.benchmarks.shapes.scenes import Prompt
from latentc.runtimes.bundle.manifest import Manifest

from .evaluate import GUIDANCE, STEPS, evaluate

BATCH = 20


def first_seed(objects: int, seed: int) -> int:
    """Return the seed of the first image's noise, as `evaluate` chooses it."""
    return 1000 * objects + seed


def draw(pipe: latentc.Pipeline, prompts: list[Prompt], steps: int, seed: int) -> list[Image.Image]:
    """Return one image per prompt, each with a seed of its own."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc=pipe.build.name, unit="batch"):
        part = prompts[start : start + BATCH]
        result = pipe(
            [prompt.text for prompt in part],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            seed=[seed + start + i for i in range(len(part))],
        )
        images += list(result.images)
    return images


def score(images: list[Image.Image], prompts: list[Prompt]) -> float:
    """Return the percentage of the images with which the judge agrees."""
    right = sum(not reasons(image, prompt) for image, prompt in zip(images, prompts, strict=True))
    return 100 * right / len(prompts)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--build", "builds", multiple=True, help="[default: all but those for coreml]")
@click.option("--prompts", default=200, show_default=True, help="Half of one shape, half of two.")
@click.option("--steps", default=STEPS, show_default=True, help="Sampling steps.")
@click.option("--seed", default=0, show_default=True, help="Chooses the prompts and the noise.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the scores.")
def main(
    bundle: Path,
    builds: tuple[str, ...],
    prompts: int,
    steps: int,
    seed: int,
    json_path: Path | None,
) -> None:
    """Score a BUNDLE of the built-in model on held-out prompts, build by build.

    Each build runs on the backend that verified it. Core ML packages are evaluated by a slow
    reference on most systems: name such a build to wait for it.
    """
    manifest = Manifest.load(bundle)
    chosen = [
        build
        for build in manifest.builds
        if build.name in builds or (not builds and build.target != "coreml")
    ]
    asked = {objects: held_out_prompts(prompts // 2, objects, seed) for objects in (1, 2)}
    reference = DiffusionPipeline.from_pretrained(latentc.builtin_model())
    scores: dict[str, dict[int, float]] = {"diffusers": {}}
    for objects, part in asked.items():
        results = evaluate(reference, part, steps, GUIDANCE, first_seed(objects, seed))
        scores["diffusers"][objects] = score([result.image for result in results], part)
    for build in chosen:
        backend = build.verification.backend if build.verification else None
        with latentc.load(bundle, backend, build=build.name) as pipe:
            scores[build.name] = {
                objects: score(draw(pipe, part, steps, first_seed(objects, seed)), part)
                for objects, part in asked.items()
            }
    for name, found in scores.items():
        click.echo(f"{name:<16} one object {found[1]:5.1f}%   two objects {found[2]:5.1f}%")
    if json_path:
        json_path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
