"""Stable Diffusion XL base text-to-image: two text encoders, size and crop conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from latentc.exporter.classes import TEXT_TO_IMAGE
from latentc.exporter.components.description import Description, Graph, Tokens
from latentc.exporter.components.signatures import named
from latentc.exporter.components.text_to_image import (
    Scaling,
    distilled,
    guidance_embedding,
    ids_spec,
    sample_spec,
    scale_inputs,
    timestep_spec,
)
from latentc.exporter.components.unet_programs import describe_unet
from latentc.exporter.components.unets import (
    check_parts,
    check_unet,
    check_vae,
    for_any_size,
    least_side,
    text_length,
)
from latentc.exporter.programs.defaults import takes
from latentc.exporter.programs.draft import SIDES, Draft
from latentc.exporter.programs.sides import NEGATIVE, Missing, Side, sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "denoiser": ("unet",),
    "vae_decoder": ("vae",),
}
_ORIGINAL, _CROPS, _TARGET = "original_size", "crops_coords_top_left", "target_size"
# What the refiner is told instead of the target size, and what it is told of the negative prompt.
_SCORE, _SCORES = "aesthetic_score", (6.0, 2.5)
_POOLED, _TIME_IDS, _STATES = "text_embeds", "time_ids", "encoder_hidden_states"


class TextEncoder(torch.nn.Module):
    """Token ids [batch, length] → penultimate hidden states [batch, length, width], and with
    `pooled` the projection of the text."""

    def __init__(self, encoder: Any, input_name: str, pooled: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self._pooled = pooled
        self.forward: Callable[..., Any] = named(self._call, [input_name])

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        (ids,) = inputs.values()
        found = self.encoder(ids, output_hidden_states=True)
        return (found.hidden_states[-2], found[0]) if self._pooled else (found.hidden_states[-2],)


class Denoiser(torch.nn.Module):
    """The UNet with its added conditioning as plain inputs; the encoders' `states` are joined."""

    def __init__(self, unet: Any, inputs: Sequence[str], states: Sequence[str]) -> None:
        super().__init__()
        self.unet = for_any_size(unet)
        self.embedding = guidance_embedding(unet)
        self._states = tuple(states)
        self.forward: Callable[..., Any] = named(self._call, inputs)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor]:
        prediction = self.unet(
            inputs["sample"],
            inputs["timestep"],
            torch.cat([inputs[name] for name in self._states], dim=-1),
            timestep_cond=self.embedding(inputs.get("guidance_scale")),
            added_cond_kwargs={name: inputs[name] for name in ("text_embeds", "time_ids")},
            return_dict=False,
        )[0]
        return (prediction,)


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    # Without the pooled text of the second encoder it cannot run; the first may be missing.
    parts = ("text_encoder", "tokenizer")
    first = parts if any(getattr(pipe, name) is not None for name in parts) else ()
    check_parts(pipe, "unet", "vae", "text_encoder_2", "tokenizer_2", *first)
    check_unet(pipe.unet, type(pipe).__name__, additions=("text_time",))
    check_vae(pipe.vae)
    scored = bool(pipe.config.get("requires_aesthetics_score"))
    encoders = _text_encoders(pipe)
    components = [encoder.component for encoder in encoders]
    missing: Missing = "zeros" if pipe.config.force_zeros_for_empty_prompt else "empty"
    return describe_unet(
        pipe,
        encoders=encoders,
        denoiser=_denoiser(pipe, components, scored),
        tokens=[Tokens(_tokenizer(component)) for component in components],
        scaling=Scaling.normalised(pipe.vae),
        write=partial(_write, encoders=components, missing=missing, scored=scored),
    )


def _write(draft: Draft, encoders: Sequence[Component], missing: Missing, scored: bool) -> None:
    for side in sides_of(draft, missing):
        _write_texts(side, encoders)
    names = (_ORIGINAL, _CROPS, _SCORE if scored else _TARGET)
    own = _of_negative(draft, scored)
    _declare_numbers(draft, names, own)
    for prefix in draft.sides():
        side = Side(draft, prefix)
        side.feed(_TIME_IDS, side.row(_TIME_IDS, names, own if prefix else {}))


def _write_texts(side: Side, encoders: Sequence[Component]) -> None:
    """Write that the encoders' states are joined, and cut again for the denoiser."""
    several = len(encoders) > 1
    ids = {}
    for place, encoder in enumerate(encoders):
        (input,) = encoder.inputs
        texts = ("prompt_2", "prompt") if place else ("prompt",)
        ids[input] = side.tokens(input, _tokenizer(encoder), *texts)
    values: dict[str, str] = {}
    value_by_output = {_POOLED: "pooled_prompt_embeds"}
    for encoder in encoders:
        (input,) = encoder.inputs
        states = None if several else "prompt_embeds"
        gives = {output: value_by_output.get(output, states) for output in encoder.outputs}
        values |= side.run(encoder.name, {input: ids[input]}, gives)
    widths = _widths(encoders)
    whole = side.joined("prompt_embeds", [values[name] for name in widths], axis=2)
    parts = side.cut(whole, [*widths], axis=2, sizes=[*widths.values()])
    for name, part in zip(widths, parts, strict=True):
        side.feed(name, part)
    side.feed(_POOLED, side.or_zeros(value_by_output[_POOLED], values[_POOLED]))


