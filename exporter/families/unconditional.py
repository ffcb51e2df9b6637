"""Unconditional generation in pixel space: UNet2DModel with DDPM or DDIM."""

from __future__ import annotations

from typing import Any

import torch

from exporter.families import Description, Graph, latents_of
from exporter.families.text_to_image import sample_spec
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Branch, Component, Guidance, TensorSpec
from runtimes.tasks import Task

COMPONENTS: dict[str, tuple[str, ...]] = {"denoiser": ("unet",), "decoder": ()}
_STEPS = {"DDPMPipeline": 1000, "DDIMPipeline": 50}


class Denoiser(torch.nn.Module):
    """The UNet alone."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.unet(sample, timestep, return_dict=False)[0],)


class Denormalise(torch.nn.Module):
    """Pixels in [-1, 1] → image in [0, 1]: the whole decoder of a pixel-space pipeline."""

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return ((latents / 2 + 0.5).clamp(0, 1),)


def describe(pipe: Any) -> Description:
    """See `exporter.families.Description`."""
    config = pipe.unet.config
    if config.out_channels != config.in_channels:
        raise UnsupportedPipeline("a UNet with learned variance is not supported yet")
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise UnsupportedPipeline("a class-conditional UNet2DModel is not supported yet")
    sample = sample_spec(config.in_channels)
    denoiser = Component(
        name="denoiser",
        role="denoiser",
        inputs={"sample": sample, "timestep": TensorSpec("float32", (1,))},
        outputs={"prediction": sample},
    )
    decoder = Component(
        name="decoder", role="decoder", inputs={"latents": sample}, outputs={"image": sample}
    )
    return Description(
        task=Task("unconditional"),
        graphs=(Graph(denoiser, Denoiser(pipe.unet)), Graph(decoder, Denormalise())),
        latents=latents_of(pipe.unet, 1),
        text_inputs=(),
        arguments=(),
        vectors=(),
        guidance=Guidance(branches=(Branch("image", "", "empty", 1.0),), single="image"),
        num_inference_steps=_STEPS[type(pipe).__name__],
        resizable=False,
        denoiser=pipe.unet,
        call=lambda **arguments: pipe(output_type="np", **arguments).images,
        probe_arguments={},
    )
