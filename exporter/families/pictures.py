"""What pipelines with a VAE can be asked for besides making a picture of a text: the tasks, and the
graphs that they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from msgspec import structs

from exporter.families import Description, Graph, Offer, trained_tasks
from exporter.families.defaults import class_of
from exporter.families.depth import depth_to_image
from exporter.families.text_to_image import Scaling, encoder_graph
from exporter.families.trained_tasks import IMAGE, MASK, Trained
from exporter.signatures import named
from runtimes.errors import UnsupportedPipeline
from runtimes.version_1.tasks import NOISE, START, Feed, Preparation, Task

# Names of tasks, as diffusers calls its pipelines.
TEXT_TO_IMAGE = "text-to-image"
IMAGE_TO_IMAGE = "image-to-image"
INPAINTING = "inpainting"


def image_to_image(encoder: Graph) -> Offer:
    """From the noisy latents of a picture (Meng et al. 2021, SDEdit)."""
    name = encoder.component.name
    start = Preparation(name, {"image": Feed(IMAGE)}, {"latents": START}, each=True)
    task = Task(IMAGE_TO_IMAGE, {IMAGE: "image"}, (start,), strength=1.0, size_of=IMAGE)
    return Offer(task, (encoder,))


def blended_inpainting(encoder: Graph) -> Offer:
    """With a denoiser that knows no masks: what stays is put back after each step (Lugmayr et al.
    2022, RePaint, without its resampling). diffusers encodes the masked picture too, of which only
    the draw of noise is left."""
    name, feeds = encoder.component.name, {"image": Feed(IMAGE)}
    start = Preparation(name, feeds, {"latents": START})
    drawn = Preparation(name, feeds, {}, late=True)
    task = Task(
        INPAINTING,
        {IMAGE: "image", MASK: "mask"},
        (start, drawn) if NOISE in encoder.component.inputs else (start,),
        blend=MASK,
        strength=1.0,
        noise_at_full_strength=True,
    )
    return Offer(task, (encoder,))


def with_picture_tasks(
    pipe: Any, description: Description, tasks: Collection[str], scaling: Scaling
) -> Description:
    """A description of text-to-image, with what else the pipeline can do, or does instead.

    Args:
        tasks: those that diffusers has classes for with the same parts.
        scaling: between the VAE's latents and the denoiser's.

    Raises:
        UnsupportedPipeline: the UNet takes channels that nothing is known about.
    """
    encoder = encoder_graph(pipe.vae, scaling)
    trained = _trained(pipe, description, tasks, encoder)
    if trained is not None:
        description = as_trained(description, trained)
        if trained.channels:
            return description
    offered = [
        make(encoder)
        for name, make in _OFFERS.items()
        if name in tasks and name != description.task.name and encoder is not None
    ]
    return replace(description, offers=tuple(offered))


def _trained(
    pipe: Any, description: Description, tasks: Collection[str], encoder: Graph | None
) -> Trained | None:
    """What the UNet was trained for, if that is not text-to-image."""
    channels, found = description.latents.channels, pipe.unet.config.in_channels
    kind = type(pipe).__name__
    made = None
    if kind.endswith("InstructPix2PixPipeline"):
        made = trained_tasks.instruct_pix2pix(pipe, description.guidance)
    elif kind.endswith("UpscalePipeline"):
        made = trained_tasks.upscaling(pipe)
    elif kind.endswith("Depth2ImgPipeline"):
        made = depth_to_image(pipe, _needed(encoder, kind))
    elif found != channels and INPAINTING in tasks:
        made = trained_tasks.inpainting(_needed(encoder, kind))
    elif getattr(pipe.config, "requires_aesthetics_score", False):  # none makes images of texts
        made = Trained(image_to_image(_needed(encoder, kind)), {})
    wanted = channels + sum(made.widths().values()) if made else 0
    if found != (wanted or channels):
        raise UnsupportedPipeline(
            f"a UNet with {found} input and {channels} output channels is not supported for "
            f"{kind}: expected {wanted or channels} input channels"
        )
    return made


def _needed(encoder: Graph | None, pipeline_class: str) -> Graph:
    if encoder is None:
        raise UnsupportedPipeline(
            f"{pipeline_class} needs a VAE that encodes pictures of the form that it decodes to"
        )
    return encoder


_OFFERS = {IMAGE_TO_IMAGE: image_to_image, INPAINTING: blended_inpainting}


def from_text(pipe: Any) -> Any:
    """The pipeline that makes pictures of texts alone with the same parts, where it can."""
    if pipe.unet.config.in_channels != pipe.unet.config.out_channels:
        return pipe
    if getattr(pipe.config, "requires_aesthetics_score", False):
        return of_class(pipe, IMAGE_TO_IMAGE)  # the least that such a model takes
    return made_from_text(pipe)


def made_from_text(pipe: Any) -> Any:
    """The pipeline that makes pictures of texts alone with the same parts."""
    return of_class(pipe, TEXT_TO_IMAGE)


def of_class(pipe: Any, task: str) -> Any:
    """The pipeline of diffusers' class for a task with the same parts."""
    cls: Any = class_of(pipe, task)
    if cls is type(pipe):
        return pipe
    made = cls.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


