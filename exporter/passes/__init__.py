"""Rewrites of a captured program, one per file, applied before any target lowers it.

A pass takes an ExportedProgram, changes it in place and returns how many places changed.
"""

from __future__ import annotations

from collections.abc import Mapping

# Precision → the passes that make it, by module name. One line per precision.
PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("fp16_weights",),
}
