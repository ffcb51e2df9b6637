"""ONNX, for ONNX Runtime and whatever else reads it."""

from __future__ import annotations

from latentc.exporter.passes import STORED, WEIGHTS
from latentc.exporter.targets.target import TargetInfo

# The packages whose versions decide what ONNX graphs look like.
PACKAGES = ("onnx", "onnx-ir", "onnxscript")

TARGET = TargetInfo(
    module=f"{__name__}.lowering",
    backend="onnxruntime",
    packages=PACKAGES,
    precisions={**STORED, **WEIGHTS},
    memory=0.0,
    seconds=36.0,
    rewrites=False,
)
