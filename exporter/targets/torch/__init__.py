"""PyTorch's own archive of an exported program."""

from __future__ import annotations

from latentc.exporter.passes import COMPUTED, STORED
from latentc.exporter.targets.target import TargetInfo

TARGET = TargetInfo(
    module=f"{__name__}.lowering",
    backend="torch",
    packages=(),
    precisions={**STORED, "bf16": COMPUTED["bf16"]},
    memory=0.1,
    seconds=15.0,
)
