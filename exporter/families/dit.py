"""DiT (Peebles and Xie 2022, https://arxiv.org/abs/2212.09748): images of ImageNet's classes, by a
transformer over patches of latents. There are no texts: a call gives numbers of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from latentc.exporter.components.description import Description, Graph, calling
from latentc.exporter.components.text_to_image import (
    SCALE,
    decoder_graph,
    feed_numbers,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from latentc.exporter.components.transformers import (
    check_channels,
    latents_of_transformer,
    projected,
    unpatched,
)
from latentc.exporter.programs.changes import with_sizes
from latentc.exporter.programs.draft import SIDES, Draft
from latentc.exporter.programs.sides import NEGATIVE
from latentc.runtimes.bundle.sizes import fix
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.statements import Program, Push, Test

COMPONENTS = {"denoiser": ("transformer",), "vae_decoder": ("vae",)}
_LABELS = "class_labels"
_NO_CLASS = 1000  # what the pipeline says for no class, whatever the transformer's own number is


class Denoiser(torch.nn.Module):
    """The transformer's predicted noise [batch, channels, height, width], without the variance that
    it may have learnt besides. `class_labels` [batch, 1] are whole numbers of float32."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.channels = transformer.config.in_channels
        self.patch = transformer.config.patch_size

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor]:
        patches = projected(
            self.transformer,
            layer="proj_out_2",
            hidden_states=sample,
            timestep=timestep,
            class_labels=class_labels[:, 0].long(),
        )
        return (unpatched(patches, sample, self.patch)[:, : self.channels],)


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    config = pipe.transformer.config
    check_channels(pipe.transformer, (config.in_channels, 2 * config.in_channels))
    most = _classes(pipe.transformer)
    # The transformer makes square images of its own size alone.
    fixed = dict.fromkeys(SIDES, config.sample_size)
    sample = sample_spec(config.in_channels)
    inputs = {
        "sample": sample,
        "timestep": timestep_spec(),
        _LABELS: TensorSpec("float32", ("batch", 1)),
    }
    component = Component("denoiser", "denoiser", inputs, {"prediction": sample})
    bounds = {_LABELS: (0.0, float(most))}
    decoder = decoder_graph(pipe.vae)
    return Description(
        programs=(with_sizes(_program(pipe, most), fixed),),
        graphs=(
            Graph(fix(component, fixed), Denoiser(pipe.transformer), bounds=bounds),
            Graph(fix(decoder.component, fixed), decoder.module),
        ),
        tokens=(),
        denoiser=pipe.transformer,
        call=_listing_labels(calling(pipe)),
        resizable=False,
        gives_latents=False,
        view=_first_half,
    )


def _program(pipe: Any, most: int) -> Program:
    config = pipe.transformer.config
    factor, patch = vae_factor(pipe.vae), config.patch_size
    latents = latents_of_transformer(config.in_channels, config.sample_size, factor, patch)
    draft = Draft("class-to-image", type(pipe), latents)
    scale = draft.scale(SCALE, 1.0)
    draft.branch("positive")
    when = (Test(argument=scale, above=1.0),)
    draft.branch("negative", NEGATIVE, when, Push(branch="positive", by=scale, less=1.0))
    feed_numbers(draft, _LABELS, [draft.row_number(_LABELS, least=0.0, most=float(most))])
    nothing = draft.row("_no_class", [float(_NO_CLASS)])
    draft.feed(_LABELS, nothing, lambda branch: bool(branch.side))
    return draft.program()


def _classes(transformer: Any) -> int:
    """Return the largest number of a class.

    Raises:
        UnsupportedPipeline: there is none for no class, which guidance needs.
    """
    table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    if table.num_embeddings <= _NO_CLASS:
        raise UnsupportedPipeline(
            f"a DiTTransformer2DModel with {table.num_embeddings} classes: the pipeline says "
            f"{_NO_CLASS} for no class, and diffusers cannot guide it either"
        )
    return int(table.num_embeddings) - 1


def _listing_labels(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of diffusers' pipeline, which wants a list of integers."""

    def run(**arguments: Any) -> Any:
        labels = arguments.pop(_LABELS)
        several = labels if isinstance(labels, list | tuple) else [labels]
        return call(class_labels=[int(label) for label in several], **arguments)

    return run


def _first_half(held: torch.Tensor, named: Mapping[str, Any]) -> torch.Tensor:
    """Return the latents of a loop that holds each twice where it is guided: the second half has no
    class."""
    labels = named[_LABELS]
    half = len(labels) // 2
    guided = half > 0 and len(labels) % 2 == 0 and bool((labels[half:] == _NO_CLASS).all())
    return held[:half] if guided and len(held) == len(labels) else held
