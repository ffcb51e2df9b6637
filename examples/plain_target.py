"""A target, a precision and a backend for docs/extending.md: ONNX graphs that are called plain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from latentc.runtimes.backends.onnxruntime import OnnxRuntimeBackend
from latentc.runtimes.bundle.precisions import Precision, Tolerance

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from latentc.exporter.passes import Choices
    from latentc.exporter.targets import TargetInfo
    from latentc.runtimes.bundle.structures import Component


class PlainBackend(OnnxRuntimeBackend):
    """Loads the target's builds."""

    name: ClassVar[str] = "plain"
    targets: ClassVar[tuple[str, ...]] = ("plain",)


# The precision "fp24": what its builds may be off by, and how large they are.
FP24 = Precision(Tolerance(1e-4, 1e-3, 2, 40.0, 0.02), bytes=3)


def target() -> TargetInfo:
    """Return what the compiler has to know of the target."""
    from latentc.exporter.targets import TargetInfo

    return TargetInfo(
        module=__name__,
        backend="plain",
        packages=("onnx", "onnx-ir", "onnxscript"),
        precisions={"fp32": (), "fp24": (__name__,)},
    )


def run(program: ExportedProgram, choices: Choices) -> int:
    """Round the weights to 24 bits, 15 of them mantissa: the pass of the precision "fp24"."""
    import torch

    from latentc.exporter.stored_weights import actual

    names = program.graph_signature.parameters
    for name in names:
        bits = actual(program.state_dict[name]).detach().view(torch.int32)
        rounded = ((bits + 0x80) & ~0xFF).view(torch.float32)
        program.state_dict[name] = torch.nn.Parameter(rounded, requires_grad=False)
    return len(names)


def lower(program: ExportedProgram, component: Component, folder: Path, **settings: Any) -> str:
    """Write the graph as ONNX."""
    from latentc.exporter.targets.onnx import lowering as onnx

    return onnx.lower(program, component, folder, **settings)
