"""Wan 2.1 and 2.2, text to video: a UMT5 encoder, a transformer over patches of all frames with
rotary positions, and a VAE that makes one latent frame of four after the first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from latentc.exporter.components.description import Description, Graph, Tokens, calling
from latentc.exporter.components.text_to_image import (
    SCALE,
    classifier_free_guidance,
    ids_spec,
    timestep_spec,
)
from latentc.exporter.components.transformers import (
    MaskedT5Encoder,
    check_channels,
    longest_text,
    projected,
    unpatched,
    with_module_at,
)
from latentc.exporter.components.wan_video_decoder import clip_spec, video_decoder_graph
from latentc.exporter.programs.defaults import defaults_of
from latentc.exporter.programs.draft import DENOISER, Draft
from latentc.exporter.programs.sides import NEGATIVE, sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.programs.loops import LARGEST_TIMESTEP
from latentc.runtimes.programs.statements import Push, Switch, Symbol, Test, Window

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "denoiser": ("transformer",),
    "denoiser_2": ("transformer_2",),
    "vae_decoder": ("vae",),
}
TEXT_TO_VIDEO = "text-to-video"
RATE = 16.0  # frames in a second, of which the models were trained on videos
_STATES = "encoder_hidden_states"
_LATE, _LATE_SCALE = "denoiser_2", "guidance_scale_2"
_GRID = 16  # pixels: the pipeline takes no other sizes than multiples, whatever the VAE


class Rotary(torch.nn.Module):
    """latents [batch, channels, frames, height, width] → cosines and sines of each patch's place,
    [1, tokens, 1, head width / 2] each: those of diffusers' `WanRotaryPosEmbed`, which has each
    twice."""

    cosines: torch.Tensor
    sines: torch.Tensor

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.patch = rope.patch_size
        self.widths = tuple(width // 2 for width in (rope.t_dim, rope.h_dim, rope.w_dim))
        self.register_buffer("cosines", rope.freqs_cos[:, 0::2].clone(), persistent=False)
        self.register_buffer("sines", rope.freqs_sin[:, 1::2].clone(), persistent=False)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts = [size // by for size, by in zip(latents.shape[2:], self.patch, strict=True)]
        return self._of(self.cosines, counts), self._of(self.sines, counts)

    def _of(self, table: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return the rows of a table [places, width] for each axis, side by side."""
        parts = []
        for axis, part in enumerate(torch.split(table, [*self.widths], dim=1)):
            shape = [counts[axis] if each == axis else 1 for each in range(3)]
            parts.append(part[: counts[axis]].view(*shape, -1).expand(*counts, -1))
        return torch.cat(parts, dim=-1).reshape(1, counts[0] * counts[1] * counts[2], 1, -1)


class Attention(torch.nn.Module):
    """A `WanAttention` of diffusers as its `WanAttnProcessor` runs it, without writing into slices:
    pairs of numbers are turned by `Rotary`'s cosines and sines where there are any."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.inner = attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        own = self.inner
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = own.norm_q(own.to_q(hidden_states)), own.norm_k(own.to_k(states))
        parts = [each.unflatten(2, (own.heads, -1)) for each in (query, key, own.to_v(states))]
        if rotary_emb is not None:
            parts[:2] = [_turned(each, *rotary_emb) for each in parts[:2]]
        heads = [part.transpose(1, 2) for part in parts]
        made = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2, 3)
        result: torch.Tensor = own.to_out[0](made)
        return result


def _turned(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring numbers of [batch, tokens, heads, head width]."""
    first, second = torch.unflatten(states, -1, (-1, 2)).unbind(-1)
    turned = [first * cosines - second * sines, first * sines + second * cosines]
    return torch.stack(turned, dim=-1).flatten(-2)


class Denoiser(torch.nn.Module):
    """The transformer's prediction [batch, channels, frames, height, width]."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        made = with_module_at(transformer, "rope", Rotary(transformer.rope))
        for place, block in enumerate(transformer.blocks):
            for name in ("attn1", "attn2"):
                attention = Attention(getattr(block, name))
                made = with_module_at(made, f"blocks.{place}.{name}", attention)
        self.transformer = made
        self.patch = transformer.config.patch_size[-1]

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        patches = projected(
            self.transformer,
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
        )
        batch, _, frames, height, width = sample.shape
        tokens = (height // self.patch) * (width // self.patch)
        images = patches.reshape(batch * frames, tokens, patches.shape[-1])
        made = unpatched(images, sample, self.patch)
        return (made.reshape(batch, frames, -1, height, width).transpose(1, 2),)


class TextEncoder(torch.nn.Module):
    """input_ids [batch, length] → the last hidden state [batch, length, width] of a UMT5 encoder
    that attends to no padding, with zeros where there is padding."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.masked = MaskedT5Encoder(encoder)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        states, mask = self.masked(input_ids)
        return (torch.where(mask[..., None] > 0, states, torch.zeros_like(states)),)


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    _check(pipe)
    draft = Draft(TEXT_TO_VIDEO, type(pipe), _latents(pipe))
    draft.frames, draft.rate = _frames(pipe), RATE
    if pipe.transformer_2 is None:
        classifier_free_guidance(draft)
    else:
        _guide_in_two_parts(draft, _boundary(pipe))
    for side in sides_of(draft, "empty"):
        ids = side.tokens("input_ids", "tokenizer", "prompt")
        gives = side.run("text_encoder", {"input_ids": ids}, {_STATES: "prompt_embeds"})
        side.feed(_STATES, gives[_STATES])
    encoder = _text_encoder(pipe)
    return Description(
        programs=(draft.program(),),
        graphs=(encoder, *_denoisers(pipe, encoder), video_decoder_graph(pipe.vae)),
        tokens=(Tokens("tokenizer", longest_text(pipe), clean=True),),
        denoiser=pipe.transformer,
        call=calling(pipe),
    )


