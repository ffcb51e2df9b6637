"""Operators that multiply matrices; all of them end in numpy's matmul."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.coreml.mil.operators.normalization import softmax
from latentc.runtimes.backends.coreml.mil.operators.operator import Operator


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return x [..., in] times weight [out, in] plus bias [out], which is [..., out]."""
    product = x @ weight.T
    return np.asarray(product if bias is None else product + bias)


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Return the batched product; a flag swaps the last two axes of its operand first."""
    left = np.swapaxes(x, -1, -2) if transpose_x and x.ndim > 1 else x
    right = np.swapaxes(y, -1, -2) if transpose_y and y.ndim > 1 else y
    return np.asarray(left @ right)


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """Return softmax(query keyᵀ / √width + mask) value; a boolean mask keeps what is true."""
    scores = query @ np.swapaxes(key, -1, -2) * np.float32(1 / np.sqrt(query.shape[-1]))
    if attn_mask is not None:
        if attn_mask.dtype == np.bool_:
            scores = np.where(attn_mask, scores, -np.inf)
        else:
            scores = scores + attn_mask
    return np.asarray(softmax(scores) @ value)


def einsum(values: Sequence[Array], equation: str) -> Array:
    """Return einstein's sum of two operands, as one batched product."""
    left, right, out = equation.replace("->", ",").replace(" ", "").split(",")
    a, b = values
    batch = [axis for axis in left if axis in right and axis in out]
    inner = [axis for axis in left if axis in right and axis not in out]
    rows = [axis for axis in left if axis not in right]
    columns = [axis for axis in right if axis not in left]
    sizes = dict(zip(left + right, a.shape + b.shape, strict=True))
    first = _ordered(a, left, batch, rows, inner)
    second = _ordered(b, right, batch, inner, columns)
    order = [*batch, *rows, *columns]
    product = (first @ second).reshape([sizes[axis] for axis in order])
    return np.asarray(product.transpose([order.index(axis) for axis in out]))


def _ordered(x: Array, axes: str, *groups: Sequence[str]) -> Array:
    """Return `x` transposed to the order of `groups`, each of them folded into one axis."""
    moved = x.transpose([axes.index(axis) for group in groups for axis in group])
    shape = [int(np.prod([x.shape[axes.index(axis)] for axis in group])) for group in groups]
    return moved.reshape(shape)


OPERATORS: Mapping[str, Operator] = {
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
