"""Stable Diffusion 1.x and 2.x (epsilon and v-prediction), those trained for other tasks, and
latent consistency models made from them, whose UNets take the guidance scale as an input."""

from __future__ import annotations

from typing import Any

import torch

from exporter.families import Description, Graph, TextInput, calling, latents_of
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
    Unpadded,
    check_parts,
    check_unet,
    check_vae,
    for_any_size,
    least_side,
    multiple_of,
    sequence,
    text_length,
)
from runtimes.manifest import Component, TensorSpec
from runtimes.version_1.fields import Embedding
from runtimes.version_1.tasks import Task

COMPONENTS = {"text_encoder": ("text_encoder",), "denoiser": ("unet",), "vae_decoder": ("vae",)}
# What diffusers has classes for; of latent consistency models there is none for inpainting.
# The consistency model's own image-to-image class spreads all steps over the last part of the
# schedule, by the strength: a table of plans has the whole schedule only.
_TASKS: dict[str, tuple[str, ...]] = {"LatentConsistencyModelPipeline": ()}
_USUAL_TASKS = ("image-to-image", "inpainting")


class TextEncoder(torch.nn.Module):
    """input_ids [batch, length] → encoder_hidden_states [batch, length, width]: the last
    hidden state after the final layer norm."""

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.encoder = encoder
        masked = getattr(encoder.config, "use_attention_mask", False)
        self.mask = Unpadded(tokenizer) if masked else None

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        mask = None if self.mask is None else self.mask(input_ids)
        return (self.encoder(input_ids, attention_mask=mask, return_dict=False)[0],)


class Denoiser(torch.nn.Module):
    """The UNet; what it predicts (noise or velocity) is the scheduler's business."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = for_any_size(unet)
        self.embedding = guidance_embedding(unet)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        guidance_scale: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        prediction = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels=None if noise_level is None else noise_level[:, 0].long(),
            timestep_cond=self.embedding(guidance_scale),
            return_dict=False,
        )[0]
        return (prediction,)


def describe(pipe: Any) -> Description:
    """See `exporter.families.Description`."""
    kind = type(pipe).__name__
    check_parts(pipe, "unet", "vae", "text_encoder", "tokenizer")
    check_unet(pipe.unet, kind)
    check_vae(pipe.vae)
    guided = guided_by(pipe.unet, "empty")
    length = text_length(pipe.tokenizer, pipe.text_encoder)
    latents = latents_of(pipe.unet, vae_factor(pipe.vae), multiple_of(pipe.unet))
    scaling = Scaling.plain(pipe.vae)
    width = pipe.text_encoder.config.hidden_size
    states = TensorSpec("float32", ("batch", length, width))
    sample = sample_spec(pipe.unet.config.out_channels)
    text_encoder = Graph(
        Component(
            name="text_encoder",
            role="encoder",
            inputs={"input_ids": ids_spec(length)},
            outputs={"encoder_hidden_states": states},
        ),
        TextEncoder(pipe.text_encoder, pipe.tokenizer),
        pipe.text_encoder.config.vocab_size,
    )
    denoiser = Graph(
        Component(
            name="denoiser",
            role="denoiser",
            inputs={
                "sample": sample,
                "timestep": timestep_spec(),
                "encoder_hidden_states": TensorSpec(
                    "float32", ("batch", sequence(pipe.unet, length), width)
                ),
                **guided.inputs,
            },
            outputs={"prediction": sample},
        ),
        Denoiser(pipe.unet),
        least=least_side(pipe.unet),
    )
    run = from_text(pipe)
    together = type(run).__name__ == "StableDiffusionPipeline"
    description = Description(
        task=Task(TEXT_TO_IMAGE, sides_together=together),
        graphs=(text_encoder, denoiser, decoder_graph(pipe.vae, scaling)),
        latents=latents,
        text_inputs=(TextInput("tokenizer", "input_ids", ("prompt",)),),
        arguments=guided.arguments,
        vectors=guided.vectors,
        guidance=guided.guidance,
        resizable=True,
        denoiser=pipe.unet,
        call=calling(run),
        probe_arguments={
            "prompt": "a large red circle above a small blue square",
            "guidance_scale": PROBE_GUIDANCE,
        },
        embeddings=(Embedding("prompt_embeds", {"encoder_hidden_states": {"input_ids": width}}),),
    )
    tasks = _TASKS.get(kind, _USUAL_TASKS)
    description = with_picture_tasks(pipe, description, tasks, scaling)
    description = with_controlnets(pipe, with_ip_adapter(pipe, description))
    return with_t2i_adapters(pipe, description)
