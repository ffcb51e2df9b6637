"""The decoder of Wan's VAE over a whole clip at once.

`AutoencoderKLWan` of diffusers decodes one latent frame after the other and keeps what its causal
convolutions need of those before. A causal convolution over the whole clip, with zeros before the
first frame, gives the same; only where the number of frames doubles is the first one taken apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from latentc.exporter.components.description import Graph
from latentc.exporter.components.transformers import with_module_at
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline


class Upsample(torch.nn.Module):
    """Frames [batch, channels, frames, height, width] → twice as high and wide, and where
    `WanResample` of diffusers has a convolution over time, 2 * frames - 1 of them.

    That convolution makes two frames of each, with zeros in the place of the first frame and of all
    before it; the first frame itself stays one, as it is.
    """

    def __init__(self, resample: Any) -> None:
        super().__init__()
        self.convolution = resample.resample[1]
        self.time_conv = resample.time_conv if resample.mode == "upsample3d" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.time_conv is not None:
            x = self._doubled(x, self.time_conv)
        batch, channels, frames, height, width = x.shape
        images = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)
        # "nearest-exact", as there, is the same for twice the size.
        images = self.convolution(functional.interpolate(images, scale_factor=2.0, mode="nearest"))
        made: torch.Tensor = images.reshape(batch, frames, images.shape[1], 2 * height, 2 * width)
        return made.permute(0, 2, 1, 3, 4)

    def _doubled(self, x: torch.Tensor, time_conv: Any) -> torch.Tensor:
        batch, channels, frames, height, width = x.shape
        first = (torch.arange(frames, device=x.device) == 0).view(1, 1, frames, 1, 1)
        halves = time_conv(torch.where(first, torch.zeros_like(x), x))
        earlier, later = halves[:, :channels], torch.where(first, x, halves[:, channels:])
        pairs = torch.stack([earlier.flatten(3), later.flatten(3)], dim=3)
        doubled = pairs.reshape(batch, channels, 2 * frames, height, width)
        return doubled[:, :, 1:]


class VideoDecoder(torch.nn.Module):
    """latents [batch, channels, frames, height, width] → frames
    [batch, 4 * frames - 3, 3, 8 * height, 8 * width], 0 to 1: the VAE's own factors.

    Undoes the latents' normalisation and that of the images, as `WanPipeline` and its
    `VideoProcessor` do. What is beyond 0 and 1 is limited by the runtime, after it has looked for
    NaN and infinity.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = _over_clips(vae.decoder)
        for name, entry in (("mean", "latents_mean"), ("deviation", "latents_std")):
            values = torch.tensor(vae.config[entry]).float().view(1, -1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        scaled = latents / (1.0 / self.deviation) + self.mean
        video = self.decoder(self.post_quant_conv(scaled))
        return (video.permute(0, 2, 1, 3, 4) * 0.5 + 0.5,)


def _over_clips(decoder: Any) -> Any:
    """Return a `WanDecoder3d` that takes all frames at once, weights shared."""
    made = decoder
    for place, block in enumerate(decoder.up_blocks):
        if block.upsamplers is not None:
            upsample = Upsample(block.upsamplers[0])
            made = with_module_at(made, f"up_blocks.{place}.upsamplers.0", upsample)
    return made


def video_decoder_graph(vae: Any) -> Graph:
    """Return the decoder of an `AutoencoderKLWan` as a component.

    Raises:
        UnsupportedPipeline: a decoder of another form.
    """
    config = vae.config
    if config.is_residual or config.patch_size is not None:
        raise UnsupportedPipeline(
            "an AutoencoderKLWan with is_residual or a patch_size (Wan 2.2 5B) is not supported yet"
        )
    every, side = config.scale_factor_temporal, config.scale_factor_spatial
    doubles = 2 ** sum(config.temperal_downsample), 2 ** (len(config.dim_mult) - 1)
    if (every, side) != doubles:
        raise UnsupportedPipeline(
            f"an AutoencoderKLWan that says a scale_factor_temporal of {every} and a "
            f"scale_factor_spatial of {side}, and whose layers are made for {doubles[0]} and "
            f"{doubles[1]}"
        )
    frames = f"{every}*frames-{every - 1}" if every > 1 else "frames"
    shape = ("batch", frames, config.out_channels, f"{side}*height", f"{side}*width")
    component = Component(
        name="vae_decoder",
        role="decoder",
        inputs={"latents": clip_spec(config.z_dim)},
        outputs={"frames": TensorSpec("float32", shape)},
    )
    return Graph(component, VideoDecoder(vae))


def clip_spec(channels: int) -> TensorSpec:
    """Return the form of the latents of a video."""
    return TensorSpec("float32", ("batch", channels, "frames", "height", "width"))
