"""FLUX.1, dev (guidance as an input) and schnell: CLIP's pooled state, T5's states, and a
transformer over patches of latents with rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from exporter.families import Description, Graph, Shifted, TextInput, calling
from exporter.families.defaults import longest_text
from exporter.families.flow_pictures import with_picture_tasks
from exporter.families.pictures import made_from_text
from exporter.families.text_to_image import (
    PROBE_GUIDANCE,
    decoder_graph,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from exporter.families.trained_tasks import filling
from exporter.families.transformer_parts import (
    joined,
    latents_of_transformer,
    t5_graph,
    with_module,
)
from exporter.families.unet_pipelines import text_length
from runtimes.manifest import Component, TensorSpec
from runtimes.version_1.fields import Argument, Branch, Embedding, Guidance, VectorInput
from runtimes.version_1.tasks import Task

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "denoiser": ("transformer",),
    "vae_decoder": ("vae",),
}
_SCALE = "guidance_scale"
_TRUE_SCALE = "true_cfg_scale"
_PATCH = 2
_SIDE = 128  # latents of the default size; the configuration does not say it
_MAX_SHIFT = 1.15  # of the pipeline, where its scheduler says none
_TIMESTEPS = 1000.0  # the pipeline divides them by it, the transformer multiplies


class PooledEncoder(torch.nn.Module):
    """input_ids [batch, length] → pooled_projections [batch, width], of a CLIPTextModel."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encoder(input_ids).pooler_output,)


class T5Encoder(torch.nn.Module):
    """input_ids_2 [batch, length] → encoder_hidden_states [batch, length, width]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids_2: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encoder(input_ids_2).last_hidden_state,)


class Rotary(torch.nn.Module):
    """Positions [tokens, axes] → cosines and sines [tokens, width], each twice in a row, as
    diffusers' `FluxPosEmbed`; in float32 instead of float64, which for positions of at most 128
    is right to 8e-6, and to twice that at twice as many."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        for axis, width in enumerate(embed.axes_dim):
            exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
            frequencies = (float(embed.theta) ** -exponents).float()
            self.register_buffer(f"axis_{axis}", frequencies, persistent=False)
        self.axes = len(embed.axes_dim)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axes = range(self.axes)
        angles = torch.cat(
            [positions[:, axis : axis + 1] * self.get_buffer(f"axis_{axis}") for axis in axes],
            dim=1,
        )
        twice = torch.stack([angles, angles], dim=-1).flatten(1)
        return twice.cos(), twice.sin()


