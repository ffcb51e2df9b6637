"""One file per target: an ExportedProgram and its component → files in a folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from exporter.passes import PRECISIONS
from exporter.targets.coreml_options import CoreMLOptions
from exporter.targets.options import TargetOptions
from runtimes.errors import InputError
from runtimes.manifest import Component

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class TargetInfo:
    """Where a target's lowering is, the backend that verifies it, and the packages whose
    versions decide what it writes.

    `precisions`: those it can be asked for, and the passes that run for each. `options`: the
    class of its own options; its lowering is told them (see `exporter.targets.options`). `code`:
    other modules that decide what it writes.
    """

    module: str
    backend: str
    packages: tuple[str, ...]
    precisions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PRECISIONS)
    options: type[TargetOptions] = TargetOptions
    code: tuple[str, ...] = ()


# Core ML's own precisions are made by its converter and its optimiser: no passes.
_COREML = dict.fromkeys(("fp32", "fp16", "int8", "palette8", "palette6", "palette4"), ())

TARGETS: Mapping[str, TargetInfo] = {
    "onnx": TargetInfo("onnx", "onnxruntime", ("onnx", "onnx-ir", "onnxscript")),
    "openvino": TargetInfo("openvino", "openvino", ("openvino",)),
    "torch": TargetInfo("torch", "torch", ()),
    "coreml": TargetInfo(
        "coreml",
        "coreml" if sys.platform == "darwin" else "coreml-reference",
        ("coremltools",),
        _COREML,
        CoreMLOptions,
        (
            *("exporter.targets.coreml_options", "exporter.targets.coreml_shapes"),
            *("exporter.targets.coreml_weights", "exporter.passes.split_einsum_attention"),
        ),
    ),
}
OPTIONS = {name: info.options for name, info in TARGETS.items()}


class Target(Protocol):
    """The interface of a target's module."""

    def lower(
        self, program: ExportedProgram, component: Component, folder: Path, **settings: Any
    ) -> str:
        """Write the graph into `folder`; return the name of the file to open.

        A target with options of its own also takes ``settings``, a `Settings`.
        """
        ...


def get(name: str) -> Target:
    """The target's module. Raises InputError for an unknown name."""
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}")
    module: Any = import_module(f"exporter.targets.{TARGETS[name].module}")
    return module  # type: ignore[no-any-return]


def passes(target: str, precision: str, options: TargetOptions) -> tuple[str, ...]:
    """The passes that run on the captured program before this target lowers it."""
    return (*TARGETS[target].precisions[precision], *options.passes())


def pairs() -> str:
    """The precisions of every target, as text."""
    return "; ".join(f"{name}: {', '.join(info.precisions)}" for name, info in TARGETS.items())
