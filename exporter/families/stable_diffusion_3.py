"""Stable Diffusion 3 and 3.5: two CLIP encoders and a T5 encoder, which may be left out, and a
transformer over their joined states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from exporter.families import Description, Graph, Shifted, TextInput, calling
from exporter.families.defaults import longest_text
from exporter.families.flow_pictures import with_picture_tasks
from exporter.families.pictures import made_from_text
from exporter.families.text_to_image import (
    PROBE_GUIDANCE,
    classifier_free_guidance,
    decoder_graph,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from exporter.families.trained_tasks import inpainting
from exporter.families.transformer_parts import (
    latents_of_transformer,
    projected,
    t5_graph,
    unpatched,
)
from exporter.families.unet_pipelines import text_length
from runtimes.manifest import Component, TensorSpec
from runtimes.version_1.fields import Embedding
from runtimes.version_1.tasks import Task

COMPONENTS = {
    "text_encoder": ("text_encoder", "text_encoder_2"),
    "text_encoder_3": ("text_encoder_3",),
    "denoiser": ("transformer",),
    "vae_decoder": ("vae",),
}
OPTIONAL = {"text_encoder_3": ("text_encoder_3", "tokenizer_3")}
_MAX_SHIFT = 1.16  # of the pipeline, where its scheduler says none


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
    """See `exporter.families.Description`."""
    config = pipe.transformer.config
    channels = config.out_channels or config.in_channels
    t5_length = longest_text(pipe)
    # All texts of CLIP have the first tokenizer's length.
    length = text_length(pipe.tokenizer, pipe.text_encoder)
    first, second = pipe.text_encoder.config, pipe.text_encoder_2.config
    # As diffusers, which cuts off what is wider than the transformer takes.
    width = min(first.hidden_size + second.hidden_size, config.joint_attention_dim)
    clip = {
        "clip_hidden_states": TensorSpec("float32", ("batch", length, width)),
        "pooled_projections": TensorSpec(
            "float32", ("batch", first.projection_dim + second.projection_dim)
        ),
    }
    text_encoder = Graph(
        Component(
            name="text_encoder",
            role="encoder",
            inputs={"input_ids": ids_spec(length), "input_ids_2": ids_spec(length)},
            outputs=clip,
        ),
        TextEncoders(pipe.text_encoder, pipe.text_encoder_2, width),
        min(first.vocab_size, second.vocab_size),
    )
    texts = [
        TextInput("tokenizer", "input_ids", ("prompt",)),
        TextInput("tokenizer_2", "input_ids_2", ("prompt_2", "prompt"), length),
    ]
    encoders = [text_encoder]
    if pipe.text_encoder_3 is not None:
        encoders.append(
            t5_graph(
                T5Encoder(pipe.text_encoder_3),
                pipe.text_encoder_3,
                "text_encoder_3",
                "input_ids_3",
                "t5_hidden_states",
                t5_length,
            )
        )
        texts.append(TextInput("tokenizer_3", "input_ids_3", ("prompt_3", "prompt"), t5_length))
    sample = sample_spec(channels)
    t5 = {name: spec for each in encoders[1:] for name, spec in each.component.outputs.items()}
    denoiser = Graph(
        Component(
            name="denoiser",
            role="denoiser",
            inputs={
                "sample": sample,
                "timestep": timestep_spec(),
                **clip,
                **t5,
            },
            outputs={"prediction": sample},
        ),
        Denoiser(pipe.transformer, t5_length),
    )
    factor, patch = vae_factor(pipe.vae), config.patch_size
    masks = type(pipe).__name__ == "StableDiffusion3InpaintPipeline" and (
        config.in_channels != channels
    )
    run = _inpainted(pipe) if masks else made_from_text(pipe)
    description = Description(
        task=Task("text-to-image"),
        graphs=(*encoders, denoiser, decoder_graph(pipe.vae)),
        latents=latents_of_transformer(
            channels,
            config.sample_size,
            factor,
            patch,
            # Positions are cut out of the middle of a table.
            maximum=config.pos_embed_max_size * patch,
        ),
        text_inputs=tuple(texts),
        arguments=(),
        vectors=(),
        guidance=classifier_free_guidance("empty"),
        resizable=True,
        denoiser=pipe.transformer,
        call=calling(run),
        probe_arguments={
            "prompt": "a large red circle above a small blue square",
            "prompt_2": "a flat drawing",
            "guidance_scale": PROBE_GUIDANCE,
        },
        embeddings=_embeddings(pipe, length),
        shifted=Shifted(patch, _MAX_SHIFT),
    )
    return with_picture_tasks(pipe, description, inpainting if masks else None)


def _embeddings(pipe: Any, length: int) -> tuple[Embedding, ...]:
    """One array has CLIP's states and T5's below them, as `Denoiser` joins them; without T5 there
    are zeros in its place."""
    joint = pipe.transformer.config.joint_attention_dim
    first = min(pipe.text_encoder.config.hidden_size, joint)
    second = min(pipe.text_encoder_2.config.hidden_size, joint - first)
    widths = {"input_ids": first} | ({"input_ids_2": second} if second else {})
    columns = {"clip_hidden_states": widths}
    if pipe.text_encoder_3 is not None:
        columns["t5_hidden_states"] = {"input_ids_3": pipe.text_encoder_3.config.d_model}
    frame = length + longest_text(pipe), joint
    return (
        Embedding("prompt_embeds", columns, frame),
        Embedding("pooled_prompt_embeds", {"pooled_projections": {}}),
    )


def _inpainted(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call. It leaves out the VAE's shift as it decodes, which the other pipelines
    of this model add."""

    def run(output_type: str, **arguments: Any) -> Any:
        made = pipe(output_type="latent", **arguments)
        if output_type == "latent":
            return made
        config = pipe.vae.config
        images = pipe.vae.decode(made.images / config.scaling_factor + config.shift_factor)[0]
        made.images = pipe.image_processor.postprocess(images, output_type=output_type)
        return made

    return run