def _of_negative(draft: Draft, scored: bool) -> dict[str, tuple[str, ...]]:
    """Return the numbers that the class takes for the negative prompt, with those that each must be
    given with to count. Calls from text alone look at its sizes where both are given. Those from an
    image look at each, and not at its crops, unless there is an aesthetic score."""
    if draft.name == TEXT_TO_IMAGE and not scored:
        sizes = (_ORIGINAL, _TARGET)
        own = {_ORIGINAL: sizes[1:], _TARGET: sizes[:1], _CROPS: sizes}
    else:
        own = dict.fromkeys((_ORIGINAL, _CROPS, _SCORE) if scored else (_ORIGINAL, _TARGET), ())
    return {
        name: others for name, others in own.items() if takes(draft.stands_for, NEGATIVE + name)
    }


def _declare_numbers(draft: Draft, names: Sequence[str], own: Mapping[str, Sequence[str]]) -> None:
    """Declare the numbers, those of the negative prompt behind the ones that they fall back to."""
    usual: dict[str, tuple[float | str, ...]] = {_CROPS: (0.0, 0.0), _SCORE: _SCORES[:1]}
    of_negative: dict[str, tuple[float | str, ...]] = {_CROPS: (0.0, 0.0), _SCORE: _SCORES[1:]}
    guided = NEGATIVE in draft.sides()
    for name in names if guided else ():
        alone = name in of_negative and name in own and not own[name]
        if not alone:
            draft.number(name, usual.get(name, SIDES))
        if name in of_negative and name in own:
            draft.number(NEGATIVE + name, of_negative[name])
        elif name in own:
            draft.number(NEGATIVE + name, fallback=name, count=len(SIDES))
    for name in names:
        draft.number(name, usual.get(name, SIDES))


def _tokenizer(encoder: Component) -> str:
    return encoder.name.replace("text_encoder", "tokenizer")


def _widths(encoders: Sequence[Component]) -> dict[str, int]:
    """Return the encoders' states and how many numbers each has of a token."""
    every = {name: spec for encoder in encoders for name, spec in encoder.outputs.items()}
    return {name: int(spec.shape[-1]) for name, spec in every.items() if name != _POOLED}


def _denoiser(pipe: Any, encoders: Sequence[Component], scored: bool) -> Graph:
    sample, widths = sample_spec(pipe.unet.config.out_channels), _widths(encoders)
    every = {name: spec for encoder in encoders for name, spec in encoder.outputs.items()}
    inputs = {
        "sample": sample,
        "timestep": timestep_spec(),
        **{n: TensorSpec("float32", ("batch", "sequence", width)) for n, width in widths.items()},
        _POOLED: every[_POOLED],
        _TIME_IDS: TensorSpec("float32", ("batch", 5 if scored else 6)),
        **scale_inputs(distilled(pipe.unet)),
    }
    component = Component("denoiser", "denoiser", inputs, {"prediction": sample})
    module = Denoiser(pipe.unet, list(inputs), list(widths))
    return Graph(component, module, least=least_side(pipe.unet))


def _text_encoders(pipe: Any) -> list[Graph]:
    """Return the encoders' graphs: the same for base and refiner, so that their bundles can share
    the second one. One alone gets the call's own prompt, whichever it is."""
    names = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name) is not None]
    encoders = {name: getattr(pipe, name) for name in names}
    length = _length(pipe, encoders)
    projecting = _projecting([*encoders.values()])
    graphs = []
    for name, encoder in encoders.items():
        config, end = encoder.config, name.removeprefix("text_encoder")
        states, ids = f"{_STATES}{end}", f"input_ids{end}"
        outputs = {states: TensorSpec("float32", ("batch", length, config.hidden_size))}
        if encoder is projecting:
            outputs[_POOLED] = TensorSpec("float32", ("batch", config.projection_dim))
        positions = {states: {ids: int(config.hidden_size)}}
        component = Component(name, "encoder", {ids: ids_spec(length)}, outputs, positions)
        module = TextEncoder(encoder, ids, encoder is projecting)
        graphs.append(Graph(component, module, config.vocab_size))
    return graphs


def _length(pipe: Any, encoders: Mapping[str, Any]) -> int:
    """Return how many ids a text becomes. Raises UnsupportedPipeline where tokenizers differ."""
    lengths = {
        text_length(getattr(pipe, name.replace("text_encoder", "tokenizer")), encoder)
        for name, encoder in encoders.items()
    }
    if len(lengths) > 1:
        raise UnsupportedPipeline(
            f"the tokenizers make {' and '.join(map(str, sorted(lengths)))} ids of a text, whose "
            "hidden states cannot be joined: diffusers cannot run it either"
        )
    return lengths.pop()


def _projecting(encoders: Sequence[Any]) -> Any:
    """Return the first encoder with a projection, whose pooled text it is."""
    for encoder in encoders:
        if hasattr(encoder, "text_projection"):
            return encoder
    raise UnsupportedPipeline(
        "no text encoder has a projection (CLIPTextModelWithProjection): diffusers cannot run it "
        "either"
    )
