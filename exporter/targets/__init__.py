"""One file per target: an ExportedProgram and its component → files in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.errors import InputError
from runtimes.manifest import Component

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class TargetInfo:
    """Where a target's lowering is, the backend that verifies it, and the packages whose
    versions decide what it writes."""

    module: str
    backend: str
    packages: tuple[str, ...]


TARGETS: Mapping[str, TargetInfo] = {
    "onnx": TargetInfo("onnx", "onnxruntime", ("onnx", "onnx-ir", "onnxscript")),
    "openvino": TargetInfo("openvino", "openvino", ("openvino",)),
    "torch": TargetInfo("torch", "torch", ()),
}


class Target(Protocol):
    """The interface of a target's module."""

    def lower(self, program: ExportedProgram, component: Component, folder: Path) -> str:
        """Write the graph into `folder`; return the name of the file to open."""
        ...


def get(name: str) -> Target:
    """The target's module. Raises InputError for an unknown name."""
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}")
    module: Any = import_module(f"exporter.targets.{TARGETS[name].module}")
    return module  # type: ignore[no-any-return]
