"""Pictures and masks of a call: what callers have → arrays as the graphs take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from runtimes.errors import InputError
from runtimes.session import Array

_EXPECTED = {
    "image": "a Pillow image, an array [height, width, 3], or several of either",
    "mask": "a Pillow image, an array [height, width], or several of either",
}
Kind: TypeAlias = Literal["image", "mask"]


def listed(name: str, value: Any, kind: Kind = "image") -> list[Any]:
    """The single pictures of a value, Pillow images or arrays [height, width, 3], of masks
    [height, width] or [height, width, 1].

    Raises:
        InputError: it is no picture.
    """
    several = isinstance(value, Sequence) or (
        isinstance(value, np.ndarray) and (value.ndim == 4 or (kind, value.ndim) == ("mask", 3))
    )
    # [height, width, 1] is one mask, and no list of lines; [height, width, 3] is none.
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] in (1, 3):
        several = False
    found = list(value) if several else [value]
    if not found or isinstance(value, str | bytes):
        raise InputError(f"{name!r}: expected {_EXPECTED[kind]}, not {value!r:.80}")
    for each in found:
        _size(name, each, kind)
    return found


def size(name: str, pictures: Sequence[Any], kind: Kind = "image") -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        InputError: the pictures differ in size.
    """
    sizes = {_size(name, each, kind) for each in pictures}
    if len(sizes) != 1:
        raise InputError(f"{name!r} holds pictures of {len(sizes)} sizes; expected one size")
    return sizes.pop()


def arrays(
    name: str, pictures: Sequence[Any], height: int, width: int, kind: Kind = "image"
) -> Array:
    """float32 [n, 3, height, width] in [0, 1], of masks [n, 1, height, width] of 0 and 1.

    Pillow images are resized as diffusers' ``VaeImageProcessor`` does (Lanczos) and become RGB, or
    grey for a mask, which is 1 from half on. Arrays are bytes, or floats in [0, 1], and must have
    the size.

    Raises:
        InputError: an array of another size, kind or range.
    """
    return np.stack([_array(name, each, height, width, kind) for each in pictures])


def _array(name: str, picture: Any, height: int, width: int, kind: Kind) -> Array:
    if not isinstance(picture, np.ndarray):
        from PIL import Image

        # A picture loses its palette or transparency first, a mask is resized as it is.
        picture = picture.convert("RGB") if kind == "image" else picture
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        picture = np.asarray(picture if kind == "image" else picture.convert("L"))
    if picture.shape[:2] != (height, width):
        raise InputError(
            f"{name!r} is an array of {picture.shape[1]}x{picture.shape[0]} pixels, expected "
            f"{width}x{height}: give a Pillow image to have it resized"
        )
    if picture.dtype == np.uint8:
        picture = picture.astype(np.float32) / 255
    channels = picture if picture.ndim == 3 else picture[:, :, np.newaxis]
    values = np.ascontiguousarray(channels.transpose(2, 0, 1), np.float32)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise InputError(f"{name!r}: expected bytes, or numbers from 0 to 1")
    return values if kind == "image" else (values >= 0.5).astype(np.float32)


def _size(name: str, picture: Any, kind: Kind) -> tuple[int, int]:
    if isinstance(picture, np.ndarray):
        grey = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 1)
        coloured = picture.ndim == 3 and picture.shape[2] == 3
        if (grey if kind == "mask" else coloured) and picture.dtype.kind in "fub" and picture.size:
            return picture.shape[0], picture.shape[1]
        raise InputError(
            f"{name!r}: expected {_EXPECTED[kind]}, not an array {list(picture.shape)} of "
            f"{picture.dtype}"
        )
    if not hasattr(picture, "convert") or not hasattr(picture, "resize"):
        raise InputError(f"{name!r}: expected {_EXPECTED[kind]}, not {picture!r:.80}")
    width, height = picture.size
    return int(height), int(width)
