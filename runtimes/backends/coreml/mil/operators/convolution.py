"""Convolution, in any number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.coreml.mil.operators.operator import Operator


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Array:
    """Return the convolution of x [n, in, *space] with weight [out, in/groups, *kernel]: [n, out,
    *space'].

    One matrix product for each place of the kernel, summed up: no unfolded copy of the
    input, which would be as many times larger as the kernel has places.
    """
    rank = x.ndim - 2
    kernel = weight.shape[2:]
    steps = [int(step) for step in strides] if strides is not None else [1] * rank
    widths = [int(width) for width in dilations] if dilations is not None else [1] * rank
    spans = [(size - 1) * width + 1 for size, width in zip(kernel, widths, strict=True)]
    before_after = _padding(pad_type, pad, x.shape[2:], spans, steps)
    padded = np.pad(x, [(0, 0), (0, 0), *before_after])
    sizes = [
        (length - span) // step + 1
        for length, span, step in zip(padded.shape[2:], spans, steps, strict=True)
    ]
    n, out_channels, groups = x.shape[0], weight.shape[0], int(groups)
    split = weight.reshape(groups, out_channels // groups, *weight.shape[1:])
    total = np.zeros((n, groups, out_channels // groups, int(np.prod(sizes))), np.float32)
    for place in product(*map(range, kernel)):
        window = [
            slice(at * width, at * width + (size - 1) * step + 1, step)
            for at, width, size, step in zip(place, widths, sizes, steps, strict=True)
        ]
        seen = padded[(slice(None), slice(None), *window)].reshape(n, groups, split.shape[2], -1)
        tap: tuple[Any, ...] = (..., *place)
        total += split[tap] @ seen
    result = total.reshape(n, out_channels, *sizes)
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def _padding(
    pad_type: str,
    pad: Sequence[int] | None,
    lengths: Sequence[int],
    spans: Sequence[int],
    steps: Sequence[int],
) -> list[tuple[int, int]]:
    """Return the padding (before, after) of each spatial axis."""
    if pad_type == "valid":
        return [(0, 0)] * len(lengths)
    if pad_type == "custom":
        widths = [int(each) for each in pad] if pad is not None else [0] * 2 * len(lengths)
        return list(zip(widths[::2], widths[1::2], strict=True))
    padding = []
    for length, span, step in zip(lengths, spans, steps, strict=True):
        needed = max(0, (-(-length // step) - 1) * step + span - length)
        less, more = needed // 2, needed - needed // 2
        padding.append((less, more) if pad_type == "same" else (more, less))
    return padding


OPERATORS: Mapping[str, Operator] = {"conv": conv}
