"""Encoded texts as arguments of a call, in the place of the texts.

Their names are data of the manifest (`embeddings`): ``prompt_embeds`` and so on, as diffusers has
them, each with the prefix of a guidance branch before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.manifest import Component, Embedding, Manifest
from runtimes.session import Array


def names(manifest: Manifest) -> tuple[str, ...]:
    """The arguments' names, those of the call itself first."""
    return tuple(p + each.name for p in ("", *_prefixes(manifest)) for each in manifest.embeddings)


def parse(
    manifest: Manifest, given: Mapping[str, Any], texts: Sequence[str]
) -> tuple[dict[str, Array], int]:
    """The encoded texts in `given`, by argument, and how many prompts they are for (0: the call's
    own are texts).

    Args:
        texts: the names of the call's own texts.

    Raises:
        InputError: no array of numbers of the right shape; only a part of a branch's; a text and an
            encoded text for one branch; different lengths.
    """
    found: dict[str, Array] = {}
    for prefix in ("", *_prefixes(manifest)):
        own = {prefix + each.name: each for each in manifest.embeddings}
        here = [name for name in own if name in given]
        if not here:
            continue
        missing = [name for name in own if name not in given]
        if missing:
            raise InputError(
                f"{' and '.join(map(repr, here))} without {' and '.join(map(repr, missing))}: this "
                "bundle needs all of them (encode_prompt gives them), or a text"
            )
        both = [prefix + name for name in texts if prefix + name in given]
        if both:
            raise InputError(f"{both[0]!r} and {here[0]!r} say the same thing: give one of them")
        found |= {name: _array(manifest, name, own[name], given[name]) for name in here}
    for each in manifest.embeddings:
        lengths = _lengths(manifest, found, each)
        if len(set(lengths.values())) > 1:
            raise InputError(f"encoded texts of different lengths: {lengths}")
    return found, max(
        (len(found[n.name]) for n in manifest.embeddings if n.name in found), default=0
    )


def spread(found: Mapping[str, Array], prompts: int) -> dict[str, Array]:
    """With a row for each of `prompts`: one is for all of them.

    Raises:
        InputError: another number of rows.
    """
    for name, array in found.items():
        if len(array) not in (1, prompts):
            raise InputError(f"{name!r} has {len(array)} rows for {prompts} prompts")
    return {n: v if len(v) == prompts else np.repeat(v, prompts, axis=0) for n, v in found.items()}


def of_branch(manifest: Manifest, found: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The encoded texts of a branch, by denoiser input; empty where it has texts."""
    made: dict[str, Array] = {}
    for each in manifest.embeddings:
        if prefix + each.name in found:
            made |= _parts(manifest, each, found[prefix + each.name])
    return made


def joined(embedding: Embedding, made: Mapping[str, Array]) -> Array:
    """The argument's array of what encoders made, by denoiser input: a copy."""
    parts = [made[name] for name in embedding.inputs]
    if embedding.frame is None:
        return np.concatenate(parts, axis=-1)
    array = np.zeros((len(parts[0]), *embedding.frame), parts[0].dtype)
    start = 0
    for part in parts:
        array[:, start : start + part.shape[1], : part.shape[2]] = part
        start += part.shape[1]
    return array


def misfit(manifest: Manifest, denoiser: Component, found: Mapping[str, Array], chunks: int) -> str:
    """Why a denoiser that was loaded for texts of one length does not do for a call of up to
    `chunks` chunks; empty if it does."""
    free = manifest.component("denoiser").inputs
    for each in manifest.embeddings:
        first = next(iter(each.inputs))
        fixed = denoiser.inputs[first].shape[1]
        if fixed == free[first].shape[1]:
            continue
        if chunks > 1 or any(n != fixed for n in _lengths(manifest, found, each).values()):
            return (
                f"this call may give the denoiser encoded texts of another length than {fixed}, "
                "which it was loaded for: load it without static"
            )
    return ""


def _prefixes(manifest: Manifest) -> tuple[str, ...]:
    """Of the guidance branches, less that of the call itself."""
    prefixes = [branch.prefix for branch in manifest.guidance.branches]
    return tuple(dict.fromkeys(prefix for prefix in prefixes if prefix))


def _lengths(manifest: Manifest, found: Mapping[str, Array], of: Embedding) -> dict[str, int]:
    """By argument: positions of sequences, widths of what is none."""
    given = [prefix + of.name for prefix in ("", *_prefixes(manifest))]
    return {name: found[name].shape[1] for name in given if name in found}


def _parts(manifest: Manifest, embedding: Embedding, array: Array) -> dict[str, Array]:
    """The reverse of `joined`."""
    shapes = [manifest.component("denoiser").inputs[name].shape for name in embedding.inputs]
    if embedding.frame is None:
        ends = np.cumsum([int(shape[-1]) for shape in shapes])
        parts = np.split(array, ends[:-1], axis=-1)
    else:
        ends = np.cumsum([int(shape[1]) for shape in shapes])
        rows = np.split(array, ends, axis=1)  # the last of them are zeros
        parts = [row[:, :, : int(shape[2])] for row, shape in zip(rows, shapes, strict=False)]
    return dict(zip(embedding.inputs, parts, strict=True))


def _shape(manifest: Manifest, embedding: Embedding) -> tuple[int | str, ...]:
    """Of the argument's array, prompts left out; a string is a length that a call may choose."""
    if embedding.frame is not None:
        return embedding.frame
    shapes = [manifest.component("denoiser").inputs[name].shape for name in embedding.inputs]
    return (*shapes[0][1:-1], sum(int(shape[-1]) for shape in shapes))


def _array(manifest: Manifest, name: str, embedding: Embedding, value: Any) -> Array:
    made = {n: spec for each in manifest.encoders() for n, spec in each.outputs.items()}
    dtype = made[next(iter(embedding.inputs))].dtype
    wanted = _shape(manifest, embedding)
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"of {array.dtype}")
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name!r} must be an array of numbers: {error}") from None
    fits = (
        array.ndim == len(wanted) + 1
        and array.size
        and all(isinstance(w, str) or w == f for w, f in zip(wanted, array.shape[1:], strict=True))
    )
    if not fits:
        rest = ", ".join(map(str, wanted))
        raise InputError(f"{name!r} must have the shape [prompts, {rest}], not {[*array.shape]}")
    if not np.isfinite(array).all():
        raise InputError(f"{name!r} holds NaN, infinity or numbers beyond {dtype}")
    if embedding.frame and not np.array_equal(
        joined(embedding, _parts(manifest, embedding, array)), array
    ):
        raise InputError(
            f"{name!r} has numbers where this bundle's encoders have none and the array is zero: "
            "was it made for another model?"
        )
    return array
