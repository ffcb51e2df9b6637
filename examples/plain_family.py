"""A family for docs/extending.md: diffusers' PNDMPipeline, a UNet that makes pixels of noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latentc.exporter.classes import PipelineClass

if TYPE_CHECKING:
    from latentc.exporter.components.description import Description

# What is known of the class before a pipeline is loaded: its family is this module.
PNDM = PipelineClass(family=__name__, offers=())
# Each graph, and the subfolders of the source that it is made of.
COMPONENTS: Mapping[str, tuple[str, ...]] = {"denoiser": ("unet",), "decoder": ()}


def describe(pipe: Any) -> Description:
    """Return the graphs and the program of a loaded pipeline."""
    import torch

    from latentc.exporter.components.description import (
        Description,
        Graph,
        calling,
        latents_of_unet,
        size_multiple,
    )
    from latentc.exporter.components.text_to_image import sample_spec, timestep_spec
    from latentc.exporter.programs.draft import Draft
    from latentc.runtimes.bundle.structures import Component

    class Denoiser(torch.nn.Module):
        """sample [batch, channels, height, width] and timestep [batch] → the predicted noise."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = pipe.unet

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            prediction: torch.Tensor = self.unet(sample, timestep, return_dict=False)[0]
            return (prediction,)

    class Decoder(torch.nn.Module):
        """Pixels in [-1, 1] → an image in [0, 1]."""

        def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
            return (latents / 2 + 0.5,)

    pixels = sample_spec(pipe.unet.config.in_channels)
    asked = {"sample": pixels, "timestep": timestep_spec()}
    denoiser = Component("denoiser", "denoiser", asked, {"prediction": pixels})
    decoder = Component("decoder", "decoder", {"latents": pixels}, {"image": pixels})
    latents = latents_of_unet(pipe.unet, 1, size_multiple(pipe.unet))
    latents = latents_of_unet(pipe.unet, 1, size_multiple(pipe.unet))
    draft = Draft("unconditional", type(pipe), latents)
    draft.branch("image")
    draft.decoder = decoder.name
    return Description(
        programs=(draft.program(),),
        graphs=(Graph(denoiser, Denoiser()), Graph(decoder, Decoder())),
        tokens=(),
        denoiser=pipe.unet,
        call=calling(pipe),
        resizable=False,
        gives_latents=False,
    )
