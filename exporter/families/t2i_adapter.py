"""T2I-Adapters (Mou et al. 2023, https://arxiv.org/abs/2302.08453): each is a component that runs
once for a call, and whose features the denoiser adds to those of its own blocks.

The features have several resolutions. They travel as one tensor of the latents' height and width:
pixels of the smaller ones are rearranged from channels (`torch.nn.functional.pixel_shuffle`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch.nn import functional

from exporter.families import Description, Graph
from exporter.families.extended import Extended, extended
from exporter.families.text_to_image import vae_factor
from exporter.names import T2I_ADAPTER, numbered, pictures
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Argument, Component, TensorSpec, VectorInput
from runtimes.tasks import Feed, Preparation, Task

IMAGE = "image"  # as diffusers' pipelines call the picture
SCALE, SHARE = "adapter_conditioning_scale", "adapter_conditioning_factor"
_FEATURES = "adapter_features"
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow makes pictures grey


@dataclass(frozen=True)
class Feature:
    """One of an adapter's results: its channels, and latents per value along a side."""

    channels: int
    ratio: int

    @property
    def packed(self) -> int:
        """Channels of the same values at the latents' resolution."""
        return math.ceil(self.channels / self.ratio**2)


def with_t2i_adapters(pipe: Any, description: Description) -> Description:
    """The same with the pipeline's T2I-Adapters, where it has any.

    Raises:
        UnsupportedPipeline: they do not fit the UNet, or the pipeline does something else than
            text-to-image.
    """
    adapters = adapters_of(pipe)
    if not adapters:
        return description
    if description.task.pictures:
        raise UnsupportedPipeline(
            f"T2I-Adapters are supported for text-to-image, not for {description.task.name}"
        )
    features = features_of(pipe)
    graphs = [_graph(each, i, features, pipe) for i, each in enumerate(adapters)]
    coarsest = max(each.ratio for each in features)
    if description.latents.multiple % coarsest:
        raise UnsupportedPipeline(
            f"the T2I-Adapter needs latents that are multiples of {coarsest}, and the UNet has "
            f"multiples of {description.latents.multiple}"
        )
    denoisers = [
        _adapted(each, pipe.unet, features, len(adapters))
        if each.component.role == "denoiser"
        else each
        for each in description.graphs
    ]
    arguments = [Argument(SCALE, (1.0,) * len(adapters), spread=True)]
    shared = SHARE in inspect.signature(type(pipe).__call__).parameters
    if shared:
        arguments.append(Argument(SHARE, (1.0,), (0.0, 1.0)))
    vector = VectorInput(SCALE, (SCALE,), until=SHARE if shared else None)
    return replace(
        description,
        task=_with_images(description.task, graphs),
        offers=(),  # diffusers has no pipelines for them to be compared with
        graphs=(*denoisers, *graphs),
        arguments=(*description.arguments, *arguments),
        vectors=(*description.vectors, vector),
        call=_called(description.call, adapters),
        probe_pictures=lambda height, width: {IMAGE: _probe_images(len(adapters), height, width)},
    )


def adapters_of(pipe: Any) -> list[Any]:
    """The pipeline's T2I-Adapters, in their order."""
    held = getattr(pipe, "adapter", None)
    if held is None:
        return []
    return list(held.adapters) if hasattr(held, "adapters") else [held]


def features_of(pipe: Any) -> tuple[Feature, ...]:
    """What the UNet takes of each adapter's features, the same for all of them.

    Raises:
        UnsupportedPipeline: they do not fit the UNet's blocks, or each other.
    """
    every = {_features(each, vae_factor(pipe.vae)) for each in adapters_of(pipe)}
    if len(every) > 1:
        raise UnsupportedPipeline("T2I-Adapters of different forms cannot be added to each other")
    (made,) = every
    taken = _places(pipe.unet)
    blocks = len(taken) - 1
    fit = made[:blocks] == taken[: min(len(made), blocks)]
    if not made or not fit:
        raise UnsupportedPipeline(
            f"a T2I-Adapter that gives {_spoken(made)} does not fit the UNet, which takes "
            f"{_spoken(taken)}"
        )
    # The middle block takes the next one if it fits, and leaves it otherwise.
    return made[: blocks + 1] if made[blocks : blocks + 1] == taken[blocks:] else made[:blocks]


