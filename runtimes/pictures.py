"""Pictures that a call starts from: what callers have → arrays as an image encoder takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.session import Array

_EXPECTED = "a Pillow image, an array [height, width, 3], or several of either"


def listed(name: str, value: Any) -> list[Any]:
    """The single pictures of a value, Pillow images or arrays [height, width, 3].

    Raises:
        InputError: it is no picture.
    """
    if isinstance(value, np.ndarray) and value.ndim == 4:
        found = list(value)
    else:
        found = list(value) if isinstance(value, Sequence) else [value]
    if not found or isinstance(value, str | bytes):
        raise InputError(f"{name!r}: expected {_EXPECTED}, not {value!r:.80}")
    for each in found:
        _size(name, each)
    return found


def size(name: str, pictures: Sequence[Any]) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        InputError: the pictures differ in size.
    """
    sizes = {_size(name, each) for each in pictures}
    if len(sizes) != 1:
        raise InputError(f"{name!r} holds pictures of {len(sizes)} sizes; expected one size")
    return sizes.pop()


def arrays(name: str, pictures: Sequence[Any], height: int, width: int) -> Array:
    """float32 [n, 3, height, width] in [0, 1].

    Pillow images become RGB, and are resized as diffusers' ``VaeImageProcessor`` does (Lanczos).
    Arrays are bytes, or floats in [0, 1], and must have the size.

    Raises:
        InputError: an array of another size, kind or range.
    """
    return np.stack([_array(name, each, height, width) for each in pictures])


def _array(name: str, picture: Any, height: int, width: int) -> Array:
    if not isinstance(picture, np.ndarray):
        from PIL import Image

        picture = picture.convert("RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        picture = np.asarray(picture)
    if picture.shape[:2] != (height, width):
        raise InputError(
            f"{name!r} is an array of {picture.shape[1]}x{picture.shape[0]} pixels, expected "
            f"{width}x{height}: give a Pillow image to have it resized"
        )
    if picture.dtype == np.uint8:
        picture = picture.astype(np.float32) / 255
    values = np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise InputError(f"{name!r}: expected bytes, or numbers from 0 to 1")
    return values


def _size(name: str, picture: Any) -> tuple[int, int]:
    if isinstance(picture, np.ndarray):
        if picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype.kind in "fu":
            return picture.shape[0], picture.shape[1]
        raise InputError(
            f"{name!r}: expected {_EXPECTED}, not an array {list(picture.shape)} of {picture.dtype}"
        )
    if not hasattr(picture, "convert") or not hasattr(picture, "resize"):
        raise InputError(f"{name!r}: expected {_EXPECTED}, not {picture!r:.80}")
    width, height = picture.size
    return int(height), int(width)
