"""FLUX.1, dev (guidance as an input) and schnell: CLIP's pooled state, T5's states, and a
transformer over patches of latents with rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from latentc.exporter.classes import class_of, of_class
from latentc.exporter.components.description import Description, Graph, Shifted, Tokens, calling
from latentc.exporter.components.tasks.flow_tasks import FLOW, tasks_of
from latentc.exporter.components.tasks.image_tasks import joined_graphs, with_inputs
from latentc.exporter.components.tasks.trained_tasks import filling
from latentc.exporter.components.text_to_image import (
    decoder_graph,
    feed_scale,
    ids_spec,
    sample_spec,
    scale_inputs,
    timestep_spec,
    vae_factor,
)
from latentc.exporter.components.transformers import (
    Rotary,
    latents_of_transformer,
    longest_text,
    packed,
    t5_graph,
    unpacked,
    with_module,
)
from latentc.exporter.components.unets import text_length
from latentc.exporter.programs.draft import Draft
from latentc.exporter.programs.sides import NEGATIVE, Side, sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.programs.statements import Push, Test

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "denoiser": ("transformer",),
    "vae_decoder": ("vae",),
}
_TRUE_SCALE = "true_cfg_scale"
_EMBEDS, _POOLED_EMBEDS = "prompt_embeds", "pooled_prompt_embeds"
_STATES, _POOLED = "encoder_hidden_states", "pooled_projections"
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
        rows, columns = (side // _PATCH for side in sample.shape[2:])
        prediction = self.transformer(
            hidden_states=packed(sample, _PATCH),
            timestep=timestep / _TIMESTEPS,
            guidance=None if guidance_scale is None else guidance_scale[:, 0],
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
            img_ids=_positions(rows, columns),
            return_dict=False,
        )[0]
        return (unpacked(prediction, sample, _PATCH),)


def _positions(rows: int, columns: int) -> torch.Tensor:
    """Return positions [rows * columns, 3]: 0, row, column."""
    row = torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, columns)
    column = torch.arange(columns, dtype=torch.float32)[None].expand(rows, -1)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(rows * columns, 3)


def _latents(held: torch.Tensor, named: Mapping[str, Any]) -> torch.Tensor:
    """Return what the pipeline's loop holds, as latents; its positions say how they are packed."""
    rows, columns = (int(last) + 1 for last in named["img_ids"].amax(dim=0)[1:])
    return unpacked(held, torch.empty(rows * _PATCH, columns * _PATCH, device="meta"), _PATCH)


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    config = pipe.transformer.config
    channels = (config.out_channels or config.in_channels) // (_PATCH * _PATCH)
    factor, fills = vae_factor(pipe.vae), type(pipe).__name__ == "FluxFillPipeline"
    trained = partial(filling, factor=factor, habits=FLOW) if fills else None
    tasks = tasks_of(pipe, channels, trained)
    latents = latents_of_transformer(channels, _SIDE, factor, _PATCH, rounds=True)
    drafts = [Draft(task.name, class_of(pipe, task.name), latents) for task in tasks]
    for draft, task in zip(drafts, tasks, strict=True):
        _guide(draft)
        for side in sides_of(draft, "off"):
            _write_texts(side)
        if config.guidance_embeds:
            feed_scale(draft)
        task.write(draft)
    clip, t5 = _clip(pipe), _t5(pipe)
    denoiser = with_inputs(_denoiser(pipe, channels, clip, t5), tasks[0])
    return Description(
        programs=tuple(draft.program() for draft in drafts),
        graphs=joined_graphs([clip, t5, denoiser, decoder_graph(pipe.vae)], tasks),
        tokens=(Tokens("tokenizer"), Tokens("tokenizer_2", longest_text(pipe))),
        denoiser=pipe.transformer,
        call=calling(of_class(pipe, tasks[0].name)),
        view=_latents,
        shifted=Shifted(_PATCH, _MAX_SHIFT),
    )


def _guide(draft: Draft) -> None:
    """Guide by a negative text, beside the scale that the transformer is told; off without such a
    text, and by default."""
    scale = draft.scale(_TRUE_SCALE, 1.0)
    texts = tuple(NEGATIVE + name for name in ("prompt", _EMBEDS, _POOLED_EMBEDS))
    when = (Test(argument=scale, above=1.0), Test(given=texts))
    draft.branch("negative", NEGATIVE, when, Push(branch="positive", by=scale, less=1.0))
    draft.branch("positive")


def _write_texts(side: Side) -> None:
    ids = side.tokens("input_ids", "tokenizer", "prompt")
    ids_2 = side.tokens("input_ids_2", "tokenizer_2", "prompt_2", "prompt")
    values = side.run("text_encoder", {"input_ids": ids}, {_POOLED: _POOLED_EMBEDS})
    values |= side.run("text_encoder_2", {"input_ids_2": ids_2}, {_STATES: _EMBEDS})
    for name, value in values.items():
        side.feed(name, value)


def _clip(pipe: Any) -> Graph:
    length = text_length(pipe.tokenizer, pipe.text_encoder)
    pooled = TensorSpec("float32", ("batch", pipe.text_encoder.config.hidden_size))
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={"input_ids": ids_spec(length)},
        outputs={_POOLED: pooled},
    )
    vocabulary = pipe.text_encoder.config.vocab_size
    return Graph(component, PooledEncoder(pipe.text_encoder), vocabulary)


def _t5(pipe: Any) -> Graph:
    encoder = pipe.text_encoder_2
    names = ("text_encoder_2", "input_ids_2", _STATES)
    return t5_graph(T5Encoder(encoder), encoder, *names, longest_text(pipe))


def _denoiser(pipe: Any, channels: int, clip: Graph, t5: Graph) -> Graph:
    sample = sample_spec(channels)
    inputs = {
        "sample": sample,
        "timestep": timestep_spec(),
        **t5.component.outputs,
        **clip.component.outputs,
        **scale_inputs(pipe.transformer.config.guidance_embeds),
    }
    component = Component("denoiser", "denoiser", inputs, {"prediction": sample})
    return Graph(component, Denoiser(pipe.transformer))
