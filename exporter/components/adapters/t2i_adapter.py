"""T2I-Adapters (Mou et al. 2023, https://arxiv.org/abs/2302.08453): each is a component that runs
once for a call, and whose features the denoiser adds to those of its own blocks.

The features have several resolutions. They travel as one tensor of the latents' height and width:
pixels of the smaller ones are rearranged from channels (`torch.nn.functional.pixel_shuffle`), and
zeros follow where they do not fill it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec import structs
from torch.nn import functional

from latentc.exporter.components.description import Graph
from latentc.exporter.components.extended import Extended, extended
from latentc.exporter.components.names import T2I_ADAPTER, numbered
from latentc.exporter.components.tasks.task import IMAGE, size_by
from latentc.exporter.components.text_to_image import vae_factor
from latentc.exporter.programs.defaults import takes
from latentc.exporter.programs.draft import Draft, Phase
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.programs.statements import During, Window

SCALE, SHARE = "adapter_conditioning_scale", "adapter_conditioning_factor"
_FEATURES = "adapter_features"
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow makes images grey


@dataclass(frozen=True)
class Feature:
    """One of an adapter's results: its channels, and latents per value along a side, rounded up."""

    channels: int
    ratio: int


@dataclass(frozen=True)
class Packing:
    """A packing says how features become one tensor [batch, channels, height, width] of the
    latents' sides, which are multiples of `multiple`.
    """

    features: tuple[Feature, ...]
    multiple: int = 1

    def folds(self, feature: Feature) -> int:
        """Return how many of a feature's channels go side by side, along a side: as many as fill
        the latents' rows, where those are multiples of its `ratio`. Else half as many, which leave
        room for a last row that stands for less than `ratio` ones, from half of them on."""
        even = self.multiple % feature.ratio == 0
        return feature.ratio if even else feature.ratio // 2

    def least(self) -> int:
        """Return the smallest side of latents in which every feature has room."""
        return max((self.folds(feature) for feature in self.features), default=1)

    def channels(self) -> list[int]:
        """Return how many channels each feature becomes."""
        return [math.ceil(feature.channels / self.folds(feature) ** 2) for feature in self.features]

    def spec(self) -> TensorSpec:
        """Return what the manifest says of the tensor."""
        return TensorSpec("float32", ("batch", sum(self.channels()), "height", "width"))

    def pack(self, made: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
        """Join the features of latents of `height` by `width`."""
        parts = []
        for value, feature in zip(made, self.features, strict=False):
            by = self.folds(feature)
            missing = -feature.channels % by**2
            part = functional.pixel_shuffle(functional.pad(value, (0, 0, 0, 0, 0, missing)), by)
            rows, columns = part.shape[2:]
            parts.append(functional.pad(part, (0, width - columns, 0, height - rows)))
        return torch.cat(parts, 1)

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Return the features: the reverse of `pack`."""
        parts = torch.split(packed, self.channels(), dim=1)
        return [
            self._unfolded(part, feature)[:, : feature.channels]
            for part, feature in zip(parts, self.features, strict=True)
        ]

    def _unfolded(self, part: torch.Tensor, feature: Feature) -> torch.Tensor:
        by = self.folds(feature)
        if by == feature.ratio:
            return functional.pixel_unshuffle(part, by)
        # Not slices, nor `pixel_unshuffle`: PyTorch cannot tell that there are as many rows, and
        # that they are multiples.
        rows, columns = (
            [torch.arange((side - 1) // feature.ratio + 1) * by + first for first in range(by)]
            for side in part.shape[2:]
        )
        planes = [
            some.index_select(3, places)
            for some in (part.index_select(2, places) for places in rows)
            for places in columns
        ]
        return planes[0] if by == 1 else torch.stack(planes, dim=2).flatten(1, 2)


def with_t2i_adapters(
    pipe: Any, graphs: Sequence[Graph], drafts: Sequence[Draft]
) -> tuple[Graph, ...]:
    """Return the graphs with the pipeline's T2I-Adapters, where it has any.

    Raises:
        UnsupportedPipeline: they do not fit the UNet, or the pipeline does something else than
            text-to-image.
    """
    adapters = adapters_of(pipe)
    if not adapters:
        return tuple(graphs)
    own = drafts[0]
    if own.images():
        raise UnsupportedPipeline(
            f"T2I-Adapters are supported for text-to-image, not for {own.name}"
        )
    features = features_of(pipe)
    latents = _for_adapters(own.latents, adapters[0])
    packing = Packing(features, latents.multiple)
    latents = structs.replace(latents, minimum=max(latents.minimum, packing.least()))
    encoders = [_graph(each, i, packing, latents.factor) for i, each in enumerate(adapters)]
    for draft in drafts:
        draft.latents = latents
        _write(draft, [encoder.component for encoder in encoders])
    adapted = (
        _adapted(graph, pipe.unet, packing, len(adapters))
        if graph.component.role == "denoiser"
        else graph
        for graph in graphs
    )
    return (*adapted, *encoders)


def _write(draft: Draft, encoders: Sequence[Component]) -> None:
    """Feed the features of each adapter, and how much they count, up to a share of the steps."""
    count = len(encoders)
    draft.image(IMAGE, count=count if count > 1 else None)
    size_by(draft, IMAGE)
    phase = Phase.BEFORE_NOISE
    for index, encoder in enumerate(encoders):
        name, item = numbered(_FEATURES, index), index if count > 1 else None
        shape = encoder.inputs["image"].shape[1:]
        image = draft.pixels(f"_{encoder.name}_image", IMAGE, shape, phase, item=item)
        values = draft.run(encoder.name, {"image": image}, {_FEATURES: f"_{name}"}, phase)
        draft.feed(name, values[_FEATURES])
    scales = draft.row(f"_{SCALE}", [draft.number(SCALE, (1.0,) * count, spread=True)])
    if not takes(draft.stands_for, SHARE):
        draft.feed(SCALE, scales)
        return
    stop = draft.number(SHARE, (1.0,), least=0.0, most=1.0)
    draft.feed(SCALE, During(scales, Window(count="steps", stop=stop)))


def _for_adapters(latents: Latents, adapter: Any) -> Latents:
    """Return the same for images whose pixels the adapter can rearrange to channels.

    Raises:
        UnsupportedPipeline: the default size is not one of them.
    """
    pixels = math.lcm(latents.factor * latents.multiple, int(adapter.downscale_factor))
    for side in (latents.default_height, latents.default_width):
        if side % pixels:
            raise UnsupportedPipeline(
                f"the T2I-Adapter needs sides that are multiples of {pixels} pixels, and the "
                f"model's own is {side}"
            )
    return structs.replace(latents, multiple=pixels // latents.factor)


def adapters_of(pipe: Any) -> list[Any]:
    """Return the pipeline's T2I-Adapters, in their order."""
    held = getattr(pipe, "adapter", None)
    if held is None:
        return []
    return list(held.adapters) if hasattr(held, "adapters") else [held]


def features_of(pipe: Any) -> tuple[Feature, ...]:
    """Return the features that the UNet takes of each adapter, the same for all of them.

    Raises:
        UnsupportedPipeline: they do not fit the UNet's blocks, or each other.
    """
    every = {_features(each, vae_factor(pipe.vae)) for each in adapters_of(pipe)}
    if len(every) > 1:
        raise UnsupportedPipeline("T2I-Adapters of different forms cannot be added to each other")
    (features,) = every
    taken = _places(pipe.unet)
    blocks = len(taken) - 1
    fit = features[:blocks] == taken[: min(len(features), blocks)]
    if not features or not fit:
        raise UnsupportedPipeline(
            f"a T2I-Adapter that gives {_spoken(features)} does not fit the UNet, which takes "
            f"{_spoken(taken)}"
        )
    # The middle block takes the next one if it fits, and leaves it otherwise.
    return (
        features[: blocks + 1]
        if features[blocks : blocks + 1] == taken[blocks:]
        else features[:blocks]
    )


def _features(adapter: Any, factor: int) -> tuple[Feature, ...]:
    """Return the features that an adapter makes, found out by running it without its weights."""
    channels = int(adapter.config.in_channels)
    if channels not in (1, 3):
        raise UnsupportedPipeline(
            f"a T2I-Adapter for images of {channels} channels is not supported, only 1 and 3"
        )
    side = math.lcm(int(adapter.total_downscale_factor), factor)
    with torch.device("meta"), torch.no_grad():
        twin = type(adapter).from_config(adapter.config)
        features = twin(torch.zeros(1, channels, side, side))
    ratios = [(side // factor, int(each.shape[2])) for each in features]
    if any(latents % small for latents, small in ratios):
        raise UnsupportedPipeline(
            f"a T2I-Adapter with the downscale_factor {adapter.downscale_factor} does not fit a "
            f"VAE with {factor} pixels per latent"
        )
    return tuple(
        Feature(int(each.shape[1]), latents // small)
        for each, (latents, small) in zip(features, ratios, strict=True)
    )


def _places(unet: Any) -> tuple[Feature, ...]:
    """Return where diffusers' UNet adds features.

    It does in each block that goes down, before its downsampling if it looks at the text, and after
    the middle block.
    """
    features, ratio = [], 1
    channels = [int(each) for each in unet.config.block_out_channels]
    for count, block in zip(channels, unet.down_blocks, strict=True):
        below = ratio * (1 if block.downsamplers is None else 2)
        attends = getattr(block, "has_cross_attention", False)
        features.append(Feature(count, ratio if attends else below))
        ratio = below
    return (*features, Feature(channels[-1], ratio))


def _spoken(features: Sequence[Feature]) -> str:
    return ", ".join(f"{feature.channels} channels at 1/{feature.ratio}" for feature in features)


class Adapter(torch.nn.Module):
    """image [batch, 3, f*height, f*width] in [0, 1] → packed features [batch, channels, height,
    width], see `Packing`."""

    def __init__(self, adapter: Any, packing: Packing, factor: int) -> None:
        super().__init__()
        self.adapter = adapter
        self._packing = packing
        self._factor = factor
        self._grey = int(adapter.config.in_channels) == 1
        for module in adapter.modules():
            if isinstance(module, torch.nn.AvgPool2d) and module.ceil_mode:
                _repeat_last(module)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        if self._grey:
            weights = zip(_GREY, torch.split(image, 1, dim=1), strict=True)
            image = torch.stack([weight * each for weight, each in weights]).sum(dim=0)
        height, width = (side // self._factor for side in image.shape[2:])
        return (self._packing.pack(self.adapter(image), height, width),)


def _repeat_last(pool: torch.nn.AvgPool2d) -> None:
    """Have means of two by two values, rounded up, be taken of values whose last row and column are
    there twice: it is the same, and a captured program needs no rule for what is even."""

    def repeat(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (functional.pad(inputs[0], (0, 1, 0, 1), mode="replicate"),)

    pool.ceil_mode = False
    pool.register_forward_pre_hook(repeat)


def _graph(adapter: Any, index: int, packing: Packing, factor: int) -> Graph:
    image = TensorSpec("float32", ("batch", 3, f"{factor}*height", f"{factor}*width"))
    made = {_FEATURES: packing.spec()}
    component = Component(numbered(T2I_ADAPTER, index), "image_encoder", {"image": image}, made)
    return Graph(component, Adapter(adapter, packing, factor))


class _Adapted(Extended):
    """A denoiser whose UNet is given the adapters' features.

    Inputs besides: those of each adapter, packed, and the conditioning scales [batch, number of
    adapters].
    """

    def __init__(self, graph: Graph, unet: Any, packing: Packing, inputs: Sequence[str]) -> None:
        super().__init__(graph, unet, inputs)
        self._packing = packing
        self._given = [name for name in inputs if name.startswith(_FEATURES)]

    def _more(
        self,
        inputs: Mapping[str, torch.Tensor],
        args: tuple[Any, ...],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {"down_intrablock_additional_residuals": self._sums(inputs)}

    def _sums(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums of all adapters' features, each as strong as its scale says.

        They stand in a list, as the UNet takes from it.
        """
        every = [
            inputs[name] * inputs[SCALE][:, index].reshape(-1, 1, 1, 1)
            for index, name in enumerate(self._given)
        ]
        return self._packing.unpack(sum(every[1:], every[0]))


def _adapted(graph: Graph, unet: Any, packing: Packing, count: int) -> Graph:
    packed = {numbered(_FEATURES, index): packing.spec() for index in range(count)}
    inputs = {**packed, SCALE: TensorSpec("float32", ("batch", count))}
    return extended(graph, inputs, lambda own, names: _Adapted(own, unet, packing, names))


def call_with_t2i_adapters(pipe: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of diffusers' pipeline, which wants grey images where an adapter has one
    channel, and a list of scales for several adapters."""
    grey = [int(adapter.config.in_channels) == 1 for adapter in adapters_of(pipe)]
    if not grey:
        return call

    def run(**arguments: Any) -> Any:
        several = len(grey) > 1
        given = arguments.pop(IMAGE)
        images = [
            image.convert("L") if one else image
            for image, one in zip(given if several else [given], grey, strict=True)
        ]
        if several:
            arguments.setdefault(SCALE, [1.0] * len(grey))
        return call(image=images if several else images[0], **arguments)

    return run
