"""This module reads what a pipeline folder says to latentc, in ``latentc.json``: its images' judge.

    {"judge": {"name": "shapes", "images": 50, "height": 64, "width": 64,
               "num_inference_steps": 10, "arguments": {"guidance_scale": 2.0}}}

The judge is an installed one (`latentc.runtimes.verification.judges`). The pipeline's own images
are judged at export, in PyTorch, and what it says of them is what each build is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from latentc.exporter.components.description import Description
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source.resolving import NOTES
from latentc.runtimes.bundle.structures import JudgeProbe, Schedule
from latentc.runtimes.errors import InputError, SourceError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.verification import judges

SEED = 100
_MAX_IMAGES = 10_000


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who judges, and images of which settings; height and width are in pixels."""

    name: str
    images: int
    height: int
    width: int
    num_inference_steps: int
    arguments: dict[str, str | int | float] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    judge: Judged | None = None


@parser(SourceError, "folder", "a pipeline with a latentc.json that can be read")
def read(folder: Path) -> Judged | None:
    """Return what the folder's file asks for; None without one.

    Raises:
        SourceError: not such a file, or a judge that is not installed.
    """
    path = folder / NOTES
    if not path.is_file():
        return None
    judged = msgspec.json.decode(read_regular(path, LARGEST_DOCUMENT), type=_File).judge
    if judged is None:
        return None
    numbers = (judged.images, judged.height, judged.width, judged.num_inference_steps)
    if min(numbers) < 1 or judged.images > _MAX_IMAGES:
        raise SourceError(f"{path}: expected positive numbers and at most {_MAX_IMAGES} images")
    try:
        judges.get(judged.name)
    except InputError as error:
        raise SourceError(f"{path}: {error}") from error
    return judged


def judge_probe(
    description: Description, asked: Judged, own: Schedule, told: Callable[[int], None]
) -> JudgeProbe:
    """Have the pipeline draw in PyTorch, and the judge look at it.

    Args:
        own: the pipeline's own schedule; the step count is the nearest that it has.
        told: called with the number of images so far.
    """
    import torch

    size = {"height": asked.height, "width": asked.width}
    steps = min(own.steps, key=lambda count: abs(count - asked.num_inference_steps))
    judge, done = judges.get(asked.name), 0
    prompts = tuple(judge.prompts(asked.images))

    def draw(prompts: list[str], seeds: list[int]) -> list[Any]:
        from diffusers.image_processor import VaeImageProcessor

        nonlocal done
        arrays = description.call(
            prompt=prompts,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **(size if description.resizable else {}),
            **asked.arguments,
        )
        done += len(prompts)
        told(done)
        images: list[Any] = VaeImageProcessor.numpy_to_pil(arrays)
        return images

    with torch.no_grad(), quiet_loading():
        right = judges.count_right(judge, prompts, SEED, draw)
    return JudgeProbe(
        asked.arguments,
        own.name,
        steps,
        SEED,
        **size,
        judge=asked.name,
        prompts=prompts,
        right=right,
    )
