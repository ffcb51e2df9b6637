"""Values of a call's arguments, checked: what they are, not whether a bundle takes them. All raise
`InputError` with the argument's name."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.manifest import Manifest
from runtimes.noise import fresh_seed
from runtimes.session import Array


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A text, or a list of texts."""
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(each, str) for each in values):
        raise InputError(f"{name!r} must be a text or a list of texts, not {value!r:.80}")
    if not values:
        raise InputError(f"{name!r} is an empty list")
    return tuple(values)


def integer(name: str, value: Any) -> int:
    """A whole number; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name!r} must be an integer, not {value!r:.80}") from None


def boolean(given: Mapping[str, Any], name: str) -> bool:
    """True or False, the default."""
    value = given.get(name, False)
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name!r} must be True or False, not {value!r:.80}")
    return bool(value)


def count(given: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number of at least 1."""
    value = integer(name, given.get(name, default))
    if value < 1:
        raise InputError(f"{name!r} must be at least 1, not {value}")
    return value


def number(name: str, value: Any) -> float:
    """A finite number."""
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name!r} must be a number, not {value!r:.80}") from None
    if not math.isfinite(number):
        raise InputError(f"{name!r} must be finite, not {number}")
    return number


def numbers(name: str, value: Any, count: int, spread: bool) -> tuple[float, ...]:
    """So many numbers; with `spread` one stands for all."""
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    numbers = tuple(number(name, each) for each in values)
    if spread and len(numbers) == 1:
        numbers *= count
    if len(numbers) != count:
        raise InputError(f"{name!r} takes {count} numbers, not {len(numbers)}")
    return numbers


def seeds(seed: Any, images: int) -> tuple[int, ...]:
    """One seed, or one for each image; a fresh one if none is given."""
    if seed is None:
        return (fresh_seed(),)
    if not isinstance(seed, Sequence) or isinstance(seed, str | bytes):
        return (integer("seed", seed),)
    if len(seed) != images:
        raise InputError(
            f"{len(seed)} seeds for {images} images: give one seed, or one for each image"
        )
    return tuple(integer("seed", each) for each in seed)


def latents(latents: Any, images: int, manifest: Manifest, name: str = "latents") -> Array | None:
    """float32 [images, channels, height, width], or None."""
    if latents is None:
        return None
    try:
        array = np.ascontiguousarray(latents, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name!r} must be an array of numbers: {error}") from None
    channels = manifest.latents.channels
    if array.ndim != 4 or array.shape[:2] != (images, channels) or 0 in array.shape:
        raise InputError(
            f"{name!r} must have the shape [{images}, {channels}, height, width], "
            f"not {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{name!r} holds NaN or infinity")
    return array