def _features(adapter: Any, factor: int) -> tuple[Feature, ...]:
    """Found out by running the adapter without its weights."""
    channels = int(adapter.config.in_channels)
    if channels not in (1, 3):
        raise UnsupportedPipeline(
            f"a T2I-Adapter for pictures of {channels} channels is not supported, only 1 and 3"
        )
    side = math.lcm(int(adapter.total_downscale_factor), factor)
    with torch.device("meta"), torch.no_grad():
        twin = type(adapter).from_config(adapter.config)
        made = twin(torch.zeros(1, channels, side, side))
    ratios = [(side // factor, int(each.shape[2])) for each in made]
    if any(latents % small for latents, small in ratios):
        raise UnsupportedPipeline(
            f"a T2I-Adapter with the downscale_factor {adapter.downscale_factor} does not fit a "
            f"VAE with {factor} pixels per latent"
        )
    return tuple(
        Feature(int(each.shape[1]), latents // small)
        for each, (latents, small) in zip(made, ratios, strict=True)
    )


def _places(unet: Any) -> tuple[Feature, ...]:
    """Where diffusers' UNet adds features: in each block that goes down, before its downsampling if
    it looks at the text, and after the middle block."""
    found, ratio = [], 1
    channels = [int(each) for each in unet.config.block_out_channels]
    for count, block in zip(channels, unet.down_blocks, strict=True):
        below = ratio * (1 if block.downsamplers is None else 2)
        attends = getattr(block, "has_cross_attention", False)
        found.append(Feature(count, ratio if attends else below))
        ratio = below
    return (*found, Feature(channels[-1], ratio))


def _spoken(features: Sequence[Feature]) -> str:
    return ", ".join(f"{each.channels} channels at 1/{each.ratio}" for each in features)


class Adapter(torch.nn.Module):
    """image [batch, 3, f*height, f*width] in [0, 1] → packed features [batch, sum of
    `Feature.packed`, height, width]."""

    def __init__(self, adapter: Any, features: Sequence[Feature]) -> None:
        super().__init__()
        self.adapter = adapter
        self._features = tuple(features)
        self._grey = int(adapter.config.in_channels) == 1
        for module in adapter.modules():
            if isinstance(module, torch.nn.AvgPool2d):
                # Sizes are even here, and a captured program needs no rule for others.
                module.ceil_mode = False

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        if self._grey:
            weights = zip(_GREY, torch.split(image, 1, dim=1), strict=True)
            image = torch.stack([weight * each for weight, each in weights]).sum(dim=0)
        made = self.adapter(image)
        return (torch.cat([_packed(m, f) for m, f in zip(made, self._features, strict=False)], 1),)


def _packed(made: torch.Tensor, feature: Feature) -> torch.Tensor:
    missing = feature.packed * feature.ratio**2 - feature.channels
    return functional.pixel_shuffle(functional.pad(made, (0, 0, 0, 0, 0, missing)), feature.ratio)


def _unpacked(packed: torch.Tensor, features: Sequence[Feature]) -> list[torch.Tensor]:
    parts = torch.split(packed, [each.packed for each in features], dim=1)
    return [
        functional.pixel_unshuffle(part, each.ratio)[:, : each.channels]
        for part, each in zip(parts, features, strict=True)
    ]


def _graph(adapter: Any, index: int, features: Sequence[Feature], pipe: Any) -> Graph:
    factor = vae_factor(pipe.vae)
    image = TensorSpec("float32", ("batch", 3, f"{factor}*height", f"{factor}*width"))
    made = {_FEATURES: _packed_spec(features)}
    component = Component(numbered(T2I_ADAPTER, index), "image_encoder", {"image": image}, made)
    return Graph(component, Adapter(adapter, features))


def _packed_spec(features: Sequence[Feature]) -> TensorSpec:
    return TensorSpec("float32", ("batch", sum(f.packed for f in features), "height", "width"))


def _with_images(task: Task, graphs: Sequence[Graph]) -> Task:
    names = pictures(IMAGE, len(graphs))
    runs = tuple(
        Preparation(
            graph.component.name, {"image": Feed(name)}, {_FEATURES: numbered(_FEATURES, index)}
        )
        for index, (name, graph) in enumerate(zip(names, graphs, strict=True))
    )
    kinds = dict.fromkeys(names, "image")
    return structs.replace(task, pictures=kinds, preparations=runs, size_of=names[0])


class _Adapted(Extended):
    """A denoiser whose UNet is given the adapters' features.

    Inputs besides: those of each adapter, packed, and the conditioning scales [batch, number of
    adapters].
    """

    def __init__(
        self, graph: Graph, unet: Any, features: Sequence[Feature], inputs: Sequence[str]
    ) -> None:
        super().__init__(graph, unet, inputs)
        self._features = tuple(features)
        self._given = [name for name in inputs if name.startswith(_FEATURES)]

    def _more(
        self,
        inputs: Mapping[str, torch.Tensor],
        args: tuple[Any, ...],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {"down_intrablock_additional_residuals": self._sums(inputs)}

    def _sums(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of the features of all adapters, each as strong as its scale says; the UNet takes from
        the list."""
        every = [
            inputs[name] * inputs[SCALE][:, index].reshape(-1, 1, 1, 1)
            for index, name in enumerate(self._given)
        ]
        return _unpacked(sum(every[1:], every[0]), self._features)


def _adapted(graph: Graph, unet: Any, features: Sequence[Feature], count: int) -> Graph:
    packed = {numbered(_FEATURES, index): _packed_spec(features) for index in range(count)}
    inputs = {**packed, SCALE: TensorSpec("float32", ("batch", count))}
    return extended(graph, inputs, lambda own, names: _Adapted(own, unet, features, names))


def _called(call: Callable[..., Any], adapters: Sequence[Any]) -> Callable[..., Any]:
    """diffusers wants grey pictures where an adapter has one channel, and a list of scales for
    several adapters."""
    grey = [int(each.config.in_channels) == 1 for each in adapters]

    def run(**arguments: Any) -> Any:
        several = len(grey) > 1
        given = arguments.pop(IMAGE)
        made = [
            each.convert("L") if one else each
            for each, one in zip(given if several else [given], grey, strict=True)
        ]
        if several:
            arguments.setdefault(SCALE, [1.0] * len(grey))
        return call(image=made if several else made[0], **arguments)

    return run


def _probe_images(count: int, height: int, width: int) -> Any:
    """White rings on black, smaller ones for a second adapter, and so on."""
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width] / max(height, width) - 0.4
    made = []
    for index in range(count):
        ring = (np.abs(np.hypot(x, y) - 0.25 / (index + 1)) < 0.05).astype(np.uint8) * 255
        made.append(Image.fromarray(np.stack([ring] * 3, axis=-1)))
    return made if count > 1 else made[0]
