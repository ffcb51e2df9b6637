"""One folder per target: its `TARGET` is what the compiler has to know of it, its lowering makes
files of an ExportedProgram and its component."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from latentc.exporter.passes import modules
from latentc.exporter.targets.options import TargetOptions
from latentc.exporter.targets.target import Finishing as Finishing
from latentc.exporter.targets.target import Target as Target
from latentc.exporter.targets.target import TargetInfo as TargetInfo
from latentc.runtimes import plugins
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.errors import InputError
from latentc.runtimes.unknown_names import suggestion

ENTRY_POINTS = "latentc.targets"
TARGETS = plugins.Registry(
    "target",
    TargetInfo,
    ENTRY_POINTS,
    {
        name: f"{__name__}.{name}:TARGET"
        for name in ("onnx", "openvino", "torch", "tensorrt", "coreml")
    },
)


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
    """Return what the engine is to be asked to calculate in for a component. "" leaves it to the
    graph.
    """
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
        elsewhere = any(plain in other.precisions for other in TARGETS.values())
        names = () if elsewhere else TARGETS[target].precisions  # what it has is not what is meant
        hint = suggestion(plain, names, listed=pairs)
        raise InputError(f"target {target!r} has no precision {plain!r}; {hint}")
    return (*modules(asked), *found, *options.passes())


def unknown_target(name: str) -> InputError:
    """Return the error about a name that is none of `TARGETS`."""
    return InputError(f"unknown target {name!r}; {suggestion(name, TARGETS)}")


def get(name: str) -> Target:
    """The target's module. Raises InputError for an unknown name."""
    if name not in TARGETS:
        raise unknown_target(name)
    module: Any
    try:
        with plugins.started(f"target {name!r}"):
            module = import_module(TARGETS[name].module)
    except plugins.BrokenPlugin as error:
        raise InputError(str(error)) from error
    return module  # type: ignore[no-any-return]
