"""Stable Diffusion XL base text-to-image: two text encoders, size and crop conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from exporter.families import Description, Graph, Offer, TextInput, calling, latents_of
from exporter.families.controlnet import with_controlnets
from exporter.families.ip_adapter import with_ip_adapter
from exporter.families.pictures import TEXT_TO_IMAGE, from_text, with_picture_tasks
from exporter.families.t2i_adapter import with_t2i_adapters
from exporter.families.text_to_image import (
    PROBE_GUIDANCE,
    Scaling,
    decoder_graph,
    guidance_embedding,
    guided_by,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from exporter.families.unet_pipelines import (
    check_parts,
    check_unet,
    check_vae,
    for_any_size,
    least_side,
    multiple_of,
    text_length,
)
from exporter.signatures import named
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Component, TensorSpec
from runtimes.version_1.fields import Argument, Embedding, VectorInput
from runtimes.version_1.tasks import Task

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "denoiser": ("unet",),
    "vae_decoder": ("vae",),
}
_ARGUMENTS = (
    Argument("original_size", ("height", "width")),
    Argument("crops_coords_top_left", (0.0, 0.0)),
)
_NEGATIVE_CROPS = Argument("negative_crops_coords_top_left", (0.0, 0.0))
# Calls from text alone look at the sizes of the negative prompt where both are given. Those from an
# image look at each, and not at its crops, unless there is an aesthetic score.
_NEGATIVE_SIZES = ("negative_original_size", "negative_target_size")
_TOGETHER = {
    _NEGATIVE_SIZES[0]: _NEGATIVE_SIZES[1:],
    _NEGATIVE_SIZES[1]: _NEGATIVE_SIZES[:1],
    _NEGATIVE_CROPS.name: _NEGATIVE_SIZES,
}
_TARGET = Argument("target_size", ("height", "width"))
# What the refiner is told instead of it, and what it is told of the negative prompt.
_SCORES = (
    Argument("aesthetic_score", (6.0,)),
    Argument("negative_aesthetic_score", (2.5,)),
)
_POOLED = "text_embeds"
_TASKS = ("image-to-image", "inpainting")


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
    """See `exporter.families.Description`."""
    # Without the pooled text of the second encoder it cannot run; the first may be missing.
    parts = ("text_encoder", "tokenizer")
    first = parts if any(getattr(pipe, name) is not None for name in parts) else ()
    check_parts(pipe, "unet", "vae", "text_encoder_2", "tokenizer_2", *first)
    check_unet(pipe.unet, type(pipe).__name__, additions=("text_time",))
    check_vae(pipe.vae)
    scored = bool(pipe.config.get("requires_aesthetics_score"))
    zeros = "zeros" if pipe.config.force_zeros_for_empty_prompt else "empty"
    guided = guided_by(pipe.unet, zeros)
    texts, encoders = _text_encoders(pipe)
    made = {name: spec for each in encoders for name, spec in each.component.outputs.items()}
    states = {name: spec for name, spec in made.items() if name != _POOLED}
    columns = {
        name: {text.input: int(spec.shape[-1])}
        for text, (name, spec) in zip(texts, states.items(), strict=True)
    }
    sample = sample_spec(pipe.unet.config.out_channels)
    latents = latents_of(pipe.unet, vae_factor(pipe.vae), multiple_of(pipe.unet))
    scaling = Scaling.normalised(pipe.vae)
    inputs = {
        "sample": sample,
        "timestep": timestep_spec(),
        **{
            name: TensorSpec("float32", ("batch", "sequence", spec.shape[-1]))
            for name, spec in states.items()
        },
        _POOLED: made[_POOLED],
        "time_ids": TensorSpec("float32", ("batch", 5 if scored else 6)),
        **guided.inputs,
    }
    denoiser = Graph(
        Component("denoiser", "denoiser", inputs, {"prediction": sample}),
        Denoiser(pipe.unet, list(inputs), list(states)),
        least=least_side(pipe.unet),
    )
    run = from_text(pipe)
    description = Description(
        task=Task(TEXT_TO_IMAGE, branch_arguments=_TOGETHER),
        graphs=(*encoders, denoiser, decoder_graph(pipe.vae, scaling)),
        latents=latents,
        text_inputs=texts,
        arguments=(
            *_ARGUMENTS,
            *(_SCORES if scored else (_TARGET,)),
            *((_NEGATIVE_CROPS,) if guided.guidance.scale else ()),
            *guided.arguments,
        ),
        vectors=(
            VectorInput(
                "time_ids",
                (
                    *(each.name for each in _ARGUMENTS),
                    _SCORES[0].name if scored else _TARGET.name,
                ),
            ),
            *guided.vectors,
        ),
        guidance=guided.guidance,
        resizable=True,
        denoiser=pipe.unet,
        call=calling(run),
        probe_arguments={
            "prompt": "a large red circle above a small blue square",
            **({"prompt_2": "a flat drawing"} if len(texts) > 1 else {}),
            "guidance_scale": PROBE_GUIDANCE,
        },
        embeddings=(
            Embedding("prompt_embeds", columns),
            Embedding("pooled_prompt_embeds", {_POOLED: {}}),
        ),
    )
    description = with_picture_tasks(pipe, description, _TASKS, scaling)
    if not scored:
        description = _with_negative_sizes(description)
    description = with_controlnets(pipe, with_ip_adapter(pipe, description))
    return with_t2i_adapters(pipe, description)


def _with_negative_sizes(description: Description) -> Description:
    """Return the description whose tasks with images take the sizes of the negative prompt."""

    def with_sizes(task: Task) -> Task:
        if task.name == TEXT_TO_IMAGE:
            return task
        return structs.replace(task, branch_arguments=dict.fromkeys(_NEGATIVE_SIZES, ()))

    offers = tuple(Offer(with_sizes(each.task), each.graphs) for each in description.offers)
    return replace(description, task=with_sizes(description.task), offers=offers)


def _text_encoders(pipe: Any) -> tuple[tuple[TextInput, ...], list[Graph]]:
    """What feeds the encoders, and their graphs: the same for base and refiner, so that their
    bundles can share the second one. One alone gets the call's own prompt, whichever it is."""
    pairs = [("tokenizer", "text_encoder", ""), ("tokenizer_2", "text_encoder_2", "_2")]
    pairs = [each for each in pairs if getattr(pipe, each[1]) is not None]
    encoders = [getattr(pipe, name) for _, name, _ in pairs]
    texts = tuple(
        TextInput(tokenizer, f"input_ids{end}", ("prompt_2", "prompt") if place else ("prompt",))
        for place, (tokenizer, _, end) in enumerate(pairs)
    )
    (length,) = _lengths(pipe, texts, encoders)
    projecting = _projecting(encoders)
    graphs = []
    for (_, name, end), encoder in zip(pairs, encoders, strict=True):
        config = encoder.config
        outputs = {
            f"encoder_hidden_states{end}": TensorSpec(
                "float32", ("batch", length, config.hidden_size)
            )
        }
        if encoder is projecting:
            outputs[_POOLED] = TensorSpec("float32", ("batch", config.projection_dim))
        graphs.append(
            Graph(
                Component(name, "encoder", {f"input_ids{end}": ids_spec(length)}, outputs),
                TextEncoder(encoder, f"input_ids{end}", encoder is projecting),
                config.vocab_size,
            )
        )
    return texts, graphs


def _lengths(pipe: Any, texts: Sequence[TextInput], encoders: Sequence[Any]) -> set[int]:
    pairs = zip(texts, encoders, strict=True)
    found = {text_length(getattr(pipe, text.attribute), encoder) for text, encoder in pairs}
    if len(found) > 1:
        raise UnsupportedPipeline(
            f"the tokenizers make {' and '.join(map(str, sorted(found)))} ids of a text, whose "
            "hidden states cannot be joined: diffusers cannot run it either"
        )
    return found


def _projecting(encoders: Sequence[Any]) -> Any:
    """The first encoder with a projection, whose pooled text it is."""
    for encoder in encoders:
        if hasattr(encoder, "text_projection"):
            return encoder
    raise UnsupportedPipeline(
        "no text encoder has a projection (CLIPTextModelWithProjection): diffusers cannot run it "
        "either"
    )
