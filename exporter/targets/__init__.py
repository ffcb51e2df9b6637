"""One file per target: an ExportedProgram and its component → files in a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from latentc.exporter.passes import (
    COMPUTED,
    STORED,
    TYPED_INTEGERS,
    W8A8,
    WEIGHTS,
    Precisions,
    bytes_of,
    modules,
)
from latentc.exporter.targets.coreml.options import CoreMLOptions
from latentc.exporter.targets.options import TargetOptions
from latentc.runtimes import plugins
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import InputError, first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from latentc.exporter.components.description import Description


@dataclass(frozen=True)
class TargetInfo:
    """Where a target's lowering is, the backend that verifies it (for some precisions another
    one, see `instead`), and the packages whose versions decide what it writes.

    `precisions`: those it can be asked for, and the passes that run for each. `options`: the
    class of its own options; its lowering is told them (see `latentc.exporter.targets.options`).
    `code`: other modules that decide what it writes. `computes`: what the engine is to be asked to
    calculate in for a precision, where the graph itself does not say it. `sides_alone`: of all
    sizes only height and width can be open in its graphs, and the number of frames cannot.

    For the preflight, roughly: `size`, by precision the bytes of one number in a build, where
    `latentc.exporter.passes.bytes_of` does not know it; `memory`, bytes of anonymous memory for
    each byte of a component's weights while it is lowered; `seconds` of two cores for 1e9
    parameters; `rewrites`, whether weights that the files hold in another type are written once
    more.

    A target of another package is one of these, or a function that returns it, named in the
    entry-point group `ENTRY_POINTS`.
    """

    module: str
    backend: str
    packages: tuple[str, ...]
    precisions: Precisions
    instead: Mapping[str, str] = field(default_factory=dict)
    options: type[TargetOptions] = TargetOptions
    code: tuple[str, ...] = ()
    computes: Mapping[str, str] = field(default_factory=dict)
    sides_alone: bool = False
    size: Mapping[str, float] = field(default_factory=dict)
    memory: float = 1.0
    seconds: float = 60.0
    rewrites: bool = True

    def bytes_of(self, precision: str) -> float:
        """Bytes of one number of a large weight in a build."""
        return self.size.get(precision) or bytes_of(precision)


ENTRY_POINTS = "latentc.targets"
_ONNX = ("onnx", "onnx-ir", "onnxscript")
_DECOMPOSED = "latentc.exporter.capture.decompose"
_ONNX_CODE = (
    _DECOMPOSED,
    *(
        f"latentc.exporter.targets.onnx.{each}"
        for each in ("attention", "integers", "masks", "optimize", "registry", "types", "weights")
    ),
)
# Core ML's own precisions are made by its converter and its optimiser: no passes.
_COREML = dict.fromkeys(("fp32", "fp16", "int8", "palette8", "palette6", "palette4"), ())

_OWN: Mapping[str, TargetInfo] = {
    "onnx": TargetInfo(
        "latentc.exporter.targets.onnx.lowering",
        "onnxruntime",
        _ONNX,
        {**STORED, **WEIGHTS},
        code=_ONNX_CODE,
        memory=0.0,
        seconds=36.0,
        rewrites=False,
    ),
    "openvino": TargetInfo(
        "latentc.exporter.targets.openvino.lowering",
        "openvino",
        ("openvino",),
        {**STORED, "bf16": STORED["fp16"], **WEIGHTS, **W8A8},
        code=(
            *(_DECOMPOSED, "latentc.exporter.targets.openvino.int4"),
            "latentc.exporter.passes.plain_integers",
        ),
        computes={"bf16": "bf16"},
        memory=0.0,
        seconds=32.0,
    ),
    "torch": TargetInfo(
        "latentc.exporter.targets.torch",
        "torch",
        (),
        {**STORED, "bf16": COMPUTED["bf16"]},
        memory=0.1,
        seconds=15.0,
    ),
    # Verified as plain ONNX: TensorRT's engines are made and checked where its GPU is. ONNX
    # Runtime has no bfloat16 on the CPU; OpenVINO reads it.
    "tensorrt": TargetInfo(
        "latentc.exporter.targets.tensorrt",
        "onnxruntime",
        _ONNX,
        {**COMPUTED, **TYPED_INTEGERS},
        {"bf16": "openvino"},
        code=_ONNX_CODE,
        memory=0.0,
        seconds=36.0,
        rewrites=False,
    ),
    "coreml": TargetInfo(
        "latentc.exporter.targets.coreml.lowering",
        "coreml" if sys.platform == "darwin" else "coreml-reference",
        ("coremltools",),
        _COREML,
        options=CoreMLOptions,
        sides_alone=True,
        code=(
            *("latentc.exporter.targets.coreml.options", "latentc.exporter.targets.coreml.shapes"),
            *(
                "latentc.exporter.targets.coreml.weights",
                "latentc.exporter.targets.coreml.operations",
            ),
            *("latentc.exporter.targets.coreml.overflow", _DECOMPOSED),
            "latentc.exporter.passes.split_einsum_attention",
        ),
        memory=2.5,
        seconds=130.0,
    ),
}


class _Targets(Mapping[str, TargetInfo]):
    """latentc's own targets, then those of installed packages, which are imported when they are
    looked at. Iterating passes over packages that are broken; asking for one by its name raises
    InputError, which says what it raised."""

    def __getitem__(self, name: str) -> TargetInfo:
        if name in _OWN:
            return _OWN[name]
        reference = self._offered()[name]
        try:
            info = plugins.resolve(reference)
            if callable(info):
                with plugins.started(reference):
                    info = info()
        except (plugins.BrokenPlugin, ImportError) as error:
            raise InputError(f"target {name!r}: {first_line(error)}") from error
        if not isinstance(info, TargetInfo):
            raise InputError(f"target {name!r}: {reference} is no TargetInfo")
        return info

    def __contains__(self, name: object) -> bool:
        return name in _OWN or name in self._offered()

    def __iter__(self) -> Iterator[str]:
        yield from _OWN
        for name in self._offered():
            with suppress(InputError):
                self[name]
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _offered(self) -> dict[str, str]:
        points = plugins.entry_points(ENTRY_POINTS)
        return {name: value for name, value in points.items() if name not in _OWN}


TARGETS: Mapping[str, TargetInfo] = _Targets()


def options() -> dict[str, type[TargetOptions]]:
    """Return the class of each target's own options."""
    return {name: info.options for name, info in TARGETS.items()}


