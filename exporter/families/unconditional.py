"""Unconditional generation in pixel space: UNet2DModel with DDPM or DDIM."""

from __future__ import annotations

from typing import Any

import torch
from msgspec import structs

from latentc.exporter.components.description import (
    Description,
    Graph,
    calling,
    latents_of_unet,
    size_multiple,
)
from latentc.exporter.components.learned_variance import VARIANCE, learns_variance
from latentc.exporter.components.text_to_image import sample_spec, timestep_spec
from latentc.exporter.programs.draft import Draft
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import UnsupportedPipeline

COMPONENTS: dict[str, tuple[str, ...]] = {"denoiser": ("unet",), "decoder": ()}


_VARIANCE = "variance"


class Denoiser(torch.nn.Module):
    """The UNet alone. One that has learned a vector for each timestep looks it up by its number;
    one that has learned the variance of noise gives it besides."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.looks_up = unet.config.time_embedding_type == "learned"
        self.channels = unet.config.in_channels
        self.says_variance = unet.config.out_channels > self.channels

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.looks_up:
            timestep = timestep.to(torch.int64)
        made = self.unet(sample, timestep, return_dict=False)[0]
        return made.split(self.channels, dim=1) if self.says_variance else (made,)


class Denormalise(torch.nn.Module):
    """Pixels in [-1, 1] → image, 0 to 1: the whole decoder of a pixel-space pipeline. It limits
    nothing, as `latentc.exporter.components.text_to_image.Decoder`."""

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (latents / 2 + 0.5,)


def _check_channels(pipe: Any) -> None:
    """Refuse a UNet that gives more than its scheduler knows what to do with.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    config, scheduler = pipe.unet.config, pipe.scheduler
    given, made = config.in_channels, config.out_channels
    learned = scheduler.config.get(VARIANCE) == "learned_range"
    if made != (2 * given if learned else given) or (learned and not learns_variance(scheduler)):
        kind = scheduler.config.get(VARIANCE)
        raise UnsupportedPipeline(
            f"a UNet with {given} input and {made} output channels does not fit a "
            f"{type(scheduler).__name__} with the {VARIANCE} {kind!r}: one that predicts the "
            "variance of noise has twice as many as it takes, and a DDPMScheduler with "
            "'learned_range'; diffusers cannot run it otherwise either"
        )


def _check_timesteps(pipe: Any) -> None:
    """Refuse a scheduler whose timesteps the UNet has learned no vector for.

    Raises:
        UnsupportedPipeline: it has more; PyTorch ends in an IndexError there, engines take zeros.
    """
    if pipe.unet.config.time_embedding_type != "learned":
        return
    rows, timesteps = pipe.unet.time_proj.num_embeddings, pipe.scheduler.config.num_train_timesteps
    if timesteps > rows:
        raise UnsupportedPipeline(
            f"the scheduler counts {timesteps} timesteps and the UNet has learned {rows} of them: "
            "diffusers cannot run it either; set num_train_timesteps to the model's"
        )


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    config = pipe.unet.config
    _check_channels(pipe)
    if pipe.unet.class_embedding is not None:
        named = "num_class_embeds" if config.class_embed_type is None else "class_embed_type"
        raise UnsupportedPipeline(
            f"a UNet2DModel with {named} {config[named]!r} takes class labels, and "
            f"{type(pipe).__name__} has none to give: diffusers cannot run it either"
        )
    _check_timesteps(pipe)
    says_variance = config.out_channels > config.in_channels
    sample = sample_spec(config.in_channels)
    denoiser = Component(
        name="denoiser",
        role="denoiser",
        inputs={"sample": sample, "timestep": timestep_spec()},
        outputs={"prediction": sample} | ({_VARIANCE: sample} if says_variance else {}),
    )
    decoder = Component(
        name="decoder", role="decoder", inputs={"latents": sample}, outputs={"image": sample}
    )
    latents = latents_of_unet(pipe.unet, 1, size_multiple(pipe.unet))
    latents = structs.replace(latents, channels=config.in_channels)
    draft = Draft("unconditional", type(pipe), latents)
    draft.branch("image")
    draft.variance = _VARIANCE if says_variance else None
    draft.decoder = decoder.name
    return Description(
        programs=(draft.program(),),
        graphs=(Graph(denoiser, Denoiser(pipe.unet)), Graph(decoder, Denormalise())),
        tokens=(),
        denoiser=pipe.unet,
        call=calling(pipe),
        resizable=False,
        gives_latents=False,
    )
