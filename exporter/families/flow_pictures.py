"""What pipelines of flow matching (Stable Diffusion 3, FLUX.1) can be asked for besides making a
picture of a text. Three things are others than in `exporter.families.pictures`: pictures get the
model's own size, one picture is encoded once however many are made of it, and where the strength is
no whole number of steps, the step that it begins in is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from msgspec import structs

from exporter.families import Description, Offer
from exporter.families.pictures import blended_inpainting, image_to_image
from exporter.families.text_to_image import Scaling, encoder_graph

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
    offers = (image_to_image(encoder, _STRENGTH), blended_inpainting(encoder, _STRENGTH))
    return replace(description, offers=tuple(_own(each, dict(defaults or {})) for each in offers))


def _own(offer: Offer, defaults: dict[str, tuple[float, ...]]) -> Offer:
    """The offer of a UNet's pipeline as these have it."""
    runs = tuple(structs.replace(each, each=False) for each in offer.task.preparations)
    task = structs.replace(
        offer.task, preparations=runs, size_of=None, rounds="up", defaults=defaults
    )
    return replace(offer, task=task)
