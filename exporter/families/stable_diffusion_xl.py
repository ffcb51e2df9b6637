"""Stable Diffusion XL base text-to-image: two text encoders, size and crop conditioning."""

from __future__ import annotations

from typing import Any

import torch

from exporter.families import Description, Graph, TextInput, latents_of
from exporter.families.text_to_image import (
    PROBE_GUIDANCE,
    check_unet,
    decoder_graph,
    encoder_graph,
    guidance_embedding,
    guided_by,
    ids_spec,
    sample_spec,
    vae_factor,
)
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Argument, Component, Embedding, TensorSpec, VectorInput

COMPONENTS = {
    "text_encoder": ("text_encoder", "text_encoder_2"),
    "denoiser": ("unet",),
    "vae_decoder": ("vae",),
}
_GUIDANCE_SCALE = 5.0  # StableDiffusionXLPipeline.__call__
_STEPS = 50
_STRENGTH = 0.3  # StableDiffusionXLImg2ImgPipeline.__call__


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
    if pipe.text_encoder is None or pipe.config.get("requires_aesthetics_score"):
        raise UnsupportedPipeline("the SDXL refiner is not supported yet, only the base model")
    zeros = "zeros" if pipe.config.force_zeros_for_empty_prompt else "empty"
    guided = guided_by(pipe.unet, _GUIDANCE_SCALE, zeros)
    length = pipe.tokenizer.model_max_length
    encoders = {"input_ids": pipe.text_encoder, "input_ids_2": pipe.text_encoder_2}
    columns = {name: encoder.config.hidden_size for name, encoder in encoders.items()}
    width = sum(columns.values())
    pooled = TensorSpec("float32", ("batch", pipe.text_encoder_2.config.projection_dim))
    sample = sample_spec(pipe.unet.config.in_channels)
    text_encoder = Graph(
        Component(
            name="text_encoder",
            role="encoder",
            inputs={"input_ids": ids_spec(length), "input_ids_2": ids_spec(length)},
            outputs={
                "encoder_hidden_states": TensorSpec("float32", ("batch", length, width)),
                "text_embeds": pooled,
            },
        ),
        TextEncoders(pipe.text_encoder, pipe.text_encoder_2),
        min(pipe.text_encoder.config.vocab_size, pipe.text_encoder_2.config.vocab_size),
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
                "time_ids": TensorSpec("float32", ("batch", 6)),
                **guided.inputs,
            },
            outputs={"prediction": sample},
        ),
        Denoiser(pipe.unet),
    )
    return Description(
        task="text-to-image",
        graphs=(text_encoder, denoiser, decoder_graph(pipe.vae)),
        latents=latents_of(pipe.unet, vae_factor(pipe.vae)),
        text_inputs=(
            TextInput("tokenizer", "input_ids", ("prompt",)),
            TextInput("tokenizer_2", "input_ids_2", ("prompt_2", "prompt")),
        ),
        arguments=(
            Argument("original_size", ("height", "width")),
            Argument("crops_coords_top_left", (0.0, 0.0)),
            Argument("target_size", ("height", "width")),
            *guided.arguments,
        ),
        vectors=(
            VectorInput("time_ids", ("original_size", "crops_coords_top_left", "target_size")),
            *guided.vectors,
        ),
        guidance=guided.guidance,
        num_inference_steps=_STEPS,
        resizable=True,
        denoiser=pipe.unet,
        call=lambda **arguments: pipe(output_type="np", **arguments).images,
        probe_arguments={
            "prompt": "a large red circle above a small blue square",
            "prompt_2": "a flat drawing",
            "guidance_scale": PROBE_GUIDANCE,
        },
        image_encoder=encoder_graph(pipe.vae),
        strength=_STRENGTH,
        embeddings=(
            Embedding("prompt_embeds", "encoder_hidden_states", columns),
            Embedding("pooled_prompt_embeds", "text_embeds"),
        ),
    )
