"""Graph pieces that every latent text-to-image UNet pipeline shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from latentc.exporter.components.description import Graph
from latentc.exporter.programs.draft import Draft
from latentc.exporter.programs.sides import NEGATIVE
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.programs.statements import Push, Test

SCALE = "guidance_scale"


class Scaling(torch.nn.Module):
    """Latents of the VAE → latents of the denoiser: (latents - mean) * factor / deviation. `undo`
    is the way back. Mean and deviation are [1, channels, 1, 1], or numbers."""

    mean: Any
    deviation: Any

    def __init__(self, factor: float, mean: Any = 0.0, deviation: Any = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.normalises = isinstance(mean, torch.Tensor)
        for name, value in (("mean", mean), ("deviation", deviation)):
            if self.normalises:
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    @classmethod
    def plain(cls, vae: Any) -> Scaling:
        """Return the scaling by the factor alone, as in Stable Diffusion's pipelines, whatever else
        the VAE says.
        """
        return cls(float(vae.config.scaling_factor))

    @classmethod
    def shifted(cls, vae: Any) -> Scaling:
        """Return the scaling with the shift, where the VAE has one."""
        shift = getattr(vae.config, "shift_factor", None)
        return cls(float(vae.config.scaling_factor), float(shift or 0.0))

    @classmethod
    def normalised(cls, vae: Any) -> Scaling:
        """Return the scaling with each channel's mean and deviation, where the VAE has both, as
        SDXL's.
        """
        moments = [getattr(vae.config, name, None) for name in ("latents_mean", "latents_std")]
        if None in moments:
            return cls.plain(vae)
        mean, deviation = (torch.tensor(each).float().view(1, -1, 1, 1) for each in moments)
        return cls(float(vae.config.scaling_factor), mean, deviation)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = (latents - self.mean) * self.factor
        return made / self.deviation if self.normalises else made

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = (
            latents * self.deviation if self.normalises else latents
        ) / self.factor
        return made + self.mean if self.normalises or self.mean else made


class Decoder(torch.nn.Module):
    """latents [batch, channels, height, width] → image [batch, 3, f*height, f*width], 0 to 1.

    Undoes the latent scaling and the image normalisation, as diffusers' pipelines and their
    VaeImageProcessor do. What is beyond 0 and 1 is limited by the runtime, after it has looked for
    NaN and infinity: OpenVINO's clamp makes 0 of NaN, and any engine's 1 of infinity.
    """

    def __init__(self, vae: Any, scaling: Scaling | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = scaling or Scaling.shifted(vae)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        scaled = self.scaling.undo(latents)
        image = self.vae.decode(scaled, return_dict=False)[0]
        return (image * 0.5 + 0.5,)


class Encoder(torch.nn.Module):
    """image [batch, 3, f*height, f*width] in [0, 1], noise → scaled latents: a draw from what the
    VAE's encoder says, with the noise that diffusers would draw. `Decoder` backwards."""

    def __init__(self, vae: Any, scaling: Scaling | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = scaling or Scaling.shifted(vae)

    def forward(
        self, image: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        found = self.vae.encode(image * 2.0 - 1.0, return_dict=False)[0]
        if noise is not None:
            latents = found.mean + found.std * noise
        else:
            latents = found if isinstance(found, torch.Tensor) else found.mode()
        return (self.scaling(latents),)


def encoder_graph(vae: Any, scaling: Scaling | None = None, draws: bool = True) -> Graph | None:
    """Return the VAE's encoder as a component.

    It is None where the encoder does not take images as the decoder gives them.

    Args:
        draws: draw from the distribution that it says, instead of taking its mode. Tiny
            autoencoders say none.
    """
    if vae.config.in_channels != vae.config.out_channels or _encoder_blocks(vae) != _blocks(vae):
        return None
    latents = sample_spec(vae.config.latent_channels)
    draws = draws and type(vae).__name__ != "AutoencoderTiny"
    inputs = {"image": image_spec(vae)} | ({"noise": latents} if draws else {})
    component = Component("vae_encoder", "image_encoder", inputs, {"latents": latents})
    return Graph(component, Encoder(vae, scaling))


def vae_factor(vae: Any) -> int:
    """Return the pixels per latent along a side."""
    return int(2 ** (_blocks(vae) - 1))


def _blocks(vae: Any) -> int:
    return len(vae.config.block_out_channels)


def _encoder_blocks(vae: Any) -> int:
    """Return the number of the encoder's blocks, which some classes let be another than the
    decoder's.
    """
    names = ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels")
    return len(next(vae.config[name] for name in names if name in vae.config))


def decoder_graph(vae: Any, scaling: Scaling | None = None) -> Graph:
    """Return the VAE decoder as a component."""
    return Graph(
        Component(
            name="vae_decoder",
            role="decoder",
            inputs={"latents": sample_spec(vae.config.latent_channels)},
            outputs={"image": image_spec(vae)},
        ),
        Decoder(vae, scaling),
    )


def image_spec(vae: Any) -> TensorSpec:
    factor = vae_factor(vae)
    return TensorSpec(
        "float32", ("batch", vae.config.out_channels, f"{factor}*height", f"{factor}*width")
    )


def sample_spec(channels: int) -> TensorSpec:
    return TensorSpec("float32", ("batch", channels, "height", "width"))


def timestep_spec() -> TensorSpec:
    """Return the form of the denoiser's timesteps: one for each row, so that calls that are at
    other steps can share a batch."""
    return TensorSpec("float32", ("batch",))


def ids_spec(max_length: int) -> TensorSpec:
    return TensorSpec("int64", ("batch", max_length))


def classifier_free_guidance(draft: Draft) -> None:
    """Guide by Ho and Salimans 2022, negative + scale * (positive - negative), in diffusers' batch
    order. The deviation of the positive branch can be given back to it (Lin et al. 2023)."""
    scale = draft.scale(SCALE, 1.0)
    draft.rescale = draft.scale("guidance_rescale", 0.0, least=0.0, most=1.0)
    guided_branches(draft, scale)


def guided_branches(draft: Draft, scale: str) -> None:
    """Add the branches of that guidance, where the argument `scale` is above 1."""
    when = (Test(argument=scale, above=1.0),)
    draft.branch("negative", NEGATIVE, when, Push(branch="positive", by=scale, less=1.0))
    draft.branch("positive")


class GuidanceEmbedding(torch.nn.Module):
    """guidance_scale [batch, 1] → [batch, width]: waves of the scale less one, for UNets that were
    distilled to take the guidance as an input (Luo et al. 2023, latent consistency models).

    As `get_guidance_scale_embedding` of diffusers' pipelines.
    """

    frequencies: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        step = torch.log(torch.tensor(10000.0)) / (half - 1)
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.odd = width % 2

    def forward(self, guidance_scale: torch.Tensor) -> torch.Tensor:
        waves = (guidance_scale - 1.0) * 1000.0 * self.frequencies
        made = torch.cat([torch.sin(waves), torch.cos(waves)], dim=1)
        return torch.nn.functional.pad(made, (0, 1)) if self.odd else made


class NoEmbedding(torch.nn.Module):
    """In the place of an embedding where the UNet has none."""

    def forward(self, guidance_scale: torch.Tensor | None) -> None:
        return None


def guidance_embedding(unet: Any) -> torch.nn.Module:
    """Return the module that makes the UNet's `timestep_cond` of the guidance scale."""
    width = unet.config.time_cond_proj_dim
    return NoEmbedding() if width is None else GuidanceEmbedding(width)


def distilled(unet: Any) -> bool:
    """Return whether a UNet takes the guidance scale as an input."""
    return unet.config.time_cond_proj_dim is not None


def scale_inputs(taken: bool) -> dict[str, TensorSpec]:
    """Return the denoiser's input for the guidance scale, where it takes it."""
    return {SCALE: TensorSpec("float32", ("batch", 1))} if taken else {}


def feed_numbers(draft: Draft, input: str, arguments: Sequence[str]) -> None:
    """Feed an input of the denoiser with arguments made of numbers, one after the other."""
    draft.feed(input, draft.row(f"_{input}", arguments))


def feed_scale(draft: Draft) -> None:
    """Feed the guidance scale."""
    feed_numbers(draft, SCALE, [draft.number(SCALE, (1.0,))])
