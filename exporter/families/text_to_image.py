"""Graph pieces that every latent text-to-image UNet pipeline shares."""

from __future__ import annotations

from typing import Any

import torch

from exporter.families import Graph
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Branch, Component, Guidance, TensorSpec

# Of the whole-loop check. Strong guidance in a few steps multiplies rounding: int8 weights, 2e-2
# off in one call of the built-in model, are 2e-1 off at the end at 7.5, as much as 7.0 would be.
# At 2 they stay 2e-2 off, and another seed or colour or no guidance is a 2e-1 that shows.
PROBE_GUIDANCE = 2.0


class Decoder(torch.nn.Module):
    """latents [batch, channels, height, width] → image [batch, 3, f*height, f*width] in [0, 1].

    Undoes the latent scaling (and shift, where the VAE has one) and the image normalisation,
    as diffusers' pipelines and their VaeImageProcessor do.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        scaled = latents / self.scaling_factor
        if self.shift:
            scaled = scaled + self.shift
        image = self.vae.decode(scaled, return_dict=False)[0]
        return ((image * 0.5 + 0.5).clamp(0, 1),)


def vae_factor(vae: Any) -> int:
    """Pixels per latent along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def decoder_graph(vae: Any) -> Graph:
    """The VAE decoder as a component."""
    if getattr(vae.config, "latents_mean", None) is not None:
        raise UnsupportedPipeline("VAEs with latents_mean and latents_std are not supported yet")
    factor = vae_factor(vae)
    return Graph(
        Component(
            name="vae_decoder",
            role="decoder",
            inputs={"latents": sample_spec(vae.config.latent_channels)},
            outputs={
                "image": TensorSpec("float32", ("batch", 3, f"{factor}*height", f"{factor}*width"))
            },
        ),
        Decoder(vae),
    )


def sample_spec(channels: int) -> TensorSpec:
    return TensorSpec("float32", ("batch", channels, "height", "width"))


def ids_spec(max_length: int) -> TensorSpec:
    return TensorSpec("int64", ("batch", max_length))


def classifier_free_guidance(scale: float, missing: Any) -> Guidance:
    """Ho and Salimans 2022: negative + scale * (positive - negative), in diffusers' batch order."""
    return Guidance(
        branches=(
            Branch("negative", "negative_", missing, 1.0, {"guidance_scale": -1.0}),
            Branch("positive", "", "empty", 0.0, {"guidance_scale": 1.0}),
        ),
        single="positive",
        scale="guidance_scale",
        defaults={"guidance_scale": scale},
    )


def check_unet(unet: Any) -> None:
    """Refuse what the graphs below would silently leave out."""
    config = unet.config
    if config.out_channels != config.in_channels:
        raise UnsupportedPipeline(
            f"a UNet with {config.in_channels} input and {config.out_channels} output channels "
            "(inpainting, depth, learned variance …) is not supported yet"
        )
    for option in ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if getattr(config, option, None) is not None:
            raise UnsupportedPipeline(f"a UNet with {option} is not supported yet")
