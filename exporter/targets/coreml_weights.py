"""Smaller weights for Core ML: int8, and palettes of 256, 64 or 16 values.

Both are coremltools' own. Weights are compressed in the finished model and decompressed by Core
ML as it loads or computes (`constexpr_*` operations in the file).
"""

from __future__ import annotations

from typing import Any

SMALLEST = 2048  # values; smaller weights are left as they are
_PALETTE_BITS = {"palette8": 8, "palette6": 6, "palette4": 4}


def compress(model: Any, precision: str) -> Any:
    """The model with the weights that `precision` names; unchanged for fp32 and fp16.

    int8: linear, symmetric, a scale for each output channel. palette<n>: each weight tensor
    becomes indices of n bits into 2^n values, found by k-means.
    """
    from coremltools.optimize import coreml

    if precision == "int8":
        how = coreml.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int8", weight_threshold=SMALLEST
        )
        return coreml.linear_quantize_weights(model, coreml.OptimizationConfig(global_config=how))
    if precision in _PALETTE_BITS:
        palette = coreml.OpPalettizerConfig(
            mode="kmeans", nbits=_PALETTE_BITS[precision], weight_threshold=SMALLEST
        )
        return coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=palette))
    return model
