"""The images and masks of a call, made ready for the `pixels` statements that use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.calls import given_images
from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.errors import InputError
from latentc.runtimes.images import masks as masking
from latentc.runtimes.programs.dimensions import parse
from latentc.runtimes.programs.statements import Mask, Pixels


@dataclass(frozen=True)
class MaskOptions:
    """`blur` softens masks by so many pixels; of the images only what is `padding` pixels around
    the mask is used, all of them where it is None."""

    blur: float = 0.0
    padding: int | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call in pixels, by argument; the first two are height and width.

    Attributes:
        made: what images are made in.
        asked: what the call says.
        told: what a model is told that takes sizes as numbers.
        resizes: whether images get the size that was asked for in the end.
    """

    made: Mapping[str, int]
    asked: Mapping[str, int]
    told: Mapping[str, int]
    resizes: bool = False

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the images in the end."""
        height, width = [*(self.asked if self.resizes else self.made).values()][:2]
        return height, width

    @property
    def resized(self) -> tuple[int, int] | None:
        """Height and width that images are resized to in the end; None where they stay."""
        height, width = [*self.asked.values()][:2]
        return (height, width) if self.resizes else None


@dataclass(frozen=True)
class Images:
    """The images of a call, made ready.

    Attributes:
        lists: by argument the single images of each item of its list; of others there is one item.
        masks: float32 [n, 1, height, width] of 0 and 1, in the call's size.
        overlay: what the results are put into, or None.
        pixels: by name, what the statements of a call make of the images.
    """

    lists: Mapping[str, Sequence[Sequence[Any]]] = field(default_factory=dict)
    masks: Mapping[str, Array] = field(default_factory=dict)
    overlay: masking.Overlay | None = None
    pixels: Mapping[str, Array] = field(default_factory=dict)


def listed(facts: Facts, given: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Return the single images of each argument that is given, checked.

    Raises:
        InputError: it is no image.
    """
    found: dict[str, list[list[Any]]] = {}
    for name, argument in facts.images.items():
        if name not in given:
            continue
        count = None if isinstance(argument, Mask) else argument.count
        kind: given_images.Kind = "mask" if isinstance(argument, Mask) else "image"
        items = [given[name]] if count is None else _items(name, given[name], count)
        found[name] = [given_images.listed(name, item, kind) for item in items]
    return found


def check_counts(
    facts: Facts, lists: Mapping[str, list[list[Any]]], made: int, prompts: int
) -> None:
    """Refuse images whose number does not go into that of the images that are made, and those for
    prompts that are not one for each.

    Raises:
        InputError: says which argument has them.
    """
    pixels = (step for step in facts.program.steps if isinstance(step, Pixels))
    for_prompts = {step.of for step in pixels if step.for_prompts}
    for name, items in lists.items():
        for images in items:
            if made % len(images):
                raise InputError(f"{len(images)} images in {name!r} for {made} images to be made")
            if name in for_prompts and len(images) not in (1, prompts):
                raise InputError(
                    f"{len(images)} images in {name!r} for {prompts} prompts: expected one for "
                    "all of them, or one for each"
                )


def _items(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence | np.ndarray) or len(value) != count:
        raise InputError(f"{name!r}: expected a list of {count}, one for each of what takes them")
    return [*value]


def prepared(
    facts: Facts,
    lists: Mapping[str, list[list[Any]]],
    sizes: Sizes,
    options: MaskOptions,
) -> Images:
    """Return the images with their masks softened, and cut to what is around them.

    Raises:
        InputError: images that cannot be used.
    """
    if not lists:
        return Images()
    height, width = [*sizes.made.values()][:2]
    soft, masks = dict(lists), [name for name in facts.masks if name in lists]
    if options.blur:
        for name in masks:
            soft[name] = [
                [masking.blurred(masking.pillow(image), options.blur) for image in item]
                for item in lists[name]
            ]
    ready, overlay = soft, None
    if options.padding is not None:
        if lists.keys() != facts.images.keys():
            raise InputError("'padding_mask_crop' needs an image and a mask")
        ready, overlay = _cropped(facts, soft, sizes, options.padding)
    whole = {}
    for name in masks:
        whole[name] = given_images.arrays(name, ready[name][0], height, width, "mask")
        if not whole[name].any(axis=(1, 2, 3)).all():
            raise InputError(f"{name!r} is all black: white is what is made anew")
    return Images(ready, whole, overlay)


def _cropped(
    facts: Facts,
    lists: Mapping[str, list[list[Any]]],
    sizes: Sizes,
    padding: int,
) -> tuple[dict[str, list[list[Any]]], masking.Overlay]:
    """Return the parts of the images around the mask, each in the middle of what is made. They
    have the proportions of the size that was asked for, as in diffusers, where that is another."""
    (mask,) = facts.masks
    height, width = [*sizes.asked.values()][:2]
    rows, columns = [*sizes.made.values()][:2]
    every = {
        name: [[masking.pillow(image) for image in item] for item in items]
        for name, items in lists.items()
    }
    distinct = {image.size for items in every.values() for item in items for image in item}
    if len(distinct) > 1:
        raise InputError("'padding_mask_crop' needs images and masks of one size")
    boxes = [masking.crop_box(image, width, height, padding) for image in every[mask][0]]

    def cut(item: list[Any]) -> list[Any]:
        many = item * (len(boxes) // len(item)) if len(item) < len(boxes) else item
        return [
            masking.filled(image.crop(boxes[place % len(boxes)]), columns, rows)
            for place, image in enumerate(many)
        ]

    ready = {name: [cut(item) for item in items] for name, items in every.items()}
    own = next(name for name in facts.images if name not in facts.masks)
    return ready, masking.Overlay(every[own][0], every[mask][0], boxes)


def with_pixels(images: Images, statements: Iterable[Pixels], symbols: Mapping[str, int]) -> Images:
    """Return the images with what statements make of them.

    Raises:
        InputError: an array of another size than a statement needs.
    """
    made = {each.gives: pixels(each, images, symbols) for each in statements}
    return replace(images, pixels=made)


def pixels(statement: Pixels, images: Images, symbols: Mapping[str, int]) -> Array:
    """Return what a statement makes of the call's images."""
    sides = [parse(each) for each in statement.shape[1:]]
    height, width = (side.value(symbols) for side in sides if side is not None)
    if statement.of in images.masks:
        return _thinned(images.masks[statement.of], height)
    own = images.lists[statement.of][statement.item or 0]
    if statement.reducing_gap is not None:
        gap = statement.reducing_gap
        own = [given_images.reduced(each, height, width, statement.resample, gap) for each in own]
    elif statement.resample != "lanczos":
        how = statement.fit == "crop", statement.resample
        own = [masking.resized(masking.pillow(image), height, width, *how) for image in own]
    made = given_images.arrays(statement.of, own, height, width)
    if statement.fill_where is None:
        return made
    mask = _thinned(images.masks[statement.fill_where], height)
    return np.where(mask >= 0.5, np.float32(statement.fill), made)


def _thinned(mask: Array, height: int) -> Array:
    """Return every so many-th pixel: the nearest one, as ``torch.nn.functional.interpolate`` takes
    it."""
    factor = mask.shape[2] // height
    return np.ascontiguousarray(mask[:, :, ::factor, ::factor])
