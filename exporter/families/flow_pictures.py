"""What pipelines of flow matching (Stable Diffusion 3, FLUX.1) can be asked for besides making a
picture of a text. Three things are others than in `exporter.families.pictures`: pictures get the
model's own size, one picture is encoded once however many are made of it, and where the strength is
no whole number of steps, the step that it begins in is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporter.families import Description, Graph, Offer
from exporter.families.pictures import IMAGE_TO_IMAGE
from exporter.families.text_to_image import Scaling, encoder_graph
from exporter.families.trained_tasks import IMAGE
from runtimes.tasks import START, Feed, Preparation, Task

_STRENGTH = 0.6  # of the pipelines' calls


def with_picture_tasks(
    pipe: Any, description: Description, defaults: Mapping[str, tuple[float, ...]] | None = None
) -> Description:
    """A description of text-to-image, with what else the pipeline can do.

    Args:
        defaults: of arguments, where calls with a picture have others.
    """
    encoder = encoder_graph(pipe.vae, Scaling.shifted(pipe.vae))
    if encoder is None:
        return description
    return replace(description, offers=(_image_to_image(encoder, dict(defaults or {})),))


def _image_to_image(encoder: Graph, defaults: dict[str, tuple[float, ...]]) -> Offer:
    start = Preparation(encoder.component.name, {"image": Feed(IMAGE)}, {"latents": START})
    task = Task(
        IMAGE_TO_IMAGE,
        {IMAGE: "image"},
        (start,),
        strength=_STRENGTH,
        rounds="up",
        defaults=defaults,
    )
    return Offer(task, (encoder,))
