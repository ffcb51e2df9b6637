"""Stable Diffusion 1.x and 2.x (epsilon and v-prediction), those trained for other tasks, and
latent consistency models made from them, whose UNets take the guidance scale as an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from latentc.exporter.components.description import Description, Graph, Tokens
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
    Unpadded,
    check_parts,
    check_unet,
    check_vae,
    for_any_size,
    least_side,
    sequence,
    text_length,
)
from latentc.exporter.programs.draft import Draft
from latentc.exporter.programs.sides import sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec

COMPONENTS = {"text_encoder": ("text_encoder",), "denoiser": ("unet",), "vae_decoder": ("vae",)}
_STATES = "encoder_hidden_states"


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


def describe(pipe: Any, texts: Callable[[Draft], None] | None = None) -> Description:
    """See `latentc.exporter.components.description.Description`.

    Args:
        texts: writes into a program in the place of `write`, for a pipeline that does something
            else with the same parts.
    """
    check_parts(pipe, "unet", "vae", "text_encoder", "tokenizer")
    check_unet(pipe.unet, type(pipe).__name__)
    check_vae(pipe.vae)
    return describe_unet(
        pipe,
        encoders=[_text_encoder(pipe)],
        denoiser=_denoiser(pipe),
        tokens=[Tokens("tokenizer")],
        scaling=Scaling.plain(pipe.vae),
        write=texts or write,
    )


def write(draft: Draft) -> None:
    """Write the texts into a program."""
    for side in sides_of(draft, "empty"):
        ids = side.tokens("input_ids", "tokenizer", "prompt")
        values = side.run("text_encoder", {"input_ids": ids}, {_STATES: "prompt_embeds"})
        side.feed(_STATES, values[_STATES])
    draft.together = draft.stands_for.__name__ == "StableDiffusionPipeline"


def _text_encoder(pipe: Any) -> Graph:
    length = text_length(pipe.tokenizer, pipe.text_encoder)
    width = pipe.text_encoder.config.hidden_size
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={"input_ids": ids_spec(length)},
        outputs={_STATES: TensorSpec("float32", ("batch", length, width))},
        positions={_STATES: {"input_ids": width}},
    )
    vocabulary = pipe.text_encoder.config.vocab_size
    return Graph(component, TextEncoder(pipe.text_encoder, pipe.tokenizer), vocabulary)


def _denoiser(pipe: Any) -> Graph:
    sample = sample_spec(pipe.unet.config.out_channels)
    length = text_length(pipe.tokenizer, pipe.text_encoder)
    width = pipe.text_encoder.config.hidden_size
    states = TensorSpec("float32", ("batch", sequence(pipe.unet, length), width))
    component = Component(
        name="denoiser",
        role="denoiser",
        inputs={
            "sample": sample,
            "timestep": timestep_spec(),
            _STATES: states,
            **scale_inputs(distilled(pipe.unet)),
        },
        outputs={"prediction": sample},
    )
    return Graph(component, Denoiser(pipe.unet), least=least_side(pipe.unet))
