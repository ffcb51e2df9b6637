"""Rewrites of a captured program, one per file, applied before any target lowers it.

A pass takes an ExportedProgram, changes it in place and returns how many places changed.
"""

from __future__ import annotations

from collections.abc import Mapping

# Precision → the passes that make it, by module name. Each target names the table that it goes
# by (exporter/targets). STORED: weights in half precision, arithmetic in float32. COMPUTED:
# arithmetic too, for engines that compute as the graph is typed.
Precisions = Mapping[str, tuple[str, ...]]

STORED: Precisions = {"fp32": (), "fp16": ("fp16_weights",)}
COMPUTED: Precisions = {"fp32": (), "fp16": ("fp16_compute",), "bf16": ("bf16_compute",)}

# What a program computes in after a pass, where that is not float32.
COMPUTES: Mapping[str, str] = {"fp16_compute": "float16", "bf16_compute": "bfloat16"}