class Denoiser(torch.nn.Module):
    """The transformer, with plain latents [batch, channels, height, width] on both sides.

    `guidance_scale` [batch, 1], where the transformer was distilled to take it.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = with_module(transformer, "pos_embed", Rotary(transformer.pos_embed))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        batch, channels, height, width = sample.shape
        rows, columns = height // _PATCH, width // _PATCH
        grid = sample.reshape(batch * channels, rows, _PATCH, columns, _PATCH)
        parts = grid.permute(0, 1, 3, 2, 4).reshape(batch, channels, rows * columns, -1)
        packed = parts.permute(0, 2, 1, 3).reshape(batch, rows * columns, -1)
        prediction = self.transformer(
            hidden_states=packed,
            timestep=timestep / _TIMESTEPS,
            guidance=None if guidance_scale is None else guidance_scale[:, 0],
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
            img_ids=_positions(rows, columns),
            return_dict=False,
        )[0]
        return (unpacked(prediction, sample),)


def _positions(rows: int, columns: int) -> torch.Tensor:
    """[rows * columns, 3]: 0, row, column."""
    row = torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, columns)
    column = torch.arange(columns, dtype=torch.float32)[None].expand(rows, -1)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(rows * columns, 3)


def unpacked(patches: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Patches [batch, tokens, 4 * channels] → [batch, channels, height, width] as of `sample`."""
    batch, tokens, width = patches.shape
    parts = patches.reshape(batch, tokens, width // _PATCH**2, _PATCH**2)
    return joined(parts.permute(0, 2, 1, 3), sample, _PATCH)


def _latents(held: torch.Tensor, named: Mapping[str, Any]) -> torch.Tensor:
    """What the pipeline's loop holds, as latents; its positions say how they are packed."""
    rows, columns = (int(last) + 1 for last in named["img_ids"].amax(dim=0)[1:])
    return unpacked(held, torch.empty(rows * _PATCH, columns * _PATCH, device="meta"))


def _true_guidance() -> Guidance:
    """By a negative text, beside the scale that the transformer is told; off without such a text,
    and by default."""
    return Guidance(
        branches=(
            Branch("negative", "negative_", "off", 1.0, {_TRUE_SCALE: -1.0}),
            Branch("positive", "", "empty", 0.0, {_TRUE_SCALE: 1.0}),
        ),
        single="positive",
        scale=_TRUE_SCALE,
        defaults={_TRUE_SCALE: 1.0},
    )


def describe(pipe: Any) -> Description:
    """See `exporter.families.Description`."""
    config = pipe.transformer.config
    length = text_length(pipe.tokenizer, pipe.text_encoder)
    width = pipe.text_encoder_2.config.d_model
    channels = (config.out_channels or config.in_channels) // (_PATCH * _PATCH)
    pooled = TensorSpec("float32", ("batch", pipe.text_encoder.config.hidden_size))
    text_encoder = Graph(
        Component(
            name="text_encoder",
            role="encoder",
            inputs={"input_ids": ids_spec(length)},
            outputs={"pooled_projections": pooled},
        ),
        PooledEncoder(pipe.text_encoder),
        pipe.text_encoder.config.vocab_size,
    )
    text_encoder_2 = t5_graph(
        T5Encoder(pipe.text_encoder_2),
        pipe.text_encoder_2,
        "text_encoder_2",
        "input_ids_2",
        "encoder_hidden_states",
        longest_text(pipe),
    )
    told = {_SCALE: TensorSpec("float32", ("batch", 1))} if config.guidance_embeds else {}
    sample = sample_spec(channels)
    denoiser = Graph(
        Component(
            name="denoiser",
            role="denoiser",
            inputs={
                "sample": sample,
                "timestep": timestep_spec(),
                **text_encoder_2.component.outputs,
                "pooled_projections": pooled,
                **told,
            },
            outputs={"prediction": sample},
        ),
        Denoiser(pipe.transformer),
    )
    factor, fills = vae_factor(pipe.vae), type(pipe).__name__ == "FluxFillPipeline"
    run = made_from_text(pipe)
    description = Description(
        task=Task("text-to-image"),
        graphs=(text_encoder, text_encoder_2, denoiser, decoder_graph(pipe.vae)),
        latents=latents_of_transformer(channels, _SIDE, factor, _PATCH, rounds=True),
        text_inputs=(
            TextInput("tokenizer", "input_ids", ("prompt",)),
            TextInput("tokenizer_2", "input_ids_2", ("prompt_2", "prompt"), longest_text(pipe)),
        ),
        arguments=(Argument(_SCALE, (1.0,)),) if told else (),
        vectors=(VectorInput(_SCALE, (_SCALE,)),) if told else (),
        guidance=_true_guidance(),
        resizable=True,
        denoiser=pipe.transformer,
        call=calling(run),
        probe_arguments={
            "prompt": "a large red circle above a small blue square",
            "prompt_2": "a flat drawing",
            **({_SCALE: PROBE_GUIDANCE} if told else {}),
        },
        embeddings=(
            Embedding("prompt_embeds", {"encoder_hidden_states": {"input_ids_2": width}}),
            Embedding("pooled_prompt_embeds", {"pooled_projections": {}}),
        ),
        view=_latents,
        timesteps=_TIMESTEPS,
        shifted=Shifted(_PATCH, _MAX_SHIFT),
    )
    return with_picture_tasks(pipe, description, partial(filling, factor=factor) if fills else None)
