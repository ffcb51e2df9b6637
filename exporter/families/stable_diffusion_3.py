"""Stable Diffusion 3 and 3.5: two CLIP encoders and a T5 encoder, which may be left out, and a
transformer over their joined states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from latentc.exporter.classes import class_of, of_class
from latentc.exporter.components.description import Description, Graph, Shifted, Tokens, calling
from latentc.exporter.components.tasks.flow_tasks import FLOW, tasks_of
from latentc.exporter.components.tasks.image_tasks import joined_graphs, with_inputs
from latentc.exporter.components.tasks.trained_tasks import inpainting
from latentc.exporter.components.text_to_image import (
    classifier_free_guidance,
    decoder_graph,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from latentc.exporter.components.transformers import (
    latents_of_transformer,
    longest_text,
    projected,
    t5_graph,
    unpatched,
)
from latentc.exporter.components.unets import text_length
from latentc.exporter.programs.draft import Draft
from latentc.exporter.programs.sides import Side, sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.programs import statements as form

COMPONENTS = {
    "text_encoder": ("text_encoder", "text_encoder_2"),
    "text_encoder_3": ("text_encoder_3",),
    "denoiser": ("transformer",),
    "vae_decoder": ("vae",),
}
_MAX_SHIFT = 1.16  # of the pipeline, where its scheduler says none
_CLIP, _T5, _POOLED = "clip_hidden_states", "t5_hidden_states", "pooled_projections"


class TextEncoders(torch.nn.Module):
    """Two id tensors [batch, length] → joined penultimate hidden states
    [batch, length, width_1 + width_2], of them at most `width` numbers, and joined pooled
    projections."""

    def __init__(self, first: Any, second: Any, width: int) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.width = width

    def forward(
        self, input_ids: torch.Tensor, input_ids_2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        one = self.first(input_ids, output_hidden_states=True)
        two = self.second(input_ids_2, output_hidden_states=True)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        return states[..., : self.width], torch.cat([one[0], two[0]], dim=-1)


class T5Encoder(torch.nn.Module):
    """input_ids_3 [batch, length] → t5_hidden_states [batch, length, width]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids_3: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encoder(input_ids_3).last_hidden_state,)


