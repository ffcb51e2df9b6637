"""Graph pieces that text-to-image pipelines with a transformer as the denoiser share."""

from __future__ import annotations

import copy
from typing import Any

import torch

from latentc.exporter.components.description import Graph
from latentc.exporter.components.text_to_image import ids_spec
from latentc.exporter.programs.defaults import defaults_of
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.latents import Latents


def longest_text(pipe: Any) -> int:
    """Return how many tokens of a text the pipeline's call reads by default.

    Raises:
        UnsupportedPipeline: its call does not say.
    """
    usual = defaults_of(type(pipe)).get("max_sequence_length")
    if usual is None:
        raise UnsupportedPipeline(f"{type(pipe).__name__} does not say its max_sequence_length")
    return int(usual[0])


class MaskedT5Encoder(torch.nn.Module):
    """input_ids [batch, length] → the last hidden state [batch, length, width], and the mask
    [batch, length] of float32 that is 1 where there is no padding."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.padding = encoder.config.pad_token_id

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (input_ids != self.padding).to(torch.float32)
        return self.encoder(input_ids, attention_mask=mask).last_hidden_state, mask


def t5_graph(
    module: torch.nn.Module, encoder: Any, name: str, input_name: str, output: str, length: int
) -> Graph:
    """Return a T5 encoder as a component, which attends to padding too, as in the pipelines that
    give it no mask.

    `module` makes a tuple of its last hidden state of the ids [batch, length].
    """
    component = Component(
        name=name,
        role="encoder",
        inputs={input_name: ids_spec(length)},
        outputs={output: TensorSpec("float32", ("batch", length, encoder.config.d_model))},
        positions={output: {input_name: int(encoder.config.d_model)}},
    )
    return Graph(component, module, encoder.config.vocab_size)


def with_module(model: Any, name: str, module: torch.nn.Module) -> Any:
    """Return a copy of `model`, weights shared, that has `module` in the place of its own `name`.

    The pipeline itself, which makes the reference, stays as it is.
    """
    copied = copy.copy(model)
    copied._modules = {**model._modules, name: module}
    return copied


def with_module_at(model: Any, path: str, module: torch.nn.Module) -> Any:
    """Return a copy of `model` as by `with_module`, whose module at a `path` is another one.

    A path is such as ``blocks.0.norm``; what stands on the way is copied too.
    """
    name, _, rest = path.partition(".")
    inner = with_module_at(model._modules[name], rest, module) if rest else module
    return with_module(model, name, inner)


class Rotary(torch.nn.Module):
    """Positions [tokens, axes] → cosines and sines [tokens, width], each twice in a row, as
    diffusers' `FluxPosEmbed`; in float32 instead of float64, which for positions of at most 128
    is right to 8e-6, and to twice that at twice as many."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        for axis, width in enumerate(embed.axes_dim):
            exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
            frequencies = (float(embed.theta) ** -exponents).float()
            self.register_buffer(f"axis_{axis}", frequencies, persistent=False)
        self.axes = len(embed.axes_dim)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axes = range(self.axes)
        angles = torch.cat(
            [positions[:, axis : axis + 1] * self.get_buffer(f"axis_{axis}") for axis in axes],
            dim=1,
        )
        twice = torch.stack([angles, angles], dim=-1).flatten(1)
        return twice.cos(), twice.sin()


def projected(transformer: Any, layer: str = "proj_out", **arguments: Any) -> torch.Tensor:
    """Return what the transformer's last layer gives for its patches, [batch, tokens, width]:
    before it is made an image with tensors of six dimensions, which Core ML has not."""
    seen: list[torch.Tensor] = []
    handle = getattr(transformer, layer).register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        transformer(return_dict=False, **arguments)
    finally:
        handle.remove()
    return seen[-1]


def unpatched(patches: torch.Tensor, sample: torch.Tensor, patch: int) -> torch.Tensor:
    """Return patches as latents [batch, channels, height, width], as `sample` has them.

    The patches of `patch` by `patch` latents are [batch, tokens, patch * patch * channels],
    channels last. Five dimensions do.
    """
    batch, tokens, width = patches.shape
    parts = patches.reshape(batch, tokens, patch * patch, width // patch**2).permute(0, 3, 1, 2)
    return joined(parts, sample, patch)


def packed(sample: torch.Tensor, patch: int) -> torch.Tensor:
    """Return latents [batch, channels, height, width] as patches.

    They are [batch, tokens, channels * patch * patch], channels first. Five dimensions do.
    """
    batch, channels, height, width = sample.shape
    rows, columns = height // patch, width // patch
    grid = sample.reshape(batch * channels, rows, patch, columns, patch)
    parts = grid.permute(0, 1, 3, 2, 4).reshape(batch, channels, rows * columns, -1)
    return parts.permute(0, 2, 1, 3).reshape(batch, rows * columns, -1)


def unpacked(patches: torch.Tensor, sample: torch.Tensor, patch: int) -> torch.Tensor:
    """Return patches as latents [batch, channels, height, width], as `sample` has them.

    The patches are [batch, tokens, channels * patch * patch], channels first.
    """
    batch, tokens, width = patches.shape
    parts = patches.reshape(batch, tokens, width // patch**2, patch**2)
    return joined(parts.permute(0, 2, 1, 3), sample, patch)


def joined(parts: torch.Tensor, sample: torch.Tensor, patch: int) -> torch.Tensor:
    """Return parts [batch, channels, tokens, patch * patch] as [batch, channels, height, width]."""
    batch, channels = parts.shape[:2]
    height, width = sample.shape[-2:]
    rows, columns = height // patch, width // patch
    grid = parts.reshape(batch * channels, rows, columns, patch, patch).permute(0, 1, 3, 2, 4)
    return grid.reshape(batch, channels, height, width)


def latents_of_transformer(
    channels: int,
    side: int,
    factor: int,
    patch: int,
    maximum: int | None = None,
    rounds: bool = False,
) -> Latents:
    """Return the Latents record of a square default of `side` latents.

    Args:
        maximum: the largest side in latents, None where the model has no limit.
        rounds: whether the pipeline makes other sizes smaller to a multiple of the patches.
    """
    return Latents(
        channels=channels,
        factor=factor,
        multiple=patch,
        default_height=side * factor,
        default_width=side * factor,
        maximum=maximum,
        rounds=rounds,
    )


def check_channels(transformer: Any, expected: tuple[int, ...]) -> None:
    """Refuse a transformer whose output is not one of these numbers of channels."""
    config = transformer.config
    found = config.in_channels if config.out_channels is None else config.out_channels
    if found not in expected:
        raise UnsupportedPipeline(
            f"a {type(transformer).__name__} with {config.in_channels} input and {found} output "
            "channels (inpainting, control …) is not supported yet"
        )
