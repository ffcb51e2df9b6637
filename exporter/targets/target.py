"""This module defines what the compiler has to know of a target, and its module's interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from latentc.exporter.passes import Precisions
from latentc.exporter.targets.options import TargetOptions

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from latentc.exporter.components.description import Description
    from latentc.runtimes.bundle.structures import Component


@dataclass(frozen=True)
class TargetInfo:
    """The record of a target says where its lowering is, which backend verifies it (for some
    precisions another one, see `instead`), and which packages' versions decide what it writes.

    `precisions`: those it can be asked for, and the passes that run for each. `options`: the
    class of its own options; its lowering is told them (see `latentc.exporter.targets.options`).
    `computes`: what the engine is to be asked to
    calculate in for a precision, where the graph itself does not say it. `sides_alone`: of all
    sizes only height and width can be open in its graphs, and the number of frames cannot.

    For the preflight, roughly: `memory`, bytes of anonymous memory for each byte of a component's
    weights while it is lowered; `seconds` of two cores for 1e9 parameters; `rewrites`, whether
    weights that the files hold in another type are written once more.

    A target of another package is one of these, or a function that returns it, named in the
    entry-point group ``latentc.targets``.
    """

    module: str
    backend: str
    packages: tuple[str, ...]
    precisions: Precisions
    instead: Mapping[str, str] = field(default_factory=dict)
    options: type[TargetOptions] = TargetOptions
    computes: Mapping[str, str] = field(default_factory=dict)
    sides_alone: bool = False
    memory: float = 1.0
    seconds: float = 60.0
    rewrites: bool = True


class Target(Protocol):
    """The interface of a target's module."""

    def lower(
        self, program: ExportedProgram, component: Component, folder: Path, **settings: Any
    ) -> str:
        """Write the graph into `folder`; return the name of the file to open.

        A target with options of its own also takes ``settings``, a `Settings`.
        """
        ...


@runtime_checkable
class Finishing(Protocol):
    """A `Finishing` is a target's module that has a last word, knowing the whole pipeline."""

    def finish(
        self,
        component: Component,
        description: Description,
        precision: str,
        note: str,
        folder: Path,
    ) -> None:
        """Write more files into `folder`. `precision` is what the graph computes in, a dtype's
        name; `note` says why that is not what was asked for, or is empty."""
        ...
