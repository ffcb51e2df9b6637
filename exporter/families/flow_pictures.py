"""What pipelines of flow matching (Stable Diffusion 3, FLUX.1) can be asked for besides making a
picture of a text. Three things are others than in `exporter.families.pictures`: pictures get the
model's own size, one picture is encoded once however many are made of it, and where the strength is
no whole number of steps, the step that it begins in is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from msgspec import structs

from exporter.families import Description, Graph, Offer
from exporter.families.pictures import as_trained, blended_inpainting, image_to_image
from exporter.families.text_to_image import Scaling, encoder_graph
from exporter.families.trained_tasks import Trained
from runtimes.errors import UnsupportedPipeline


def with_picture_tasks(
    pipe: Any,
    description: Description,
    trained: Callable[[Graph], Trained] | None = None,
) -> Description:
    """A description of text-to-image, with what else the pipeline can do, or does instead.

    Args:
        trained: what the transformer was trained for instead, with the VAE's encoder.

    Raises:
        UnsupportedPipeline: the transformer takes channels that nothing is known about.
    """
    encoder = encoder_graph(pipe.vae, Scaling.shifted(pipe.vae))
    made = trained(encoder) if trained and encoder else None
    _check_channels(pipe, description.latents.channels, made)
    if made is not None:
        return as_trained(description, replace(made, offer=_own(made.offer)))
    if encoder is None:
        return description
    offers = (image_to_image(encoder), blended_inpainting(encoder))
    return replace(description, offers=tuple(map(_own, offers)))


def _check_channels(pipe: Any, latents: int, trained: Trained | None) -> None:
    config = pipe.transformer.config
    given = config.out_channels or config.in_channels
    wanted = (latents + sum(trained.widths().values() if trained else ())) * (given // latents)
    if config.in_channels != wanted:
        raise UnsupportedPipeline(
            f"a {type(pipe.transformer).__name__} with {config.in_channels} input and {given} "
            f"output channels is not supported for {type(pipe).__name__}: expected {wanted} input "
            "channels"
        )


def _own(offer: Offer) -> Offer:
    """The offer of a UNet's pipeline as these have it."""
    runs = tuple(structs.replace(each, each=False) for each in offer.task.preparations)
    task = structs.replace(offer.task, preparations=runs, size_of=None, rounds="up")
    return replace(offer, task=task)
