"""Values of a call's arguments, checked: what they are, not whether a bundle takes them. All raise
`InputError` with the argument's name."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence, Set
from itertools import islice
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.calls.call_arguments import LONGEST_SIDE, CallArguments
from latentc.runtimes.calls.call_arguments import MOST_IMAGES as MOST_IMAGES  # for its callers
from latentc.runtimes.errors import InputError, first_line
from latentc.runtimes.errors import shown as shown  # for those that check values
from latentc.runtimes.options import check_limits, declared
from latentc.runtimes.sampling.noise import fresh_seed

_LARGEST = float(np.finfo(np.float32).max)
_INTEGERS = -(2**63), 2**64 - 1  # what PyTorch takes for a seed, and more than all else needs


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A text, or a list of texts."""
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(each, str) for each in values):
        raise InputError(f"{name!r} must be a text or a list of texts, not {shown(value)}")
    if not values:
        raise InputError(f"{name!r} is an empty list")
    for text in values:
        _check_characters(name, text)
    return tuple(values)


def _check_characters(name: str, text: str) -> None:
    """Refuse half of a pair of UTF-16, which no tokenizer takes; a byte of a command line that
    the console's encoding does not know becomes one, too."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{name!r} holds a lone surrogate (U+{code:04X} at {error.start}), which is no "
            "character: expected Unicode text"
        ) from None


def integer(name: str, value: Any) -> int:
    """A whole number; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise InputError(f"{name!r} must be an integer, not {shown(value)}") from None
    if not _INTEGERS[0] <= whole <= _INTEGERS[1]:
        raise InputError(f"{name!r} must be from -2**63 to 2**64 - 1")
    return whole


def boolean(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or False."""
    value = given.get(name, default)
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name!r} must be True or False, not {shown(value)}")
    return bool(value)


def count(given: Mapping[str, Any], name: str, default: int) -> int:
    """Return a whole number within the limits of its declaration."""
    value = integer(name, given.get(name, default))
    check_limits(declared(CallArguments)[name], value)
    return value


def number(name: str, value: Any) -> float:
    """Return a finite number that float32 has, which is what graphs calculate in."""
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name!r} must be a number, not {shown(value)}") from None
    if not math.isfinite(number):
        raise InputError(f"{name!r} must be finite, not {number}")
    if abs(number) > _LARGEST:
        raise InputError(f"{name!r} must be at most {_LARGEST:g} either way, not {number:g}")
    return number


def numbers(name: str, value: Any, count: int, spread: bool) -> tuple[float, ...]:
    """So many numbers; with `spread` one stands for all."""
    numbers = tuple(number(name, each) for each in _several(value, count))
    if spread and len(numbers) == 1:
        numbers *= count
    if len(numbers) != count:
        raise InputError(f"{name!r} takes {count} numbers, not {len(numbers)}")
    return numbers


def image_size(name: str, value: Any) -> tuple[int, int]:
    """Return height and width in pixels."""
    numbers = [integer(name, each) for each in _several(value, 2)]
    if len(numbers) != 2 or not all(1 <= each <= LONGEST_SIDE for each in numbers):
        raise InputError(
            f"{name!r} must be a height and a width from 1 to {LONGEST_SIDE}, not {shown(value)}"
        )
    return numbers[0], numbers[1]


def several(name: str, value: Any) -> Sequence[Any]:
    """Return what is given for each prompt as a sequence; one alone is for all of them.

    Raises:
        InputError: more than a call may make images, or none.
    """
    values = _several(value, MOST_IMAGES)
    if not 1 <= len(values) <= MOST_IMAGES:
        raise InputError(f"{name!r} must be a number, or 1 to {MOST_IMAGES} of them")
    return values


def _several(value: Any, count: int) -> Sequence[Any]:
    """The items of what has an order, one more than `count` at most; else the value itself."""
    if isinstance(value, str | bytes | Mapping | Set):
        return (value,)
    try:
        return tuple(islice(iter(value), count + 1))
    except TypeError:  # a number, or an array without axes
        return (value,)


def seeds(seed: Any, images: int) -> tuple[int, ...]:
    """One seed, or one for each image; a fresh one if none is given."""
    if seed is None:
        return (fresh_seed(),)
    if isinstance(seed, np.ndarray) and seed.ndim == 1:
        seed = seed.tolist()
    if not isinstance(seed, Sequence) or isinstance(seed, str | bytes):
        if hasattr(seed, "initial_seed"):
            raise InputError("'seed' must be an integer: give the generator as 'generator'")
        return (integer("seed", seed),)
    if len(seed) != images:
        raise InputError(
            f"{len(seed)} seeds for {images} images: give one seed, or one for each image"
        )
    return tuple(integer("seed", each) for each in seed)


def _floats(name: str, value: Any) -> Array:
    """Return what numpy makes an array of, as float32 in C order."""
    try:
        return np.ascontiguousarray(value, np.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name!r} must be an array of numbers: {first_line(error)}") from None


def decodable(latents: Any, manifest: Manifest) -> Array:
    """float32 [any number, channels, height, width], of videos [any number, channels, frames,
    height, width]; NaN and infinity are for the decoder."""
    array, shape = _floats("latents", latents), manifest.noise_shape
    if array.ndim != len(shape) + 1 or array.shape[1] != shape[0] or 0 in array.shape:
        wanted = ", ".join(map(str, ("images", *shape)))
        raise InputError(f"'latents' must have the shape [{wanted}], not {list(array.shape)}")
    return array
