"""PixArt-α and PixArt-Σ text-to-image: a T5 encoder with its mask, a transformer with sine and
cosine positions that scale with the picture, learned variance that is left out."""

from __future__ import annotations

import sys
from typing import Any

import torch
from msgspec import structs

from exporter.families import Description, Graph, TextInput, calling
from exporter.families.defaults import longest_text
from exporter.families.text_to_image import (
    PROBE_GUIDANCE,
    classifier_free_guidance,
    decoder_graph,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from exporter.families.transformer_parts import (
    MaskedT5Encoder,
    check_channels,
    latents_of_transformer,
    projected,
    unpatched,
    with_module,
)
from runtimes.manifest import Component, TensorSpec
from runtimes.sizes import BINNING
from runtimes.version_1.fields import Argument, Embedding, VectorInput
from runtimes.version_1.tasks import Task

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "denoiser": ("transformer",),
    "vae_decoder": ("vae",),
}
_RESOLUTION = "resolution"


class Positions(torch.nn.Module):
    """latents [batch, channels, height, width] → patches [batch, tokens, width]: the convolution
    of a `PatchEmbed` of diffusers, and its sines and cosines for any size: the first half of the
    width says the column, the second the row (`get_2d_sincos_pos_embed` there).

    In float32, where diffusers has float64: positions are at most as many as the default size has
    patches along a side, which float32 has to 4e-6.
    """

    frequencies: torch.Tensor

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.proj = embed.proj
        self.patch = embed.patch_size
        self.extent = embed.base_size / embed.interpolation_scale
        quarter = embed.pos_embed.shape[-1] // 4
        exponents = torch.arange(quarter, dtype=torch.float64) / quarter
        self.register_buffer("frequencies", (10000.0**-exponents).float(), persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        height, width = (side // self.patch for side in latents.shape[-2:])
        rows, columns = self._waves(height), self._waves(width)
        joined = torch.cat(
            [
                columns[None].expand(height, -1, -1),
                rows[:, None].expand(-1, width, -1),
            ],
            dim=-1,
        )
        patches: torch.Tensor = self.proj(latents).flatten(2).transpose(1, 2)
        return patches + joined.reshape(1, height * width, -1)

    def _waves(self, count: int) -> torch.Tensor:
        """[count, width / 2]"""
        places = torch.arange(count, dtype=torch.float32) * self.extent / count
        angles = places[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Denoiser(torch.nn.Module):
    """The transformer's predicted noise, without the variance that it may have learnt besides.

    `resolution` [batch, 2]: the picture's height and width in pixels, where the transformer is
    conditioned on them and their ratio.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = with_module(transformer, "pos_embed", Positions(transformer.pos_embed))
        self.channels = transformer.config.in_channels
        self.patch = transformer.config.patch_size

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        resolution: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        added = None
        if resolution is not None:
            ratio = resolution[:, :1] / resolution[:, 1:]
            added = {"resolution": resolution, "aspect_ratio": ratio}
        patches = projected(
            self.transformer,
            hidden_states=sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            added_cond_kwargs=added,
        )
        return (unpatched(patches, sample, self.patch)[:, : self.channels],)


def bins_of(pipeline_class: type, side: int) -> tuple[tuple[float, int, int], ...]:
    """Return the sizes that a pipeline makes images in (see `runtimes.manifest.Latents`): the list
    that its class has for models of `side` latents, empty where it has none."""
    # The class counts 8 pixels for a latent, whatever its VAE does.
    table = getattr(sys.modules[pipeline_class.__module__], f"ASPECT_RATIO_{8 * side}_BIN", {})
    return tuple((float(ratio), int(high), int(wide)) for ratio, (high, wide) in table.items())


def describe(pipe: Any) -> Description:
    """See `exporter.families.Description`."""
    config = pipe.transformer.config
    check_channels(pipe.transformer, (config.in_channels, 2 * config.in_channels))
    length, width = longest_text(pipe), pipe.text_encoder.config.d_model
    sized = pipe.transformer.use_additional_conditions
    sample = sample_spec(config.in_channels)
    states = {
        "encoder_hidden_states": TensorSpec("float32", ("batch", length, width)),
        "encoder_attention_mask": TensorSpec("float32", ("batch", length)),
    }
    text_encoder = Graph(
        Component("text_encoder", "encoder", {"input_ids": ids_spec(length)}, states),
        MaskedT5Encoder(pipe.text_encoder),
        pipe.text_encoder.config.vocab_size,
    )
    denoiser = Graph(
        Component(
            name="denoiser",
            role="denoiser",
            inputs={
                "sample": sample,
                "timestep": timestep_spec(),
                **states,
                **({_RESOLUTION: TensorSpec("float32", ("batch", 2))} if sized else {}),
            },
            outputs={"prediction": sample},
        ),
        Denoiser(pipe.transformer),
    )
    factor = vae_factor(pipe.vae)
    return Description(
        task=Task("text-to-image"),
        graphs=(text_encoder, denoiser, decoder_graph(pipe.vae)),
        latents=structs.replace(
            latents_of_transformer(
                config.in_channels, config.sample_size, factor, config.patch_size
            ),
            bins=bins_of(type(pipe), config.sample_size),
        ),
        text_inputs=(TextInput("tokenizer", "input_ids", ("prompt",), length, lowercase=True),),
        arguments=(Argument(_RESOLUTION, ("height", "width")),) if sized else (),
        vectors=(VectorInput(_RESOLUTION, (_RESOLUTION,)),) if sized else (),
        guidance=classifier_free_guidance("empty"),
        resizable=True,
        denoiser=pipe.transformer,
        # Texts as the runtime reads them.
        call=calling(pipe, clean_caption=False),
        probe_arguments={
            BINNING: False,  # what is small and quick
            "prompt": "a large red circle above a small blue square",
            "guidance_scale": PROBE_GUIDANCE,
        },
        embeddings=(
            Embedding("prompt_embeds", {"encoder_hidden_states": {"input_ids": width}}),
            Embedding("prompt_attention_mask", {"encoder_attention_mask": {}}),
        ),
    )