def _check(pipe: Any) -> None:
    """Refuse pipelines of another form. Raises UnsupportedPipeline."""
    if pipe.config.expand_timesteps:
        raise UnsupportedPipeline(
            "a WanPipeline with expand_timesteps, a timestep for each patch (Wan 2.2 5B), is not "
            "supported yet"
        )
    if pipe.transformer is None:
        raise UnsupportedPipeline("a WanPipeline without its transformer")
    if (pipe.transformer_2 is None) != (pipe.config.boundary_ratio is None):
        raise UnsupportedPipeline(
            "a WanPipeline with one of transformer_2 and boundary_ratio: expected both, or neither"
        )
    for transformer in _transformers(pipe):
        _check_transformer(transformer)


def _transformers(pipe: Any) -> list[Any]:
    """Return the transformer of early timesteps, and that of late ones where there is one."""
    return [each for each in (pipe.transformer, pipe.transformer_2) if each is not None]


def _check_transformer(transformer: Any) -> None:
    """Refuse a transformer of another form. Raises UnsupportedPipeline."""
    config = transformer.config
    check_channels(transformer, (config.in_channels,))
    if config.image_dim is not None or config.added_kv_proj_dim is not None:
        raise UnsupportedPipeline(
            "a WanTransformer3DModel that is given an image is not supported yet"
        )
    time, *sides = config.patch_size
    if time != 1 or len({*sides}) > 1:
        raise UnsupportedPipeline(
            f"a WanTransformer3DModel with patches of {config.patch_size}: expected one frame and "
            "squares"
        )


def _latents(pipe: Any) -> Latents:
    """Return the sizes of frames, which have as many patches along a side as there are positions
    at most."""
    config, factor = pipe.transformer.config, pipe.vae.config.scale_factor_spatial
    patch, usual = config.patch_size[-1], defaults_of(type(pipe))
    (height,), (width,) = usual["height"], usual["width"]
    return Latents(
        channels=config.in_channels,
        factor=factor,
        multiple=math.lcm(factor * patch, _GRID) // factor,
        default_height=int(height),
        default_width=int(width),
        maximum=_positions(pipe) * patch,
    )


def _positions(pipe: Any) -> int:
    """Return how many places along an axis the transformers have positions for."""
    return min(int(each.config.rope_max_seq_len) for each in _transformers(pipe))


def _frames(pipe: Any) -> Symbol:
    """Return the size that says how many frames a video has: one latent frame is one, and each
    after it some more."""
    every = pipe.vae.config.scale_factor_temporal
    (usual,) = defaults_of(type(pipe))["num_frames"]
    return Symbol(
        argument="num_frames",
        unit=every,
        offset=1 - every,
        default=(int(usual) - 1) // every + 1,
        most=_positions(pipe),
        rounds=True,
        nearest=True,
    )


def _text_encoder(pipe: Any) -> Graph:
    length, width = longest_text(pipe), pipe.text_encoder.config.d_model
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={"input_ids": ids_spec(length)},
        outputs={_STATES: TensorSpec("float32", ("batch", length, width))},
        positions={_STATES: {"input_ids": width}},
    )
    vocabulary = pipe.text_encoder.config.vocab_size
    return Graph(component, TextEncoder(pipe.text_encoder), vocabulary)


def _denoisers(pipe: Any, encoder: Graph) -> Iterator[Graph]:
    """Yield the graph of each transformer."""
    for name, transformer in zip((DENOISER, _LATE), _transformers(pipe), strict=False):
        sample = clip_spec(transformer.config.in_channels)
        inputs = {"sample": sample, "timestep": timestep_spec(), **encoder.component.outputs}
        component = Component(name, "denoiser", inputs, {"prediction": sample})
        yield Graph(component, Denoiser(transformer))


def _boundary(pipe: Any) -> float:
    """Return the timestep from which on the first transformer runs."""
    return float(pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps)


def _guide_in_two_parts(draft: Draft, boundary: float) -> None:
    """Guide as `classifier_free_guidance` does, in evaluations below a timestep by another scale
    and by another transformer."""
    scale = draft.scale(SCALE, 1.0)
    late_scale = draft.scale(_LATE_SCALE, 1.0, fallback=scale)
    draft.rescale = draft.scale("guidance_rescale", 0.0, least=0.0, most=1.0)
    early = Window(count="timestep", start=boundary, stop=LARGEST_TIMESTEP)
    late = Window(count="timestep", start=0.0, stop=boundary)
    when = (Test(argument=scale, above=1.0),)
    draft.branch(
        *("negative", NEGATIVE, when),
        Push(branch="positive", by=scale, less=1.0, during=early),
        Push(branch="positive", by=late_scale, less=1.0, during=late),
    )
    draft.branch("positive")
    draft.switches = (Switch(component=_LATE, during=late),)
