"""Operators that move, cut, join and make up tensors, and compute nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.coreml.mil.operators.operator import Operator

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def reshape(x: Array, shape: Sequence[int]) -> Array:
    """Return `x` in another shape: -1 stands for the rest, 0 for the input's own dimension."""
    wanted = [int(size) for size in shape]
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)])


def transpose(x: Array, perm: Sequence[int]) -> Array:
    return x.transpose([int(axis) for axis in perm])


def expand_dims(x: Array, axes: Sequence[int]) -> Array:
    return np.expand_dims(x, _integers(axes))


def squeeze(x: Array, axes: Sequence[int] | None = None) -> Array:
    return np.squeeze(x, None if axes is None else _integers(axes))


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    parts = [np.atleast_1d(value) for value in values]
    if not interleave:
        return np.concatenate(parts, axis=int(axis))
    stacked = np.stack(parts, axis=int(axis) % parts[0].ndim + 1)
    shape = list(parts[0].shape)
    shape[int(axis)] *= len(parts)
    return stacked.reshape(shape)


def split(
    x: Array, axis: int, split_sizes: Sequence[int] | None = None, num_splits: int | None = None
) -> tuple[Array, ...]:
    if split_sizes is not None:
        return tuple(np.split(x, np.cumsum(split_sizes)[:-1], axis=int(axis)))
    assert num_splits is not None
    return tuple(np.split(x, int(num_splits), axis=int(axis)))


def stack(values: Sequence[Array], axis: int) -> Array:
    return np.stack(values, axis=int(axis))


def slice_by_index(
    x: Array,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Array:
    """Return Python's begin:end:stride of each axis.

    A mask leaves out begin or end, or takes one index.
    """
    index: list[slice | int] = []
    for axis in range(x.ndim):
        first, last = int(begin[axis]), int(end[axis])
        step = 1 if stride is None else int(stride[axis])
        if squeeze_mask is not None and squeeze_mask[axis]:
            index.append(first)
            continue
        open_begin = begin_mask is not None and bool(begin_mask[axis])
        open_end = end_mask is not None and bool(end_mask[axis])
        index.append(slice(None if open_begin else first, None if open_end else last, step))
    return np.asarray(x[tuple(index)])


def slice_by_size(x: Array, begin: Sequence[int], size: Sequence[int]) -> Array:
    """Return the part of `x` that begins at `begin`; a size of -1 goes up to the end."""
    index = []
    for axis, (first, count) in enumerate(zip(_integers(begin), _integers(size), strict=True)):
        start = first % x.shape[axis] if first < 0 else first
        index.append(slice(start, None if count == -1 else start + count))
    return x[tuple(index)]


def gather(
    x: Array,
    indices: Array,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Array:
    """Return x at `indices` along `axis`; the first `batch_dims` axes of both go together."""
    count, axis = int(batch_dims), int(axis) % x.ndim
    where = np.asarray(indices, np.intp)
    if count == 0:
        return np.take(x, where, axis=axis)
    rows = np.ndindex(*x.shape[:count])
    taken = [np.take(x[row], where[row], axis=axis - count) for row in rows]
    return np.stack(taken).reshape(*x.shape[:count], *taken[0].shape)


def gather_along_axis(
    x: Array, indices: Array, axis: int = 0, validate_indices: bool = False
) -> Array:
    return np.take_along_axis(x, np.asarray(indices, np.intp), int(axis))


def gather_nd(
    x: Array, indices: Array, batch_dims: int = 0, validate_indices: bool = False
) -> Array:
    """Return parts of `x`; the last axis of `indices` holds the leading coordinates of each."""
    count, where = int(batch_dims), np.asarray(indices, np.intp)
    if count == 0:
        return np.asarray(x[tuple(np.moveaxis(where, -1, 0))])
    rows = np.ndindex(*x.shape[:count])
    taken = [np.asarray(x[row][tuple(np.moveaxis(where[row], -1, 0))]) for row in rows]
    return np.stack(taken).reshape(*x.shape[:count], *taken[0].shape)


def tile(x: Array, reps: Sequence[int]) -> Array:
    return np.tile(x, _integers(reps))


def pad(x: Array, pad: Sequence[int], mode: str = "constant", constant_val: float = 0.0) -> Array:
    """Return `x` padded; `pad` holds (before, after) of the last axes."""
    amounts = _integers(pad)
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    widths = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    options: dict[str, Any] = {"constant_values": constant_val} if mode == "constant" else {}
    return np.asarray(np.pad(x, widths, _PAD_MODES[mode], **options))  # type: ignore[call-overload]


def upsample_nearest_neighbor(
    x: Array, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Array:
    """Return x [..., height, width] enlarged: each output pixel is the input pixel it lies in."""
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        length = x.shape[axis]
        where = np.floor(np.arange(int(length * float(factor))) / float(factor))
        x = np.take(x, np.minimum(where.astype(np.intp), length - 1), axis=axis)
    return x


def shape(x: Array) -> Array:
    return np.array(x.shape, np.int32)


def fill(shape: Sequence[int], value: float = 0.0) -> Array:
    return np.full(_integers(shape), value)


def fill_like(ref_tensor: Array, value: float = 0.0) -> Array:
    return np.full(ref_tensor.shape, value)


def band_part(x: Array, lower: int = -1, upper: int = -1) -> Array:
    """Return `x`, zero outside a band of its matrices: `lower` diagonals below the main one and
    `upper` above it. -1 keeps all.
    """
    rows, columns = np.indices(x.shape[-2:])
    below = int(lower) < 0 or rows - columns <= int(lower)
    above = int(upper) < 0 or columns - rows <= int(upper)
    return np.where(np.logical_and(below, above), x, np.zeros((), x.dtype))


def range_1d(end: float, start: float, step: float) -> Array:
    return np.arange(start, end, step)


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in np.atleast_1d(values))


OPERATORS: Mapping[str, Operator] = {
    function.__name__: function
    for function in (
        *(
            band_part,
            concat,
            expand_dims,
            fill,
            fill_like,
            gather,
            gather_along_axis,
            gather_nd,
            pad,
        ),
        *(range_1d, reshape, shape, slice_by_index, slice_by_size, split, squeeze, stack),
        *(tile, transpose, upsample_nearest_neighbor),
    )
}
