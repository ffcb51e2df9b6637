"""Operators that reduce along axes, and those that divide by what they found there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.coreml.mil.operators.operator import Operator


def softmax(x: Array, axis: int = -1) -> Array:
    shifted = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True))


def layer_norm(
    x: Array,
    axes: Sequence[int] | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """Return (x - mean) / sqrt(variance + epsilon) * gamma + beta; gamma and beta span `axes`."""
    over = sorted(axis % x.ndim for axis in (range(x.ndim) if axes is None else axes))
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    centred = x - x.mean(axis=tuple(over), keepdims=True)
    variance = np.square(centred).mean(axis=tuple(over), keepdims=True)
    normal = centred / np.sqrt(variance + np.float32(epsilon))
    if gamma is not None:
        normal = normal * gamma.reshape(shape)
    if beta is not None:
        normal = normal + beta.reshape(shape)
    return np.asarray(normal)


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """Return the same as `layer_norm`, with given mean and variance for each channel (axis 1)."""
    shape = (-1, *[1] * (x.ndim - 2))
    scale = (1 if gamma is None else gamma) / np.sqrt(variance + np.float32(epsilon))
    normal = (x - mean.reshape(shape)) * scale.reshape(shape)
    return np.asarray(normal if beta is None else normal + beta.reshape(shape))


def reduce_argmax(
    x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Array:
    return np.asarray(np.argmax(x, axis=int(axis), keepdims=bool(keep_dims)))


def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    values = np.flip(x, axis) if reverse else x
    total = np.cumsum(values, axis=int(axis), dtype=x.dtype)
    if exclusive:
        total = total - values
    return np.flip(total, axis) if reverse else total


def _reduction(function: Any) -> Operator:
    def reduce(x: Array, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(function(x, axis=over, keepdims=bool(keep_dims)))

    return reduce


OPERATORS: Mapping[str, Operator] = {
    "batch_norm": batch_norm,
    "cumsum": cumsum,
    "layer_norm": layer_norm,
    "reduce_argmax": reduce_argmax,
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean),
    "reduce_min": _reduction(np.min),
    "reduce_prod": _reduction(np.prod),
    "reduce_sum": _reduction(np.sum),
    "softmax": softmax,
}
