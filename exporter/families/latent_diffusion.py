"""Latent diffusion from a text, as published before Stable Diffusion (Rombach et al. 2022): a text
encoder of diffusers' own without a mask, a UNet and a VAE, which may have a codebook.

`LDMTextToImagePipeline` has neither `negative_prompt` nor `num_images_per_prompt`; bundles have
both. It is guided by every scale but 1; guidance of bundles is for scales above 1, and those below
are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from latentc.exporter.classes import TEXT_TO_IMAGE
from latentc.exporter.components.description import (
    Description,
    Graph,
    Tokens,
    calling,
    latents_of_unet,
)
from latentc.exporter.components.text_to_image import (
    SCALE,
    Scaling,
    classifier_free_guidance,
    decoder_graph,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from latentc.exporter.components.unets import (
    check_parts,
    check_scheduler,
    check_unet,
    check_vae,
    for_any_size,
    least_side,
    multiple_of,
    sequence,
)
from latentc.exporter.programs.draft import Draft
from latentc.exporter.programs.sides import sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline

COMPONENTS = {"text_encoder": ("bert",), "denoiser": ("unet",), "vae_decoder": ("vqvae",)}
_STATES = "encoder_hidden_states"
_WITH_CODEBOOK = "VQModel"
# Constants of `LDMTextToImagePipeline.__call__`: ids of a text, whatever the tokenizer says, and
# pixels of a latent along a side, whatever the VAE does.
_LENGTH, _FACTOR = 77, 8
# Those of its signature that it can run: it does not scale noise and samples, which the third one
# needs, and gives no generator to a scheduler's step, which others draw from.
_SCHEDULERS = ("DDIMScheduler", "PNDMScheduler")
# What diffusers' class does with them.
_UNUSUAL = "scales no noise for its scheduler and gives it no generator"


class TextEncoder(torch.nn.Module):
    """input_ids int64 [batch, 77] → encoder_hidden_states float32 [batch, 77, width]: the last
    hidden state, for which filling counts as much as text, as in the pipeline."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encoder(input_ids, return_dict=False)[0],)


class Denoiser(torch.nn.Module):
    """sample [batch, channels, height, width], timestep [batch] and encoder_hidden_states [batch,
    sequence, width], all float32 → what the UNet predicts, in the form of the sample."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = for_any_size(unet)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        return (self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    check_parts(pipe, "bert", "tokenizer", "unet", "vqvae")
    _check_unet(pipe.unet, type(pipe).__name__)
    _check_vae(pipe.vqvae, pipe.unet)
    check_scheduler(pipe.scheduler, _SCHEDULERS, type(pipe).__name__, _UNUSUAL)
    _check_positions(pipe.bert)
    latents = latents_of_unet(pipe.unet, _FACTOR, multiple_of(pipe.unet))
    draft = Draft(TEXT_TO_IMAGE, type(pipe), latents)
    # The first declaration of an argument counts: the guidance's own has no limit.
    draft.scale(SCALE, 1.0, least=1.0)
    classifier_free_guidance(draft)
    for side in sides_of(draft, "empty"):
        ids = side.tokens("input_ids", "tokenizer", "prompt")
        values = side.run("text_encoder", {"input_ids": ids}, {_STATES: "prompt_embeds"})
        side.feed(_STATES, values[_STATES])
    return Description(
        programs=(draft.program(),),
        graphs=(_text_encoder(pipe), _denoiser(pipe), _decoder(pipe)),
        tokens=(Tokens("tokenizer", _LENGTH),),
        denoiser=pipe.unet,
        call=_call(pipe),
        gives_latents=False,
    )


def _check_unet(unet: Any, pipeline_class: str) -> None:
    """Refuse a UNet that takes no text, or that the pipeline's loop cannot feed again with what it
    predicts.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    if type(unet).__name__ != "UNet2DConditionModel":
        raise UnsupportedPipeline(
            f"a {type(unet).__name__} takes no text, and {pipeline_class} gives it one: diffusers "
            "cannot run it either"
        )
    check_unet(unet, pipeline_class)
    taken, predicted = unet.config.in_channels, unet.config.out_channels
    if taken != predicted:
        raise UnsupportedPipeline(
            f"a UNet with {taken} input and {predicted} output channels does not fit "
            f"{pipeline_class}, which gives it latents alone and subtracts what it predicts"
        )


def _check_vae(vae: Any, unet: Any) -> None:
    """Refuse a VAE for latents of other channels than the UNet's, or that does not make 8 pixels of
    a latent along a side.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    if type(vae).__name__ != _WITH_CODEBOOK:
        check_vae(vae)
    channels, wanted = _latent_channels(vae), unet.config.in_channels
    if channels != wanted:
        raise UnsupportedPipeline(
            f"a VAE for latents of {channels} channels does not fit the UNet, which has {wanted}: "
            "diffusers cannot run them either"
        )
    factor = vae_factor(vae)
    if factor != _FACTOR:
        raise UnsupportedPipeline(
            f"a VAE that makes {factor} pixels of a latent along a side: LDMTextToImagePipeline "
            f"counts on {_FACTOR}, and makes images of another size than asked for"
        )


def _check_positions(bert: Any) -> None:
    """Refuse a text encoder that is too short for the pipeline's texts.

    Raises:
        UnsupportedPipeline: naming both lengths.
    """
    positions = bert.config.max_position_embeddings
    if positions < _LENGTH:
        raise UnsupportedPipeline(
            f"a bert with {positions} positions: LDMTextToImagePipeline makes {_LENGTH} ids of "
            "each text, and diffusers cannot run it either"
        )


def _call(pipe: Any) -> Callable[..., Any]:
    """Return what runs the pipeline (see `latentc.exporter.components.description.calling`), with
    `num_images_per_prompt`, which it has not: as so many prompts next to each other."""
    run = calling(pipe)

    def call(prompt: str | Sequence[str], num_images_per_prompt: int = 1, **arguments: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        repeated = [text for text in prompts for _ in range(num_images_per_prompt)]
        return run(prompt=repeated, **arguments)

    return call


def _latent_channels(vae: Any) -> int:
    """Return how many channels a VAE decodes. One with a codebook is given what it rounds to the
    codebook's vectors (`VQModel.decode`), which may have another width than what they become."""
    of_codebook = vae.config.vq_embed_dim if type(vae).__name__ == _WITH_CODEBOOK else None
    return int(of_codebook or vae.config.latent_channels)


def _decoder(pipe: Any) -> Graph:
    graph = decoder_graph(pipe.vqvae, Scaling.plain(pipe.vqvae))
    latents = sample_spec(_latent_channels(pipe.vqvae))
    return replace(graph, component=structs.replace(graph.component, inputs={"latents": latents}))


def _text_encoder(pipe: Any) -> Graph:
    config = pipe.bert.config
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={"input_ids": ids_spec(_LENGTH)},
        outputs={_STATES: TensorSpec("float32", ("batch", _LENGTH, config.d_model))},
        positions={_STATES: {"input_ids": config.d_model}},
    )
    return Graph(component, TextEncoder(pipe.bert), config.vocab_size)


def _denoiser(pipe: Any) -> Graph:
    sample = sample_spec(pipe.unet.config.in_channels)
    width = pipe.bert.config.d_model
    states = TensorSpec("float32", ("batch", sequence(pipe.unet, _LENGTH), width))
    component = Component(
        name="denoiser",
        role="denoiser",
        inputs={"sample": sample, "timestep": timestep_spec(), _STATES: states},
        outputs={"prediction": sample},
    )
    return Graph(component, Denoiser(pipe.unet), least=least_side(pipe.unet))
