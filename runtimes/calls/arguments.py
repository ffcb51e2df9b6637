"""Texts, numbers and arrays of a call, checked against the arguments of its program."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.calls import values as checked
from latentc.runtimes.calls.call_arguments import CallArguments
from latentc.runtimes.calls.choices import MASK_OPTIONS
from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.calls.images import MaskOptions
from latentc.runtimes.errors import InputError, first_line
from latentc.runtimes.options import check_limits, declared
from latentc.runtimes.programs.statements import Cut, Image, Numbers
from latentc.runtimes.programs.values import Rows


def taken_as_values(
    facts: Facts, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Part what is given into arguments, values, and the names by which values are given: latents
    in the place of an image are a value, told apart by their channels as in diffusers.

    Raises:
        InputError: the same value is given by both names.
    """
    values = {name: given[name] for name in given if name in facts.public}
    arguments = {name: value for name, value in given.items() if name not in values}
    labels = {name: name for name in values}
    for name, argument in facts.images.items():
        if not isinstance(argument, Image) or argument.latents is None or name not in arguments:
            continue
        shape = tuple(getattr(arguments[name], "shape", ()))
        channels = facts.types[argument.latents].shape[0].offset
        if len(shape) != 4 or shape[1] != channels:
            continue
        if argument.latents in values:
            raise InputError(
                f"{name!r} and {argument.latents!r} say the same thing: give one of them"
            )
        values[argument.latents] = arguments.pop(name)
        labels[argument.latents] = name
    return arguments, values, labels


def check_groups(facts: Facts, values: Collection[str]) -> None:
    """Refuse values of a group without the others of it. Raises InputError."""
    for names in facts.groups.values():
        here = [name for name in names if name in values]
        missing = [name for name in names if name not in values]
        if here and missing:
            of_texts = all(facts.types[name].rows == Rows.PROMPTS for name in names)
            raise InputError(
                f"{' and '.join(map(repr, here))} without {' and '.join(map(repr, missing))}: this "
                f"bundle needs all of them ({'encode_prompt' if of_texts else 'compute'} gives "
                "them), or a text"
            )


