"""This module lists what pipelines with a UNet and a VAE can be asked for besides making an image
of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from latentc.exporter.classes import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE, record_of
from latentc.exporter.components.description import Graph
from latentc.exporter.components.signatures import named
from latentc.exporter.components.tasks import trained_tasks
from latentc.exporter.components.tasks.depth import depth_to_image
from latentc.exporter.components.tasks.task import (
    IMAGE,
    MASK,
    NOISE,
    Habits,
    Task,
    encode_image,
    size_by,
)
from latentc.exporter.components.text_to_image import Scaling, encoder_graph
from latentc.exporter.programs.draft import IMAGE_LATENTS, LATENTS, SIDES, Draft, Phase, Start
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.statements import Keep

UNET = Habits(each_made=True, sized_by_image=True, rounds="down")


def image_to_image(encoder: Graph, habits: Habits = UNET) -> Task:
    """Return the task that starts from the noisy latents of an image (Meng et al. 2021, SDEdit)."""

    def write(draft: Draft) -> None:
        draft.image(IMAGE, latents=IMAGE_LATENTS)
        clean = encode_image(
            *(draft, encoder.component, IMAGE_LATENTS, Phase.BEFORE_NOISE),
            each_made=habits.each_made,
        )
        draft.start = Start(clean, rounds=habits.rounds, alone=True)
        if habits.sized_by_image:
            size_by(draft, IMAGE)

    return Task(IMAGE_TO_IMAGE, write, (encoder,))


def blended_inpainting(encoder: Graph, habits: Habits = UNET) -> Task:
    """Return the task for a denoiser that knows no masks: what stays is put back after each step
    (Lugmayr et al. 2022, RePaint, without its resampling). diffusers encodes the masked image too,
    of which only the draw of noise is left."""

    def write(draft: Draft) -> None:
        component = encoder.component
        draft.image(IMAGE)
        draft.mask(MASK)
        clean = encode_image(draft, component, f"_{IMAGE_LATENTS}", Phase.BEFORE_NOISE)
        if NOISE in component.inputs:
            shape = component.inputs[NOISE].shape[1:]
            name, rows = f"_{component.name}_noise", (IMAGE,)
            draft.noise(name, shape, Phase.AFTER_NOISE, rows=rows, always=True)
        mask = draft.pixels("_mask", MASK, (1, *SIDES), Phase.BEFORE_LOOP)
        draft.keep = Keep(value=clean, where=mask, noise=LATENTS)
        draft.start = Start(clean, below_full_strength=True, rounds=habits.rounds)

    return Task(INPAINTING, write, (encoder,))


_OFFERS = {IMAGE_TO_IMAGE: image_to_image, INPAINTING: blended_inpainting}


def tasks_of(pipe: Any, scaling: Scaling) -> tuple[Task, ...]:
    """Return what a pipeline with a UNet can do, its own task first.

    Args:
        scaling: between the VAE's latents and the denoiser's.

    Raises:
        UnsupportedPipeline: the UNet takes channels that nothing is known about.
    """
    encoder = encoder_graph(pipe.vae, scaling)
    own = _own(pipe, encoder)
    offers = () if own.channels or encoder is None else record_of(type(pipe).__name__).offers
    return (own, *(_OFFERS[name](encoder) for name in offers if encoder and name != own.name))


def _own(pipe: Any, encoder: Graph | None) -> Task:
    """Return what the UNet was trained for."""
    own = _trained(pipe, encoder) or Task(TEXT_TO_IMAGE)
    channels, given = pipe.unet.config.out_channels, pipe.unet.config.in_channels
    wanted = channels + sum(own.widths().values())
    if given != wanted:
        raise UnsupportedPipeline(
            f"a UNet with {given} input and {channels} output channels is not supported for "
            f"{type(pipe).__name__}: expected {wanted} input channels"
        )
    return own


def _trained(pipe: Any, encoder: Graph | None) -> Task | None:
    kind, config = type(pipe).__name__, pipe.unet.config
    if kind.endswith("InstructPix2PixPipeline"):
        return trained_tasks.instruct_pix2pix(pipe)
    if kind.endswith("UpscalePipeline"):
        return trained_tasks.upscaling(pipe)
    if kind.endswith("Depth2ImgPipeline"):
        return depth_to_image(pipe, _needed(encoder, kind))
    if config.in_channels != config.out_channels and INPAINTING in record_of(kind).offers:
        return trained_tasks.inpainting(_needed(encoder, kind), UNET)
    if getattr(pipe.config, "requires_aesthetics_score", False):  # none makes images of texts
        return image_to_image(_needed(encoder, kind))
    return None


def _needed(encoder: Graph | None, pipeline_class: str) -> Graph:
    if encoder is None:
        raise UnsupportedPipeline(
            f"{pipeline_class} needs a VAE that encodes images of the form that it decodes to"
        )
    return encoder


class _WithChannels(torch.nn.Module):
    """A denoiser whose sample is joined with other inputs along the channels."""

    def __init__(self, graph: Graph, inputs: Sequence[str], task: Task) -> None:
        super().__init__()
        self.denoiser = graph.module
        self._extra = tuple(task.channels)
        self._folds = task.folded()
        self.forward: Callable[..., Any] = named(self._call, inputs)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        own = {name: value for name, value in inputs.items() if name not in self._extra}
        channels = [inputs["sample"], *(self._as_channels(n, inputs[n]) for n in self._extra)]
        made: tuple[torch.Tensor, ...] = self.denoiser(**own | {"sample": torch.cat(channels, 1)})
        return made

    def _as_channels(self, name: str, value: torch.Tensor) -> torch.Tensor:
        by = self._folds.get(name)
        return value if by is None else trained_tasks.folded(value, by)


def with_inputs(graph: Graph, task: Task) -> Graph:
    """Return the denoiser's graph with the inputs of the task that it was trained for."""
    if not task.inputs and not task.channels:
        return graph
    inputs = {**graph.component.inputs, **task.inputs, **task.channels}
    return replace(
        graph,
        component=structs.replace(graph.component, inputs=inputs),
        module=_WithChannels(graph, list(inputs), task),
        bounds={**graph.bounds, **task.bounds},
    )


def joined_graphs(graphs: Sequence[Graph], tasks: Sequence[Task]) -> tuple[Graph, ...]:
    """Return these graphs and those of the tasks, each once."""
    every = [*graphs, *(graph for task in tasks for graph in task.graphs)]
    by_name: dict[str, Graph] = {}
    for graph in every:
        by_name.setdefault(graph.component.name, graph)
    return tuple(by_name.values())
