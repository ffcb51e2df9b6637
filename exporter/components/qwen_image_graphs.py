"""The graphs of Qwen-Image (https://arxiv.org/abs/2508.02324): a language model that reads a text
in a template, a transformer over patches of latents and over texts with their masks, guidance that
keeps the length of each patch, and a VAE of videos that decodes one frame."""

from __future__ import annotations

import copy
from typing import Any

import torch

from latentc.exporter.components.transformers import Rotary, packed, unpacked, with_module

PATCH = 2
_LEAST_NORM = 1e-12  # of `torch.nn.functional.normalize`
_TIMESTEPS = 1000.0  # the pipeline divides them by it, the transformer multiplies


class TextEncoder(torch.nn.Module):
    """input_ids int64 [batch, skipped + sequence] → encoder_hidden_states float32 [batch, sequence,
    width], the last states behind the first `skipped` ids, with zeros where a text is filled up,
    and encoder_hidden_states_mask float32 [batch, sequence], which is 1 where it is not.

    Ids are of the language model alone. A text is filled up at its end, where no id before looks.
    """

    def __init__(self, encoder: Any, padding: int, skipped: int) -> None:
        super().__init__()
        self.model = encoder.model.language_model
        self.padding = padding
        self.skipped = skipped

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        # The id that fills up may stand in a text as well: what counts is the last other one.
        places = torch.arange(input_ids.shape[1])
        last = torch.where(input_ids != self.padding, places, -1).amax(dim=1, keepdim=True)
        mask = (places <= last).to(torch.float32)[:, self.skipped :]
        return states[:, self.skipped :] * mask[:, :, None], mask


