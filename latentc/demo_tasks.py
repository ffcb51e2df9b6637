"""The demo's second half: what else a bundle does. From an image, a part of one, a weighted word,
and a LoRA, each drawn by diffusers and by every backend, and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentc import builtin_lora
from latentc.runtimes.pipeline.pipeline import Pipeline

TASKS = ("image-to-image", "inpainting")
WEIGHTED = "a (red:8) blue circle"


@dataclass(frozen=True)
class Row:
    """One row of the grid: what stands beside it, what has to be seen in it, and by whom."""

    label: str
    shows: str
    judge: str = "shapes"


ROWS = (
    Row("from the first: a large blue square", "a large blue square"),
    Row("the third, its lower half: a red circle", "a blue square above a red circle"),
    Row(WEIGHTED, "a red circle"),
    Row("LoRA: a large red circle", "a large red circle", "hollow"),
)


def lower_half(width: int, height: int) -> Any:
    """A mask, as a Pillow image: white is made anew."""
    from PIL import Image

    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :] = 255
    return Image.fromarray(mask)


def from_bundle(
    pipe: Pipeline, styled: Pipeline, given: Sequence[Any], call: Mapping[str, Any]
) -> list[Any]:
    """An image for each row.

    Args:
        styled: of the bundle with the LoRA.
        given: images of "a large red circle" and "a blue square above a yellow star".
        call: steps, guidance scale and seed.
    """
    mask = lower_half(*given[1].size)
    results = [
        pipe(ROWS[0].shows, image=given[0], strength=0.8, **call),
        pipe(ROWS[1].shows, image=given[1], mask_image=mask, **call),
        pipe(WEIGHTED, prompt_weighting=True, **call),
        styled(ROWS[3].shows, **call),
    ]
    return [result.images[0] for result in results]


def from_diffusers(
    pipe: Any, embeds: Mapping[str, Any], given: Sequence[Any], call: Mapping[str, Any]
) -> list[Any]:
    """Return the same images from the diffusers pipelines.

    Args:
        embeds: the weighted prompt as `Pipeline.encode_prompt` gives it, since diffusers itself
            reads no weights.
    """
    import torch
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    settings = {name: value for name, value in call.items() if name != "seed"}
    mask = lower_half(*given[1].size)

    def draw(made: Any, *texts: str, **arguments: Any) -> Any:
        made.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(call["seed"])
        with torch.no_grad():
            return made(*texts, generator=generator, **arguments, **settings).images[0]

    redraw = AutoPipelineForImage2Image.from_pipe(pipe)
    inpaint = AutoPipelineForInpainting.from_pipe(pipe)
    images = [
        draw(redraw, ROWS[0].shows, image=given[0], strength=0.8),
        draw(inpaint, ROWS[1].shows, image=given[1], mask_image=mask),
        draw(pipe, **{name: torch.from_numpy(np.array(each)) for name, each in embeds.items()}),
    ]
    pipe.load_lora_weights(builtin_lora())
    images.append(draw(pipe, ROWS[3].shows))
    pipe.unload_lora_weights()
    return images


def right(images: Sequence[Any]) -> list[bool]:
    """Return whether each row's image shows what it should, by the judges."""
    from latentc.runtimes.verification import judges

    return [
        judges.get(row.judge).agrees(image, row.shows)
        for row, image in zip(ROWS, images, strict=True)
    ]


def styled_bundle(bundle: Path, targets: Sequence[str], steps: int, report: Any) -> None:
    """Export the built-in model with the built-in LoRA."""
    from latentc import builtin_model
    from latentc.exporter.compiler.export import export

    export(
        builtin_model(),
        bundle,
        targets=targets,
        lora=builtin_lora(),
        schedulers=(),
        steps=(6, steps),
        overwrite=True,
        report=report,
    )
