"""TensorRT: typed ONNX graphs, whose engines are made where their GPU is."""

from __future__ import annotations

from latentc.exporter.passes import COMPUTED, TYPED_INTEGERS
from latentc.exporter.targets.onnx import PACKAGES
from latentc.exporter.targets.target import TargetInfo

# Verified as plain ONNX: TensorRT's engines are made and checked where its GPU is. ONNX Runtime has
# no bfloat16 on the CPU; OpenVINO reads it.
TARGET = TargetInfo(
    module=f"{__name__}.lowering",
    backend="onnxruntime",
    packages=PACKAGES,
    precisions={**COMPUTED, **TYPED_INTEGERS},
    instead={"bf16": "openvino"},
    memory=0.0,
    seconds=36.0,
    rewrites=False,
)
