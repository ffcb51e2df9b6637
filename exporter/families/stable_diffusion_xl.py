"""Stable Diffusion XL base text-to-image: two text encoders, size and crop conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from exporter.families import Description, Graph, TextInput, is_uneven, latents_of, least_side
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
    vae_factor,
)
from exporter.families.unet_pipelines import (
    ForwardedSizes,
    check_parts,
    check_unet,
    check_vae,
    text_length,
)
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Argument, Component, Embedding, TensorSpec, VectorInput
from runtimes.tasks import Task

COMPONENTS = {
    "text_encoder": ("text_encoder", "text_encoder_2"),
    "denoiser": ("unet",),
    "vae_decoder": ("vae",),
}
# Of the pipelines' calls.
_DEFAULTS = {
    "StableDiffusionXLInpaintPipeline": (7.5, 50),
    "StableDiffusionXLInstructPix2PixPipeline": (5.0, 100),
}
_USUAL = (5.0, 50)
_ARGUMENTS = (
    Argument("original_size", ("height", "width")),
    Argument("crops_coords_top_left", (0.0, 0.0)),
)
_TARGET = Argument("target_size", ("height", "width"))
# What the refiner is told instead of it, and what it is told of the negative prompt.
_SCORES = (
    Argument("aesthetic_score", (6.0,)),
    Argument("negative_aesthetic_score", (2.5,)),
    Argument("negative_crops_coords_top_left", (0.0, 0.0)),
)
_STRENGTHS = {"image-to-image": 0.3, "inpainting": 0.9999}


class TextEncoders(torch.nn.Module):
    """An id tensor [batch, length] for each encoder → their joined penultimate hidden states
    [batch, length, sum of widths], and the pooled projection of the first that has one."""

    def __init__(self, encoders: Sequence[Any]) -> None:
        super().__init__()
        self.encoders = torch.nn.ModuleList(encoders)

    def forward(
        self, input_ids: torch.Tensor, input_ids_2: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.encoders, (input_ids, input_ids_2), strict=False)
        ]
        pooled = next(each[0] for each in found if each[0].ndim == 2)
        return torch.cat([each.hidden_states[-2] for each in found], dim=-1), pooled


class Denoiser(torch.nn.Module):
    """The UNet with its added conditioning as plain inputs."""

    def __init__(self, unet: Any, uneven: bool = False) -> None:
        super().__init__()
        self.unet = ForwardedSizes(unet) if uneven else unet
        self.embedding = guidance_embedding(unet)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
        guidance_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        prediction = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=self.embedding(guidance_scale),
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
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
    scale, steps = _DEFAULTS.get(type(pipe).__name__, _USUAL)
    guided = guided_by(pipe.unet, scale, zeros)
    texts = _texts(pipe)
    encoders = [
        getattr(pipe, each.attribute.replace("tokenizer", "text_encoder")) for each in texts
    ]
    (length,) = _lengths(pipe, texts, encoders)
    columns = {
        text.input: int(encoder.config.hidden_size)
        for text, encoder in zip(texts, encoders, strict=True)
    }
    width = sum(columns.values())
    pooled = TensorSpec("float32", ("batch", _projection(encoders)))
    sample = sample_spec(pipe.unet.config.out_channels)
    latents = latents_of(pipe.unet, vae_factor(pipe.vae), any_size=True)
    scaling = Scaling.normalised(pipe.vae)
    text_encoder = Graph(
        Component(
            name="text_encoder",
            role="encoder",
            inputs={each.input: ids_spec(length) for each in texts},
            outputs={
                "encoder_hidden_states": TensorSpec("float32", ("batch", length, width)),
                "text_embeds": pooled,
            },
        ),
        TextEncoders(encoders),
        min(encoder.config.vocab_size for encoder in encoders),
    )
    denoiser = Graph(
        Component(
            name="denoiser",
            role="denoiser",
            inputs={
                "sample": sample,
                "timestep": TensorSpec("float32", (1,)),
                "encoder_hidden_states": TensorSpec("float32", ("batch", "sequence", width)),
                "text_embeds": pooled,
                "time_ids": TensorSpec("float32", ("batch", 5 if scored else 6)),
                **guided.inputs,
            },
            outputs={"prediction": sample},
        ),
        Denoiser(pipe.unet, is_uneven(pipe.unet)),
        least=least_side(pipe.unet),
    )
    run = from_text(pipe)
    description = Description(
        task=Task(TEXT_TO_IMAGE),
        graphs=(text_encoder, denoiser, decoder_graph(pipe.vae, scaling)),
        latents=latents,
        text_inputs=texts,
        arguments=(*_ARGUMENTS, *(_SCORES if scored else (_TARGET,)), *guided.arguments),
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
        num_inference_steps=steps,
        resizable=True,
        denoiser=pipe.unet,
        call=lambda **arguments: run(output_type="np", **arguments).images,
        probe_arguments={
            "prompt": "a large red circle above a small blue square",
            **({"prompt_2": "a flat drawing"} if len(texts) > 1 else {}),
            "guidance_scale": PROBE_GUIDANCE,
        },
        embeddings=(
            Embedding("prompt_embeds", "encoder_hidden_states", columns),
            Embedding("pooled_prompt_embeds", "text_embeds"),
        ),
    )
    description = with_picture_tasks(pipe, description, _STRENGTHS, scaling)
    description = with_controlnets(pipe, with_ip_adapter(pipe, description))
    return with_t2i_adapters(pipe, description)


def _texts(pipe: Any) -> tuple[TextInput, ...]:
    """What feeds the encoders. One alone gets the call's own prompt, whichever it is."""
    if pipe.text_encoder is None:
        return (TextInput("tokenizer_2", "input_ids", ("prompt",)),)
    return (
        TextInput("tokenizer", "input_ids", ("prompt",)),
        TextInput("tokenizer_2", "input_ids_2", ("prompt_2", "prompt")),
    )


def _lengths(pipe: Any, texts: Sequence[TextInput], encoders: Sequence[Any]) -> set[int]:
    pairs = zip(texts, encoders, strict=True)
    found = {text_length(getattr(pipe, text.attribute), encoder) for text, encoder in pairs}
    if len(found) > 1:
        raise UnsupportedPipeline(
            f"the tokenizers make {' and '.join(map(str, sorted(found)))} ids of a text, whose "
            "hidden states cannot be joined: diffusers cannot run it either"
        )
    return found


def _projection(encoders: Sequence[Any]) -> int:
    """Width of the pooled text: that of the first encoder with a projection."""
    for encoder in encoders:
        if hasattr(encoder, "text_projection"):
            return int(encoder.config.projection_dim)
    raise UnsupportedPipeline(
        "no text encoder has a projection (CLIPTextModelWithProjection): diffusers cannot run it "
        "either"
    )
