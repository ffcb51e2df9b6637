"""Stable Diffusion XL base text-to-image: two text encoders, size and crop conditioning."""

from __future__ import annotations

from typing import Any

import torch

from exporter.families import Description, Graph, TextInput, latents_of
from exporter.families.controlnet import with_controlnets
from exporter.families.pictures import TEXT_TO_IMAGE, from_text, with_picture_tasks
from exporter.families.text_to_image import (
    PROBE_GUIDANCE,
    check_unet,
    decoder_graph,
    guidance_embedding,
    guided_by,
    ids_spec,
    sample_spec,
    vae_factor,
)
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
    """Two id tensors [batch, length] → joined penultimate hidden states
    [batch, length, width_1 + width_2] and the second encoder's pooled projection."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(
        self, input_ids: torch.Tensor, input_ids_2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        one = self.first(input_ids, output_hidden_states=True)
        two = self.second(input_ids_2, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two[0]


class SecondTextEncoder(torch.nn.Module):
    """The same of the second encoder alone, which is all that the refiner has."""

    def __init__(self, second: Any) -> None:
        super().__init__()
        self.second = second

    def forward(self, input_ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.second(input_ids_2, output_hidden_states=True)
        return made.hidden_states[-2], made[0]


class Denoiser(torch.nn.Module):
    """The UNet with its added conditioning as plain inputs."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
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
    check_unet(pipe.unet)
    scored = bool(pipe.config.get("requires_aesthetics_score"))
    zeros = "zeros" if pipe.config.force_zeros_for_empty_prompt else "empty"
    scale, steps = _DEFAULTS.get(type(pipe).__name__, _USUAL)
    guided = guided_by(pipe.unet, scale, zeros)
    text_encoder, text_inputs = _text_encoder(pipe)
    states, pooled = text_encoder.component.outputs.values()
    sample = sample_spec(pipe.unet.config.out_channels)
    denoiser = Graph(
        Component(
            name="denoiser",
            role="denoiser",
            inputs={
                "sample": sample,
                "timestep": TensorSpec("float32", (1,)),
                "encoder_hidden_states": TensorSpec(
                    "float32", ("batch", "sequence", states.shape[-1])
                ),
                "text_embeds": pooled,
                "time_ids": TensorSpec("float32", ("batch", 5 if scored else 6)),
                **guided.inputs,
            },
            outputs={"prediction": sample},
        ),
        Denoiser(pipe.unet),
    )
    run = from_text(pipe)
    description = Description(
        task=Task(TEXT_TO_IMAGE),
        graphs=(text_encoder, denoiser, decoder_graph(pipe.vae)),
        latents=latents_of(pipe.unet, vae_factor(pipe.vae)),
        text_inputs=text_inputs,
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
            **({} if pipe.text_encoder is None else {"prompt_2": "a flat drawing"}),
            "guidance_scale": PROBE_GUIDANCE,
        },
        embeddings=(
            Embedding("prompt_embeds", "encoder_hidden_states", _columns(pipe)),
            Embedding("pooled_prompt_embeds", "text_embeds"),
        ),
    )
    description = with_picture_tasks(pipe, description, _STRENGTHS)
    return with_controlnets(pipe, description)


def _columns(pipe: Any) -> dict[str, int]:
    """The numbers that each encoder gives for a token, by its input."""
    encoders = {"input_ids": pipe.text_encoder, "input_ids_2": pipe.text_encoder_2}
    return {n: int(each.config.hidden_size) for n, each in encoders.items() if each is not None}


def _text_encoder(pipe: Any) -> tuple[Graph, tuple[TextInput, ...]]:
    """One graph of both encoders, or of the second alone, and what feeds it."""
    first, second = pipe.text_encoder, pipe.text_encoder_2
    length = pipe.tokenizer_2.model_max_length
    encoders = [each for each in (first, second) if each is not None]
    width = sum(_columns(pipe).values())
    texts = [
        TextInput("tokenizer", "input_ids", ("prompt",)),
        TextInput("tokenizer_2", "input_ids_2", ("prompt_2", "prompt")),
    ]
    if first is None:  # diffusers then takes the first prompt for the second encoder
        texts = [TextInput("tokenizer_2", "input_ids_2", ("prompt",))]
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={text.input: ids_spec(length) for text in texts},
        outputs={
            "encoder_hidden_states": TensorSpec("float32", ("batch", length, width)),
            "text_embeds": TensorSpec("float32", ("batch", second.config.projection_dim)),
        },
    )
    module = SecondTextEncoder(second) if first is None else TextEncoders(first, second)
    vocabulary = min(each.config.vocab_size for each in encoders)
    return Graph(component, module, vocabulary), tuple(texts)