def prompts_of_values(
    facts: Facts,
    values: Mapping[str, Array],
    lists: Mapping[str, Sequence[Sequence[Any]]],
    each: int,
    wanted: Sequence[str],
) -> int:
    """Return how many prompts a call without texts is for, as what else it gives says: encoded
    texts, what was made of them, latents that are denoised already, or where values are asked for
    all that has rows; 0 where nothing says it.

    Args:
        lists: the call's images.
        each: how many images there are for each prompt.
    """
    rows = {name: facts.types[name].rows for name in values}
    encoded = [len(v) for n, v in values.items() if rows[n] == Rows.PROMPTS and n in facts.of_base]
    if encoded:
        return max(encoded)
    others = [len(v) for n, v in values.items() if rows[n] == Rows.PROMPTS and wanted]
    if others:
        return max(others)
    counted = values.keys() if wanted else values.keys() & {facts.loop.state.name, *facts.encoded}
    images = [len(values[name]) for name in counted if rows[name] >= Rows.GIVEN]
    images += [len(item) for items in lists.values() for item in items if wanted]
    return -(-max(images, default=0) // each)


def rows_of(facts: Facts, given: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return the numbers that a call gives for each prompt, or one for all, by argument."""
    return {
        name: _within(
            argument,
            tuple(
                checked.integer(name, value) if argument.whole else checked.number(name, value)
                for value in checked.several(name, given[name])
            ),
        )
        for name, argument in facts.row_numbers.items()
        if name in given
    }


def spread_rows(
    facts: Facts, lists: Mapping[str, tuple[float, ...]], prompts: int
) -> dict[str, tuple[float, ...]]:
    """Return one number for each prompt, of the defaults too."""
    rows: dict[str, tuple[float, ...]] = {}
    for name, argument in facts.row_numbers.items():
        values = lists.get(name) or tuple(float(value) for value in argument.default)
        if len(values) not in (1, prompts) and values:
            raise InputError(f"{name!r} has {len(values)} numbers for {prompts} prompts")
        if values:
            rows[name] = values if len(values) == prompts else values * prompts
    return rows


def texts_of(
    facts: Facts, given: Mapping[str, Any], encoded: int
) -> tuple[dict[str, tuple[str, ...]], int]:
    """Return the texts, one for each prompt, and how many prompts there are.

    Args:
        encoded: how many there are by what else the call gives, 0 where that says nothing.
    """
    if not facts.texts and facts.row_numbers:
        return {}, encoded or 1
    if not facts.texts:
        return {}, checked.count(given, "batch_size", encoded or 1)
    lists = {n: checked.strings(n, given[n]) for n in facts.texts if n in given}
    # An empty string beside a text that it falls back to is none, as in diffusers.
    lists = {n: v for n, v in lists.items() if given[n] or facts.texts[n].fallback is None}
    own = [len(v) for n, v in lists.items() if facts.root(n) in facts.required]
    others = max(map(len, lists.values()), default=1)
    prompts = max(own, default=encoded or others)
    for name, values in lists.items():
        if len(values) != prompts and not isinstance(given[name], str):
            raise InputError(f"{name!r} has {len(values)} texts for {prompts} prompts")
    texts = {name: values * (prompts // len(values)) for name, values in lists.items()}
    for name, text in facts.texts.items():
        if name not in texts and text.default is not None:
            texts[name] = (text.default,) * prompts
        elif name not in texts and text.fallback in texts:
            texts[name] = texts[text.fallback]
    return texts, prompts


def array_of(facts: Facts, name: str, value: Any) -> Array:
    """Return what a call gives for a value as numbers with as many axes as it has, and a row."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"of {array.dtype}")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name!r} must be an array of numbers: {first_line(error)}") from None
    kind = facts.types[name]
    if array.ndim != len(kind.shape) + 1 or not array.size:
        shape = ", ".join(map(str, ("rows", *kind.shape)))
        raise InputError(f"{name!r} must have the shape [{shape}], not {[*array.shape]}")
    return array


def shaped(
    facts: Facts, name: str, array: Array, each: int, prompts: int, label: str | None = None
) -> Array:
    """Return a given value in its dtype, with a row for what its type says.

    Args:
        each, prompts: how many images for each prompt, and how many prompts.
        label: what errors call it.
    """
    kind, label, made = facts.types[name], label or name, prompts * each
    if kind.integers and array.dtype.kind == "f":
        raise InputError(f"{label!r} must be an array of integers, not of {array.dtype}")
    dtype = np.dtype(np.int64 if kind.integers else np.float32)
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(array, dtype)
    wanted: list[int | str] = [str(e) if e.symbol else e.offset for e in kind.shape]
    if name in facts.stretchable:
        wanted[0] = "sequence"
    words: Mapping[Rows, int | str] = {
        Rows.CALL: 1, Rows.PROMPTS: "prompts", Rows.GIVEN: "images", Rows.IMAGES: made
    }  # fmt: skip
    rows = words[kind.rows]
    if any(
        isinstance(size, int) and size != found
        for size, found in zip((rows, *wanted), numbers.shape, strict=True)
    ):
        shape = ", ".join(map(str, (rows, *wanted)))
        raise InputError(f"{label!r} must have the shape [{shape}], not {[*numbers.shape]}")
    if not np.isfinite(array).all():
        raise InputError(f"{label!r} holds NaN or infinity")
    if not np.isfinite(numbers).all():
        raise InputError(f"{label!r} holds numbers beyond {dtype}")
    return _with_rows(label, numbers, kind.rows, prompts, made)


def _with_rows(label: str, array: Array, rows: Rows, prompts: int, made: int) -> Array:
    """Return a value with a row for each prompt where it has one for all of them. Raises InputError
    where it has rows for other prompts, or other images, than there are."""
    if rows == Rows.PROMPTS and len(array) not in (1, prompts):
        raise InputError(f"{label!r} has {len(array)} rows for {prompts} prompts")
    if rows == Rows.GIVEN and made % len(array):
        what = "latents" if array.ndim >= 4 else "rows"
        raise InputError(f"{len(array)} {what} in {label!r} for {made} images to be made")
    if rows == Rows.PROMPTS and len(array) < prompts:
        return np.repeat(array, prompts, axis=0)
    return array


def check_encoded(facts: Facts, arrays: Mapping[str, Array]) -> None:
    """Refuse encoded texts of different lengths, and numbers that no graph would see: what an
    array is cut into leaves zeros.

    Raises:
        InputError: says which array it is.
    """
    lengths = {name: arrays[name].shape[1] for name in arrays if name in facts.stretchable}
    if len({*lengths.values()}) > 1:
        raise InputError(f"encoded texts of different lengths: {lengths}")
    parts, origins = dict(arrays), {name: name for name in arrays}
    for step in facts.program.steps:
        if not isinstance(step, Cut) or step.of not in parts:
            continue
        whole, start = np.moveaxis(parts[step.of], step.axis, 0), 0
        for name, size in zip(step.gives, step.sizes, strict=True):
            parts[name] = np.moveaxis(whole[start : start + size], 0, step.axis)
            origins[name] = origins[step.of]
            start += size
        if whole[start:].any():
            raise InputError(
                f"{origins[step.of]!r} has numbers where this bundle's encoders have none and the "
                "array is zero: was it made for another model?"
            )


def numbers_of(facts: Facts, given: Mapping[str, Any]) -> dict[str, tuple[float | str, ...]]:
    """Return all numbers of the program; defaults may be names of sizes."""
    found: dict[str, tuple[float | str, ...]] = {}
    for name, argument in facts.numbers.items():
        if argument.rows:
            continue
        if name in given:
            found[name] = _given_numbers(argument, given[name])
        elif argument.fallback is not None:
            found[name] = found[argument.fallback]
        elif argument.default:
            found[name] = argument.default
    return found


def _given_numbers(argument: Numbers, value: Any) -> tuple[float, ...]:
    """Return the numbers that a call gives for an argument. Raises InputError for what is not in
    its range, not whole or not as many."""
    name = argument.name
    if argument.whole and argument.count == 1:
        values: tuple[float, ...] = (checked.integer(name, value),)
    elif argument.count == 1 and not argument.spread and not isinstance(value, Sequence):
        values = (checked.number(name, value),)
    else:
        values = checked.numbers(name, value, argument.count, argument.spread)
    return _within(argument, values)


def _within(argument: Numbers, values: tuple[float, ...]) -> tuple[float, ...]:
    """Return numbers that are in an argument's range. Raises InputError for others."""
    name = argument.name
    low = -math.inf if argument.least is None else argument.least
    high = math.inf if argument.most is None else argument.most
    if argument.above is not None and not all(argument.above < v <= high for v in values):
        most = "" if argument.most is None else f" and at most {high:g}"
        raise InputError(f"{name!r} must be above {argument.above:g}{most}, not {_shown(values)}")
    if not all(low <= number <= high for number in values):
        if argument.most is None:
            raise InputError(f"{name!r} must be at least {low:g}, not {_shown(values)}")
        raise InputError(f"{name!r} must be from {low:g} to {high:g}, not {_shown(values)}")
    return values


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def in_pixels(values: Sequence[float | str], sizes: Mapping[str, int]) -> tuple[float, ...]:
    """Return numbers with the call's own size in pixels in the place of the name of a side."""
    return tuple(float(sizes[v]) if isinstance(v, str) else float(v) for v in values)


def masking_of(facts: Facts, given: Mapping[str, Any]) -> MaskOptions:
    """Return what becomes of the call's masks.

    Raises:
        InputError: an option without a mask, out of its range, or for other images than "pil".
    """
    asked = [name for name in MASK_OPTIONS if name in given]
    if asked and not any(name in given for name in facts.masks):
        raise InputError(f"{' and '.join(map(repr, asked))}: no mask was given")
    options = declared(CallArguments)
    blur = checked.number("mask_blur", given.get("mask_blur", 0))
    check_limits(options["mask_blur"], blur)
    if "padding_mask_crop" not in given:
        return MaskOptions(blur)
    padding = checked.integer("padding_mask_crop", given["padding_mask_crop"])
    check_limits(options["padding_mask_crop"], padding)
    if given.get("output_type", "pil") != "pil":
        raise InputError("'padding_mask_crop' puts images into others: output_type must be 'pil'")
    return MaskOptions(blur, padding)


def missing(facts: Facts, name: str) -> str:
    """Return what to say of a text or an image that a call needs and does not give."""
    if name in facts.texts:
        return f"no text given: this bundle needs {name!r}"
    return f"{name!r} is missing: this call needs it"
