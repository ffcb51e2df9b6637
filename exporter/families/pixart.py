"""PixArt-α and PixArt-Σ text-to-image: a T5 encoder with its mask, a transformer with sine and
cosine positions that scale with the image, learned variance that is left out."""

from __future__ import annotations

import sys
from typing import Any

import torch
from msgspec import structs

from latentc.exporter.classes import TEXT_TO_IMAGE
from latentc.exporter.components.description import Description, Graph, Tokens, calling
from latentc.exporter.components.text_to_image import (
    classifier_free_guidance,
    decoder_graph,
    feed_numbers,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from latentc.exporter.components.transformers import (
    MaskedT5Encoder,
    check_channels,
    latents_of_transformer,
    longest_text,
    projected,
    unpatched,
    with_module,
)
from latentc.exporter.programs.draft import SIDES, Draft
from latentc.exporter.programs.sides import sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "denoiser": ("transformer",),
    "vae_decoder": ("vae",),
}
_RESOLUTION = "resolution"
_STATES, _MASK = "encoder_hidden_states", "encoder_attention_mask"


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
        """Return the sines and cosines of so many places: [count, width / 2]."""
        places = torch.arange(count, dtype=torch.float32) * self.extent / count
        angles = places[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Denoiser(torch.nn.Module):
    """The transformer's predicted noise, without the variance that it may have learnt besides.

    `resolution` [batch, 2]: the image's height and width in pixels, where the transformer is
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
    """Return the sizes that a pipeline makes images in (see
    `latentc.runtimes.bundle.manifest.Latents`): the list that its class has for models of `side`
    latents, empty where it has none."""
    # The class counts 8 pixels for a latent, whatever its VAE does.
    table = getattr(sys.modules[pipeline_class.__module__], f"ASPECT_RATIO_{8 * side}_BIN", {})
    return tuple((float(ratio), int(high), int(wide)) for ratio, (high, wide) in table.items())


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    config = pipe.transformer.config
    check_channels(pipe.transformer, (config.in_channels, 2 * config.in_channels))
    factor = vae_factor(pipe.vae)
    latents = structs.replace(
        latents_of_transformer(config.in_channels, config.sample_size, factor, config.patch_size),
        bins=bins_of(type(pipe), config.sample_size),
    )
    draft = Draft(TEXT_TO_IMAGE, type(pipe), latents)
    classifier_free_guidance(draft)
    for side in sides_of(draft, "empty"):
        ids = side.tokens("input_ids", "tokenizer", "prompt")
        gives = {_STATES: "prompt_embeds", _MASK: "prompt_attention_mask"}
        for name, value in side.run("text_encoder", {"input_ids": ids}, gives).items():
            side.feed(name, value)
    if pipe.transformer.use_additional_conditions:
        feed_numbers(draft, _RESOLUTION, [draft.number(_RESOLUTION, SIDES)])
    encoder = _text_encoder(pipe)
    return Description(
        programs=(draft.program(),),
        graphs=(encoder, _denoiser(pipe, encoder), decoder_graph(pipe.vae)),
        tokens=(Tokens("tokenizer", longest_text(pipe), lowercase=True),),
        denoiser=pipe.transformer,
        # Texts as the runtime reads them.
        call=calling(pipe, clean_caption=False),
    )


def _text_encoder(pipe: Any) -> Graph:
    length, width = longest_text(pipe), pipe.text_encoder.config.d_model
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={"input_ids": ids_spec(length)},
        outputs={
            _STATES: TensorSpec("float32", ("batch", length, width)),
            _MASK: TensorSpec("float32", ("batch", length)),
        },
        positions={_STATES: {"input_ids": width}},
    )
    vocabulary = pipe.text_encoder.config.vocab_size
    return Graph(component, MaskedT5Encoder(pipe.text_encoder), vocabulary)


def _denoiser(pipe: Any, encoder: Graph) -> Graph:
    sample = sample_spec(pipe.transformer.config.in_channels)
    sized = pipe.transformer.use_additional_conditions
    inputs = {
        "sample": sample,
        "timestep": timestep_spec(),
        **encoder.component.outputs,
        **({_RESOLUTION: TensorSpec("float32", ("batch", 2))} if sized else {}),
    }
    component = Component("denoiser", "denoiser", inputs, {"prediction": sample})
    return Graph(component, Denoiser(pipe.transformer))
