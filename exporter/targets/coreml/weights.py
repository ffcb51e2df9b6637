"""Smaller weights for Core ML: int8, and palettes of 256, 64 or 16 values.

Weights are compressed in the finished model, by coremltools, and decompressed by Core ML as it
loads or computes (``constexpr_*`` operations in the file). Arithmetic is that of fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SMALLEST = 2048  # values; smaller weights are left as they are
_PALETTE_BITS = {"palette8": 8, "palette6": 6, "palette4": 4}


def compress(model: Any, precision: str) -> Any:
    """The model with the weights that `precision` names; unchanged for fp32 and fp16.

    int8: linear and symmetric, one scale for each output channel. palette<n>: each weight
    tensor becomes indices of n bits into 2^n values.
    """
    from coremltools.optimize import coreml

    if precision == "int8":
        linear = coreml.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int8", weight_threshold=SMALLEST
        )
        config = coreml.OptimizationConfig(global_config=linear)
        return coreml.linear_quantize_weights(model, config)
    if precision in _PALETTE_BITS:
        palette = coreml.OpPalettizerConfig(
            mode="custom",
            lut_function=_palette(2 ** _PALETTE_BITS[precision]),
            weight_threshold=SMALLEST,
        )
        return coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=palette))
    return model


def _palette(size: int) -> Callable[[Any], tuple[Any, Any]]:
    """A function: weights → (palette [size], index of each weight, flat uint8).

    The palette is the optimal one, by the one-dimensional k-means that comes with coremltools
    (Grønlund et al. 2017, https://arxiv.org/abs/1701.07204). Its own choice would be another
    algorithm for small tensors, which needs scikit-learn.
    """
    from coremltools._deps import kmeans1d

    def make(weight: Any) -> tuple[Any, Any]:
        values, where, counts = np.unique(weight, return_inverse=True, return_counts=True)
        found = min(size, len(values))
        clusters, centres = kmeans1d.cluster(values, found, weights=counts)
        table = np.zeros(size, weight.dtype)
        table[:found] = centres
        return table, np.array(clusters, np.uint8)[where.reshape(-1)]

    return make
