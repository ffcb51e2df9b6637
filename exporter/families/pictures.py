"""What pipelines with a VAE can be asked for besides making a picture of a text: the tasks, and the
graphs that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from msgspec import structs

from exporter.families import Description, Graph, Offer
from exporter.families.text_to_image import encoder_graph
from exporter.signatures import named
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import TensorSpec
from runtimes.tasks import NOISE, START, Feed, Preparation, Task

# Names of tasks, as diffusers calls its pipelines.
TEXT_TO_IMAGE = "text-to-image"
IMAGE_TO_IMAGE = "image-to-image"
INPAINTING = "inpainting"
_IMAGE, _MASK = "image", "mask_image"  # arguments of diffusers' calls
_OUTSIDE = Feed(_IMAGE, _MASK, 0.5)  # diffusers makes what is masked 0 on its scale of -1 to 1
# Denoiser inputs of UNets that were trained for inpainting, besides the sample.
_MASK_INPUT, _MASKED_LATENTS = "mask", "masked_image_latents"


def image_to_image(vae: Any, strength: float) -> Offer:
    """From the noisy latents of a picture (Meng et al. 2021, SDEdit)."""
    encoder = encoder_graph(vae)
    name = encoder.component.name
    start = Preparation(name, {"image": Feed(_IMAGE)}, {"latents": START}, each=True)
    task = Task(IMAGE_TO_IMAGE, {_IMAGE: "image"}, (start,), strength=strength, size_of=_IMAGE)
    return Offer(task, (encoder,))


def blended_inpainting(vae: Any, strength: float) -> Offer:
    """With a denoiser that knows no masks: what stays is put back after each step (Lugmayr et al.
    2022, RePaint, without its resampling). diffusers encodes the masked picture too, of which only
    the draw of noise is left."""
    encoder = encoder_graph(vae)
    name, feeds = encoder.component.name, {"image": Feed(_IMAGE)}
    start = Preparation(name, feeds, {"latents": START})
    drawn = Preparation(name, feeds, {}, late=True)
    task = Task(
        INPAINTING,
        {_IMAGE: "image", _MASK: "mask"},
        (start, drawn) if NOISE in encoder.component.inputs else (start,),
        blend=_MASK,
        strength=strength,
        noise_at_full_strength=True,
    )
    return Offer(task, (encoder,))


@dataclass(frozen=True)
class Trained:
    """A task that a UNet was trained for: it takes more channels than the sample's, `inputs` in
    their order, from pictures."""

    offer: Offer
    inputs: Mapping[str, TensorSpec]


def trained_inpainting(pipe: Any, strength: float) -> Trained:
    """The UNet takes the mask and the latents of what is around it."""
    encoder = encoder_graph(pipe.vae)
    name = encoder.component.name
    start = Preparation(name, {"image": Feed(_IMAGE)}, {"latents": START}, below_full_strength=True)
    around = Preparation(name, {"image": _OUTSIDE}, {"latents": _MASKED_LATENTS}, late=True)
    task = Task(
        INPAINTING,
        {_IMAGE: "image", _MASK: "mask"},
        (start, around),
        {_MASK_INPUT: Feed(_MASK)},
        strength=strength,
        noise_at_full_strength=True,
    )
    channels = pipe.vae.config.latent_channels
    inputs = {_MASK_INPUT: _channels(1), _MASKED_LATENTS: _channels(channels)}
    return Trained(Offer(task, (encoder,)), inputs)


def with_picture_tasks(
    pipe: Any, description: Description, strengths: Mapping[str, float]
) -> Description:
    """A description of text-to-image, with what else the pipeline can do, or does instead.

    Args:
        strengths: diffusers' default for each task that the pipeline has.

    Raises:
        UnsupportedPipeline: the UNet takes channels that nothing is known about.
    """
    channels, extra = description.latents.channels, pipe.unet.config.in_channels
    if extra == channels:
        offered = [
            make(pipe.vae, strengths[name]) for name, make in _OFFERS.items() if name in strengths
        ]
        return replace(description, offers=tuple(offered))
    if extra != 2 * channels + 1 or INPAINTING not in strengths:
        raise UnsupportedPipeline(
            f"a UNet with {extra} input and {channels} output channels is not supported for "
            f"{type(pipe).__name__}: expected {channels}, or {2 * channels + 1} of one that was "
            "trained for inpainting"
        )
    return _as_trained(pipe, description, trained_inpainting(pipe, strengths[INPAINTING]))


_OFFERS = {IMAGE_TO_IMAGE: image_to_image, INPAINTING: blended_inpainting}


def from_text(pipe: Any) -> Any:
    """The pipeline that makes pictures of texts alone with the same parts, where it can."""
    from diffusers import AutoPipelineForText2Image

    other = type(pipe).__name__.endswith(("Img2ImgPipeline", "InpaintPipeline"))
    if not other or pipe.unet.config.in_channels != pipe.unet.config.out_channels:
        return pipe
    made = AutoPipelineForText2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


def _as_trained(pipe: Any, description: Description, trained: Trained) -> Description:
    sizes = {"sample": description.latents.channels}
    sizes |= {name: int(spec.shape[1]) for name, spec in trained.inputs.items()}
    graphs = [
        _with_channels(each, trained.inputs) if each.component.role == "denoiser" else each
        for each in description.graphs
    ]
    return replace(
        description,
        task=trained.offer.task,
        graphs=(*graphs, *trained.offer.graphs),
        observed=partial(_parts, sizes),
        probe_pictures=_probe_pictures,
    )


class _WithChannels(torch.nn.Module):
    """A denoiser whose sample is joined with other inputs along the channels."""

    def __init__(self, graph: Graph, inputs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self.denoiser = graph.module
        self._extra = tuple(inputs)
        self.forward: Callable[..., Any] = named(self._call, [*graph.component.inputs, *inputs])

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        own = {name: value for name, value in inputs.items() if name not in self._extra}
        channels = [inputs["sample"], *(inputs[name] for name in self._extra)]
        made: tuple[torch.Tensor, ...] = self.denoiser(**own | {"sample": torch.cat(channels, 1)})
        return made


def _with_channels(graph: Graph, inputs: Mapping[str, TensorSpec]) -> Graph:
    component = structs.replace(graph.component, inputs={**graph.component.inputs, **inputs})
    return replace(graph, component=component, module=_WithChannels(graph, inputs))


def _channels(count: int) -> TensorSpec:
    return TensorSpec("float32", ("batch", count, "height", "width"))


def _parts(sizes: Mapping[str, int], joined: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs that such a UNet is given as one tensor."""
    return dict(zip(sizes, torch.split(joined, list(sizes.values()), dim=1), strict=True))


def _probe_pictures(height: int, width: int) -> dict[str, Any]:
    """A picture of smooth colours with an edge, and a mask of its middle, as Pillow images."""
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(7 * x + 3 * y + k) for k in range(3)], axis=-1)
    pixels = (waves * 100 + 127).astype(np.uint8)
    pixels[: height // 3] = (250, 20, 30)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = 255
    return {_IMAGE: Image.fromarray(pixels), _MASK: Image.fromarray(mask)}
