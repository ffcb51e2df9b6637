"""OpenVINO's IR."""

from __future__ import annotations

from latentc.exporter.passes import STORED, W8A8, WEIGHTS
from latentc.exporter.targets.target import TargetInfo

TARGET = TargetInfo(
    module=f"{__name__}.lowering",
    backend="openvino",
    packages=("openvino",),
    precisions={**STORED, "bf16": STORED["fp16"], **WEIGHTS, **W8A8},
    computes={"bf16": "bf16"},
    memory=0.0,
    seconds=32.0,
)
