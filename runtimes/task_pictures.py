"""The pictures of one call, made ready for what its task feeds with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtimes import masks, pictures
from runtimes.call_sizes import CallSize
from runtimes.errors import InputError
from runtimes.manifest import Manifest, TensorSpec
from runtimes.session import Array
from runtimes.sizes import dimension
from runtimes.tasks import Feed, Task, argument

DIRECT = -1
MASK_OPTIONS = ("mask_blur", "padding_mask_crop")


@dataclass(frozen=True)
class Pictures:
    """What a call's pictures became.

    `feeds`: by the place of a preparation in its task, or `DIRECT` for the denoiser, and by input:
    float32 [n, channels, h, w], n pictures as they were given.
    `blend`: the mask of the latents, float32 [n, 1, h, w] of 0 and 1, or None. `overlay`: what to
    put the results into, or None.
    """

    feeds: Mapping[tuple[int, str], Array] = field(default_factory=dict)
    blend: Array | None = None
    overlay: masks.Overlay | None = None


@dataclass(frozen=True)
class MaskOptions:
    """`blur` softens masks by so many pixels; `padding`: only what is so many pixels around them
    is looked at; None: the whole picture."""

    blur: float = 0.0
    padding: int | None = None


def listed(
    task: Task, given: Mapping[str, Any], images: int, started: bool = False
) -> dict[str, list[Any]]:
    """The single pictures of each argument; where the call is `started` by latents, all but the one
    that they stand for.

    Raises:
        InputError: no picture, or a number of them that does not go into `images`.
    """
    made = {}
    for name, kind in task.pictures.items():
        if started and name == task.start_picture():
            continue
        made[name] = pictures.listed(name, _picked(task, name, given), kind)
        if images % len(made[name]):
            raise InputError(
                f"{len(made[name])} pictures in {name!r} for {images} pictures to be made"
            )
    return made


def _picked(task: Task, name: str, given: Mapping[str, Any]) -> Any:
    """What a call gives for a picture, which may be one of a list."""
    whole = argument(name)
    if name == whole:
        return given[name]
    count, value = sum(argument(each) == whole for each in task.pictures), given[whole]
    if not isinstance(value, Sequence | np.ndarray) or len(value) != count:
        raise InputError(f"{whole!r}: expected a list of {count}, one for each of what takes them")
    return value[int(name[len(whole) + 1 : -1])]


def prepare(
    manifest: Manifest,
    task: Task,
    found: Mapping[str, list[Any]],
    size: CallSize,
    options: MaskOptions,
) -> Pictures:
    """Resize, crop and convert.

    Args:
        found: see `listed`.

    Raises:
        InputError: pictures that cannot be used.
    """
    sides = size.height, size.width
    softened = _softened(task, found, options)
    ready, overlay = _cropped(task, softened, size, options.padding)
    whole = {
        name: pictures.arrays(name, ready[name], *sides, "mask")
        for name, kind in task.pictures.items()
        if kind == "mask"
    }
    for name, mask in whole.items():
        if not mask.any(axis=(1, 2, 3)).all():
            raise InputError(f"{name!r} is all black: white is what is made anew")
    specs = {each.name: each for each in manifest.components}
    wanted = {
        (place, name): (feed, specs[run.component].inputs[name])
        for place, run in enumerate(task.preparations)
        for name, feed in run.feeds.items()
        if feed.picture in found
    }
    denoiser = manifest.component("denoiser")
    wanted |= {(DIRECT, n): (feed, denoiser.inputs[n]) for n, feed in task.inputs.items()}
    factor = manifest.latents.factor
    symbols = {"height": size.height // factor, "width": size.width // factor}
    feeds = {place: fed(*each, ready, whole, symbols) for place, each in wanted.items()}
    blend = None if task.blend is None else _thinned(whole[task.blend], factor)
    return Pictures(feeds, blend, overlay)


def _softened(
    task: Task, found: Mapping[str, list[Any]], options: MaskOptions
) -> dict[str, list[Any]]:
    if not options.blur:
        return dict(found)
    soft = {
        name: [masks.blurred(masks.pillow(each), options.blur) for each in found[name]]
        for name in task.masks()
    }
    return {**found, **soft}


def _cropped(
    task: Task, found: dict[str, list[Any]], size: CallSize, padding: int | None
) -> tuple[dict[str, list[Any]], masks.Overlay | None]:
    """Return the parts of the images around the mask, each in the middle of what is made. They
    have the proportions of the size that was asked for, as in diffusers, where that is another."""
    if padding is None:
        return found, None
    (mask_name,) = task.masks()
    height, width = size.asked
    every = {name: [masks.pillow(each) for each in values] for name, values in found.items()}
    sizes = {each.size for values in every.values() for each in values}
    if len(sizes) > 1:
        raise InputError("'padding_mask_crop' needs pictures and masks of one size")
    boxes = [masks.crop_box(each, width, height, padding) for each in every[mask_name]]
    ready = {
        name: [
            masks.filled(each.crop(boxes[index % len(boxes)]), size.width, size.height)
            for index, each in enumerate(_as_many(values, len(boxes)))
        ]
        for name, values in every.items()
    }
    own = next(name for name, kind in task.pictures.items() if kind == "image")
    return ready, masks.Overlay(every[own], every[mask_name], boxes)


def _as_many(values: list[Any], count: int) -> list[Any]:
    return values * (count // len(values)) if len(values) < count else values


def fed(
    feed: Feed,
    spec: TensorSpec,
    found: Mapping[str, Sequence[Any]],
    whole: Mapping[str, Array],
    symbols: Mapping[str, int],
) -> Array:
    """What an input of the form `spec` is fed with: float32 [n, channels, height, width].

    Args:
        found: the single pictures of each argument; `whole`: the masks among them, in the call's
            size.
        symbols: height and width of the latents.
    """
    height, width = (int(dimension(each, symbols)) for each in spec.shape[2:])
    if feed.picture in whole:
        return _thinned(whole[feed.picture], whole[feed.picture].shape[2] // height)
    given = found[feed.picture]
    if feed.resample != "lanczos":
        how = feed.fit == "crop", feed.resample
        given = [masks.resized(masks.pillow(each), height, width, *how) for each in given]
    made = pictures.arrays(feed.picture, given, height, width)
    if feed.mask is None:
        return made
    mask = _thinned(whole[feed.mask], whole[feed.mask].shape[2] // height)
    return np.where(mask >= 0.5, np.float32(feed.fill), made)


def _thinned(mask: Array, factor: int) -> Array:
    """Every `factor`-th pixel: the nearest one, as ``torch.nn.functional.interpolate`` takes it."""
    return np.ascontiguousarray(mask[:, :, ::factor, ::factor])