class Positions(torch.nn.Module):
    """The sizes of a grid of patches and the length of a text → cosines and sines of both, in the
    place of diffusers' `QwenEmbedRope`, whose numbers are complex.

    Rows and columns count from the centre; a text begins behind the last of both, on all axes.
    """

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.rotary = Rotary(embed)

    def forward(
        self, sizes: Any, max_txt_seq_len: int, device: torch.device | None = None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        _, rows, columns = sizes[0][0]
        row, column = _centred(rows), _centred(columns)
        high, wide = row[:, None].expand(-1, columns), column[None].expand(rows, -1)
        grid = torch.stack([torch.zeros_like(high), high, wide], dim=-1)
        first = torch.maximum(row[-1:], column[-1:]) + 1
        words = first + torch.arange(max_txt_seq_len, dtype=torch.float32)
        texts = words[:, None].expand(-1, 3)
        return self.rotary(grid.reshape(rows * columns, 3)), self.rotary(texts)


def _centred(count: int) -> torch.Tensor:
    """Return the places along a side, float32 [count]: 0 is the first of the second half, which is
    the shorter one of an odd number."""
    return torch.arange(count, dtype=torch.float32) - (count - count // 2)


class JointAttention(torch.nn.Module):
    """An attention of a block, as diffusers' `QwenDoubleStreamAttnProcessor2_0` runs it, in real
    numbers: patches and texts attend to both, but for what fills texts up."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: None,
        image_rotary_emb: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        text_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attn, patches, texts = self.attention, hidden_states, encoder_hidden_states
        of_patches, of_texts = image_rotary_emb
        length = texts.shape[1]
        query, key, value = (
            torch.cat(pair, dim=2)
            for pair in zip(
                _heads(attn, texts, of_texts, "add_{}_proj", "norm_added_{}"),
                _heads(attn, patches, of_patches, "to_{}", "norm_{}"),
                strict=True,
            )
        )
        seen = torch.ones(patches.shape[:2], dtype=torch.bool)
        mask = torch.cat([text_mask, seen], dim=1)[:, None, None, :]
        joint = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        both = joint.transpose(1, 2).flatten(2)
        return attn.to_out[0](both[:, length:]), attn.to_add_out(both[:, :length])


def _heads(
    attn: Any,
    states: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    projection: str,
    norm: str,
) -> list[torch.Tensor]:
    """Return query, key and value [batch, heads, tokens, width] of states [batch, tokens, …]."""
    made = []
    for name in ("q", "k", "v"):
        projected: torch.Tensor = getattr(attn, projection.format(name))(states)
        heads = projected.reshape(*states.shape[:2], attn.heads, -1)
        if name != "v":
            normalized = getattr(attn, norm.format(name))(heads)
            heads = _rotated(normalized, *rotation)
        made.append(heads.transpose(1, 2))
    return made


def _rotated(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Return [batch, tokens, heads, width] with each pair of numbers turned by its angle."""
    real, imaginary = states.reshape(*states.shape[:3], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return states * cosines[:, None] + turned * sines[:, None]


class Denoiser(torch.nn.Module):
    """sample [batch, channels, height, width], timestep [batch], encoder_hidden_states [batch,
    sequence, width] and encoder_hidden_states_mask [batch, sequence], all float32 → what the
    transformer predicts, in the form of the sample."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        made = with_module(transformer, "pos_embed", Positions(transformer.pos_embed))
        blocks = [
            with_module(block, "attn", JointAttention(block.attn))
            for block in transformer.transformer_blocks
        ]
        self.transformer = with_module(made, "transformer_blocks", torch.nn.ModuleList(blocks))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        rows, columns = (side // PATCH for side in sample.shape[2:])
        prediction = self.transformer(
            hidden_states=packed(sample, PATCH),
            timestep=timestep / _TIMESTEPS,
            encoder_hidden_states=encoder_hidden_states,
            # The transformer's own argument would fix the length of texts in a graph.
            attention_kwargs={"text_mask": encoder_hidden_states_mask > 0},
            img_shapes=[[(1, rows, columns)]],
            return_dict=False,
        )[0]
        return (unpacked(prediction, sample, PATCH),)


class Combiner(torch.nn.Module):
    """positive and guided predictions [batch, channels, height, width] → the guided one, of which
    each patch is as long as that of the positive one."""

    def forward(self, positive: torch.Tensor, guided: torch.Tensor) -> tuple[torch.Tensor]:
        ratio = (_mean_squares(positive) / _mean_squares(guided)).sqrt()
        return (guided * torch.nn.functional.interpolate(ratio, scale_factor=float(PATCH)),)


def _mean_squares(prediction: torch.Tensor) -> torch.Tensor:
    """Return the mean of the squares of each patch's numbers, [batch, 1, rows, columns]."""
    batch, _, height, width = prediction.shape
    squares = prediction.square().mean(dim=1)
    grid = squares.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.mean(dim=(2, 4))[:, None]


class FrameDecoder(torch.nn.Module):
    """The decoder of an `AutoencoderKLQwenImage` for one frame: latents [batch, channels, height,
    width] → image [batch, 3, f*height, f*width], from -1 to 1 or somewhat beyond.

    Causal convolutions see zeros before the first frame, so that of their weights the last ones in
    time alone count; and nothing is made longer in time.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.first = _of_one_frame(vae.post_quant_conv)
        self.decoder = _of_one_frame(vae.decoder)

    def decode(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """Return the image, as VAEs of images do."""
        return (self.decoder(self.first(latents)),)


class _FrameNorm(torch.nn.Module):
    """A `QwenImageRMS_norm` of one frame, in the form that passes and targets know: by the root of
    the mean of squares over the channels."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        channels = norm.gamma.numel()
        weight = norm.gamma.detach().reshape(channels, 1, 1)
        self.gamma = torch.nn.Parameter(weight, requires_grad=False)
        self.least = _LEAST_NORM / channels**0.5

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        root = states.square().mean(dim=1, keepdim=True).sqrt()
        return states / root.clamp_min(self.least) * self.gamma


class _FrameAttention(torch.nn.Module):
    """A `QwenImageAttentionBlock` of one frame."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.norm = _FrameNorm(attention.norm)
        self.to_qkv = attention.to_qkv
        self.proj = attention.proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        joint = self.to_qkv(self.norm(states)).flatten(2).transpose(1, 2)[:, None]
        query, key, value = joint.chunk(3, dim=-1)
        seen = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        image = seen[:, 0].transpose(1, 2).reshape(states.shape)
        return states + self.proj(image)  # type: ignore[no-any-return]


def _of_one_frame(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a part of the VAE that takes and gives [batch, channels, height, width]."""
    kind = type(module).__name__
    if kind == "QwenImageCausalConv3d":
        return _flat_convolution(module)
    if kind == "QwenImageAttentionBlock":
        return _FrameAttention(module)
    if kind == "QwenImageRMS_norm":
        return _FrameNorm(module)
    if kind == "QwenImageUpsample":
        # For a whole factor "nearest" takes the same numbers as "nearest-exact", which makes places
        # in an image, of the size that a graph was captured at.
        return torch.nn.Upsample(scale_factor=2.0, mode="nearest")
    if kind == "QwenImageResample":
        return _of_one_frame(module.resample)  # type: ignore[arg-type]
    made = copy.copy(module)
    made._modules = {
        name: part if part is None else _of_one_frame(part)
        for name, part in module._modules.items()
    }
    return made


def _flat_convolution(convolution: Any) -> torch.nn.Conv2d:
    """Return the convolution of one frame: the last weights in time."""
    left, _, top, *_ = convolution._padding
    flat = torch.nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size[1:],
        padding=(top, left),
        device="meta",
    )
    weight = convolution.weight.detach()[:, :, -1].contiguous()
    flat.weight = torch.nn.Parameter(weight, requires_grad=False)
    flat.bias = convolution.bias
    return flat