def verifier(target: str, precisions: Iterable[str]) -> str:
    """The name of the backend that verifies a build at its export, by the precisions of its
    components."""
    info = TARGETS[target]
    plain = [split_passes(each)[0] for each in precisions]
    return next((info.instead[each] for each in plain if each in info.instead), info.backend)


def computes(target: str, precision: str) -> str:
    """What the engine is to be asked to calculate in for a component; "" leaves it to the
    graph."""
    return TARGETS[target].computes.get(split_passes(precision)[0], "")


def passes(target: str, precision: str, options: TargetOptions) -> tuple[str, ...]:
    """The passes that run on the captured program before a target lowers it: those that were
    asked for by name, the precision's, the target's.

    Raises:
        InputError: the target has no such precision; lists the pairs that there are. There is
            no pass of such a name.
    """
    plain, asked = split_passes(precision)
    found = TARGETS[target].precisions.get(plain)
    if found is None:
        pairs = "; ".join(f"{name}: {', '.join(t.precisions)}" for name, t in TARGETS.items())
        raise InputError(f"target {target!r} has no precision {plain!r}; there are {pairs}")
    return (*modules(asked), *found, *options.passes())


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
    """What a target's module may have besides: a last word, knowing the whole pipeline."""

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


def get(name: str) -> Target:
    """The target's module. Raises InputError for an unknown name."""
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}")
    module: Any
    try:
        with plugins.started(f"target {name!r}"):
            module = import_module(TARGETS[name].module)
    except plugins.BrokenPlugin as error:
        raise InputError(str(error)) from error
    return module  # type: ignore[no-any-return]