class Denoiser(torch.nn.Module):
    """The transformer. CLIP's states are filled up with zeros to T5's width and T5's follow them;
    zeros stand for them where the pipeline has no T5."""

    def __init__(self, transformer: Any, t5_length: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.t5_length = t5_length
        self.width = transformer.config.joint_attention_dim
        self.patch = transformer.config.patch_size

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        clip_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        t5_hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        missing = self.width - clip_hidden_states.shape[-1]
        length = self.t5_length if t5_hidden_states is None else 0
        states = torch.nn.functional.pad(clip_hidden_states, (0, missing, 0, length))
        if t5_hidden_states is not None:
            states = torch.cat([states, t5_hidden_states], dim=1)
        patches = projected(
            self.transformer,
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=states,
            pooled_projections=pooled_projections,
        )
        return (unpatched(patches, sample, self.patch),)


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    config = pipe.transformer.config
    channels = config.out_channels or config.in_channels
    encoders = [_clip(pipe), *([_t5(pipe)] if pipe.text_encoder_3 is not None else [])]
    masks = type(pipe).__name__ == "StableDiffusion3InpaintPipeline" and (
        config.in_channels != channels
    )
    tasks = tasks_of(pipe, channels, partial(inpainting, habits=FLOW) if masks else None)
    latents = latents_of_transformer(
        channels,
        config.sample_size,
        vae_factor(pipe.vae),
        config.patch_size,
        # Positions are cut out of the middle of a table.
        maximum=config.pos_embed_max_size * config.patch_size,
    )
    components = [encoder.component for encoder in encoders]
    frame = _length(pipe) + longest_text(pipe), config.joint_attention_dim
    drafts = [Draft(task.name, class_of(pipe, task.name), latents) for task in tasks]
    for draft, task in zip(drafts, tasks, strict=True):
        classifier_free_guidance(draft)
        for side in sides_of(draft, "empty"):
            _write_texts(side, components, frame)
        task.write(draft)
    denoiser = with_inputs(_denoiser(pipe, channels, components), tasks[0])
    return Description(
        programs=tuple(draft.program() for draft in drafts),
        graphs=joined_graphs([*encoders, denoiser, decoder_graph(pipe.vae)], tasks),
        tokens=_tokens(pipe),
        denoiser=pipe.transformer,
        call=calling(_inpainted(pipe) if masks else of_class(pipe, tasks[0].name)),
        shifted=Shifted(config.patch_size, _MAX_SHIFT),
    )


def _write_texts(side: Side, encoders: Sequence[Component], frame: tuple[int, int]) -> None:
    """Write that one array has CLIP's states and T5's below them, as `Denoiser` joins them.

    Without T5 there are zeros in its place.

    Args:
        frame: its positions, and how many numbers each has.
    """
    inputs = [name for encoder in encoders for name in encoder.inputs]
    texts: dict[str, tuple[str, ...]] = {"input_ids": ("prompt",)}
    texts |= {f"input_ids_{n}": (f"prompt_{n}", "prompt") for n in (2, 3)}
    tokenizers = {name: name.replace("input_ids", "tokenizer") for name in inputs}
    ids = {name: side.tokens(name, tokenizers[name], *texts[name]) for name in inputs}
    values: dict[str, str] = {}
    for encoder in encoders:
        gives = dict.fromkeys(encoder.outputs) | (
            {_POOLED: "pooled_prompt_embeds"} if _POOLED in encoder.outputs else {}
        )
        values |= side.run(encoder.name, {name: ids[name] for name in encoder.inputs}, gives)
    side.feed(_POOLED, values.pop(_POOLED))
    specs = {name: spec for each in encoders for name, spec in each.outputs.items()}
    sizes = {name: (int(specs[name].shape[1]), int(specs[name].shape[2])) for name in values}
    for name, part in _framed(side, values, sizes, frame).items():
        side.feed(name, part)


def _framed(
    side: Side,
    values: dict[str, str],
    sizes: dict[str, tuple[int, int]],
    frame: tuple[int, int],
) -> dict[str, str]:
    """Return the values cut out of the array that users know, where they stand one below the other
    with zeros beside and below them.

    Args:
        sizes: positions and numbers of each.
    """
    draft = side.draft
    positions, columns = frame
    rows = []
    for name, value in values.items():
        length, width = sizes[name]
        rows.append(value)
        positions -= length
        if width < columns:
            zeros = _zeros(side, (length, columns - width))
            rows[-1] = draft.named(f"{value}_wide")
            side.add(form.Join(gives=rows[-1], of=(value, zeros), axis=2))
    if positions:
        rows.append(_zeros(side, (positions, columns)))
    whole = side.joined("prompt_embeds", rows, axis=1)
    names = {name: draft.named(f"_{side.prefix}{name}") for name in values}
    wide = {
        name: draft.named(f"{part}_wide") if sizes[name][1] < columns else part
        for name, part in names.items()
    }
    lengths = tuple(length for length, _ in sizes.values())
    side.add(form.Cut(gives=tuple(wide.values()), of=whole, axis=1, sizes=lengths))
    for name, part in names.items():
        if part != wide[name]:
            width = sizes[name][1]
            side.add(form.Cut(gives=(part,), of=wide[name], axis=2, sizes=(width,)))
    return names


def _zeros(side: Side, shape: tuple[int, int]) -> str:
    name = side.draft.named("_zeros")
    side.add(form.Zeros(gives=name, shape=shape))
    return name


def _length(pipe: Any) -> int:
    """Return how many ids CLIP's texts become: all have the first tokenizer's length."""
    return text_length(pipe.tokenizer, pipe.text_encoder)


def _tokens(pipe: Any) -> tuple[Tokens, ...]:
    tokens = (Tokens("tokenizer"), Tokens("tokenizer_2", _length(pipe)))
    if pipe.text_encoder_3 is None:
        return tokens
    return (*tokens, Tokens("tokenizer_3", longest_text(pipe)))


def _clip(pipe: Any) -> Graph:
    length = _length(pipe)
    first, second = pipe.text_encoder.config, pipe.text_encoder_2.config
    joint = pipe.transformer.config.joint_attention_dim
    # As diffusers, which cuts off what is wider than the transformer takes.
    width = min(first.hidden_size + second.hidden_size, joint)
    own = min(first.hidden_size, joint)
    other = min(second.hidden_size, joint - own)
    pooled = first.projection_dim + second.projection_dim
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={"input_ids": ids_spec(length), "input_ids_2": ids_spec(length)},
        outputs={
            _CLIP: TensorSpec("float32", ("batch", length, width)),
            _POOLED: TensorSpec("float32", ("batch", pooled)),
        },
        positions={_CLIP: {"input_ids": own} | ({"input_ids_2": other} if other else {})},
    )
    module = TextEncoders(pipe.text_encoder, pipe.text_encoder_2, width)
    return Graph(component, module, min(first.vocab_size, second.vocab_size))


def _t5(pipe: Any) -> Graph:
    encoder = pipe.text_encoder_3
    names = ("text_encoder_3", "input_ids_3", _T5)
    return t5_graph(T5Encoder(encoder), encoder, *names, longest_text(pipe))


def _denoiser(pipe: Any, channels: int, encoders: Sequence[Component]) -> Graph:
    sample = sample_spec(channels)
    inputs = {"sample": sample, "timestep": timestep_spec()}
    for encoder in encoders:
        inputs |= encoder.outputs
    component = Component("denoiser", "denoiser", inputs, {"prediction": sample})
    return Graph(component, Denoiser(pipe.transformer, longest_text(pipe)))


def _inpainted(pipe: Any) -> Callable[..., Any]:
    """Return the pipeline's call. It leaves out the VAE's shift as it decodes, which the other
    pipelines of this model add."""

    def run(output_type: str, **arguments: Any) -> Any:
        made = pipe(output_type="latent", **arguments)
        if output_type == "latent":
            return made
        config = pipe.vae.config
        images = pipe.vae.decode(made.images / config.scaling_factor + config.shift_factor)[0]
        made.images = pipe.image_processor.postprocess(images, output_type=output_type)
        return made

    return run
