"""Core ML: ML Programs."""

from __future__ import annotations

import sys

from latentc.exporter.targets.coreml.options import CoreMLOptions
from latentc.exporter.targets.target import TargetInfo

TARGET = TargetInfo(
    module=f"{__name__}.lowering",
    backend="coreml" if sys.platform == "darwin" else "coreml-reference",
    packages=("coremltools",),
    # Its precisions are made by its converter and its optimiser: no passes.
    precisions=dict.fromkeys(("fp32", "fp16", "int8", "palette8", "palette6", "palette4"), ()),
    options=CoreMLOptions,
    sides_alone=True,
    memory=2.5,
    seconds=130.0,
)
