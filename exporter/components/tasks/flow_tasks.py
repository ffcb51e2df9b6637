"""This module lists what pipelines of flow matching (Stable Diffusion 3, FLUX.1) can be asked for
besides making an image of a text. Three things are others than in
`latentc.exporter.components.tasks.image_tasks`: images get the model's own size, one image is
encoded once however many are made of it, and where the strength is no whole number of steps, the
step that it begins in is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latentc.exporter.classes import TEXT_TO_IMAGE, record_of
from latentc.exporter.components.description import Graph
from latentc.exporter.components.tasks.image_tasks import blended_inpainting, image_to_image
from latentc.exporter.components.tasks.task import Habits, Task
from latentc.exporter.components.text_to_image import Scaling, encoder_graph
from latentc.runtimes.errors import UnsupportedPipeline

FLOW = Habits(each_made=False, sized_by_image=False, rounds="up")


def tasks_of(
    pipe: Any, latents: int, trained: Callable[[Graph], Task] | None = None
) -> tuple[Task, ...]:
    """Return what a pipeline with a transformer can do, its own task first.

    Args:
        latents: the channels of the latents.
        trained: what the transformer was trained for instead, with the VAE's encoder.

    Raises:
        UnsupportedPipeline: the transformer takes channels that nothing is known about.
    """
    encoder = encoder_graph(pipe.vae, Scaling.shifted(pipe.vae))
    own = trained(encoder) if trained and encoder else Task(TEXT_TO_IMAGE)
    _check_channels(pipe, latents, own)
    if encoder is None or own.channels or not record_of(type(pipe).__name__).offers:
        return (own,)
    return (own, image_to_image(encoder, FLOW), blended_inpainting(encoder, FLOW))


def _check_channels(pipe: Any, latents: int, own: Task) -> None:
    config = pipe.transformer.config
    given = config.out_channels or config.in_channels
    wanted = (latents + sum(own.widths().values())) * (given // latents)
    if config.in_channels != wanted:
        raise UnsupportedPipeline(
            f"a {type(pipe.transformer).__name__} with {config.in_channels} input and {given} "
            f"output channels is not supported for {type(pipe).__name__}: expected {wanted} input "
            "channels"
        )