def as_trained(description: Description, trained: Trained) -> Description:
    """A description of text-to-image, of a denoiser that was trained for something else."""
    sizes = {"sample": description.latents.channels, **trained.widths()}
    graphs = [
        _with_inputs(each, trained) if each.component.role == "denoiser" else each
        for each in description.graphs
    ]
    guidance = trained.guidance or description.guidance
    latents = description.latents
    return replace(
        description,
        latents=structs.replace(latents, multiple=math.lcm(latents.multiple, trained.multiple)),
        task=trained.offer.task,
        graphs=(*graphs, *trained.offer.graphs),
        observed=partial(_parts, sizes, trained.folded()),
        probe_pictures=partial(_probe_pictures, trained.offer.task),
        arguments=(*description.arguments, *trained.arguments),
        vectors=(*description.vectors, *trained.vectors),
        guidance=guidance,
        probe_arguments={**description.probe_arguments, **_probe_strength(trained.offer.task)},
    )


def _probe_strength(task: Task) -> dict[str, float]:
    """So that the probe has some steps, and yet starts from the picture."""
    return {"strength": 0.7} if task.strength is not None and not task.masks() else {}


class _WithChannels(torch.nn.Module):
    """A denoiser whose sample is joined with other inputs along the channels."""

    def __init__(self, graph: Graph, inputs: Sequence[str], trained: Trained) -> None:
        super().__init__()
        self.denoiser = graph.module
        self._extra = tuple(trained.channels)
        self._folds = trained.folded()
        self.forward: Callable[..., Any] = named(self._call, inputs)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        own = {name: value for name, value in inputs.items() if name not in self._extra}
        channels = [inputs["sample"], *(self._as_channels(n, inputs[n]) for n in self._extra)]
        made: tuple[torch.Tensor, ...] = self.denoiser(**own | {"sample": torch.cat(channels, 1)})
        return made

    def _as_channels(self, name: str, value: torch.Tensor) -> torch.Tensor:
        by = self._folds.get(name)
        return value if by is None else trained_tasks.folded(value, by)


def _with_inputs(graph: Graph, trained: Trained) -> Graph:
    if not trained.inputs and not trained.channels:
        return graph
    inputs = {**graph.component.inputs, **trained.inputs, **trained.channels}
    return replace(
        graph,
        component=structs.replace(graph.component, inputs=inputs),
        module=_WithChannels(graph, list(inputs), trained),
        bounds={**graph.bounds, **trained.bounds},
    )


def _parts(
    sizes: Mapping[str, int], folds: Mapping[str, int], joined: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The inputs that such a UNet is given as one tensor."""
    parts = zip(sizes, torch.split(joined, list(sizes.values()), dim=1), strict=True)
    return {n: trained_tasks.unfolded(p, folds[n]) if n in folds else p for n, p in parts}


def _probe_pictures(task: Task, height: int, width: int) -> dict[str, Any]:
    """What the task takes, for a result of that size, as Pillow images: a picture of smooth colours
    with an edge, and a mask of its middle."""
    height, width = height // task.enlarges, width // task.enlarges
    every = {"image": probe_image(height, width), "mask": probe_mask(height, width)}
    return {name: every[kind] for name, kind in task.pictures.items()}


def probe_image(height: int, width: int, number: int = 0) -> Any:
    """Return a Pillow image of smooth colours with an edge, another one for each `number`."""
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(7 * x + (3 + number) * y + k) for k in range(3)], axis=-1)
    pixels = (waves * 100 + 127).astype(np.uint8)
    pixels[: height // 3] = (250, 20, 30 + 40 * number)
    return Image.fromarray(pixels)


def probe_mask(height: int, width: int) -> Any:
    """Return a Pillow mask of the middle."""
    from PIL import Image

    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = 255
    return Image.fromarray(mask)
