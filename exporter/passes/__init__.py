"""Rewrites of a captured program, one per file, applied before any target lowers it.

A pass is a function ``run(program, choices)``: it takes an ExportedProgram and `Choices`, changes
the program in place and returns how many places changed. It is named by its file here; one of
another package by its module's whole name. Its module may say more: `computes`, `calibrated`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from latentc.runtimes import plugins
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.bundle.precisions import PASSES as PASSES
from latentc.runtimes.bundle.precisions import PRECISIONS
from latentc.runtimes.errors import InputError, first_line
from latentc.runtimes.unknown_names import suggestion

# Precision → the passes that make it, by module name. Each target names the table that it goes
# by (exporter/targets). STORED: weights in fewer bits, arithmetic in float32. COMPUTED:
# arithmetic too, for engines that compute as the graph is typed. WEIGHTS and W8A8 are quantised
# the same way for every engine (docs/decisions/0022).
Precisions = Mapping[str, tuple[str, ...]]

STORED: Precisions = {"fp32": (), "fp16": ("fp16_weights",)}
COMPUTED: Precisions = {"fp32": (), "fp16": ("fp16_compute",), "bf16": ("bf16_compute",)}
WEIGHTS: Precisions = {
    "int8": ("int8_weights", "fp16_weights"),
    "int4": ("int4_weights", "int8_weights", "fp16_weights"),
}
W8A8: Precisions = {"w8a8": ("int8_activations", "int8_weights", "fp16_weights")}
# For engines that compute as the graph is typed: half precision, then integers within it.
TYPED_INTEGERS: Precisions = {
    "int8": ("fp16_compute", "int8_weights"),
    "w8a8": ("fp16_compute", "int8_activations_symmetric", "int8_weights"),
}
STEP_CACHE = "step-cache"  # the pass that adds a component


def has_integers(precision: str) -> bool:
    """Return whether a component of this precision has weights that are rounded to integers, whose
    loss `fidelity_floor` can reduce, layer by layer."""
    return PRECISIONS[split_passes(precision)[0]].stored_as == "integers"


def computes(name: str) -> str | None:
    """Return what a program computes in after a pass, a dtype's name, where that is not float32:
    `COMPUTES` of the pass's module."""
    dtype: str | None = getattr(load(name), "COMPUTES", None)
    return dtype


def calibrated(name: str) -> bool:
    """Return whether a pass wants the ranges of activations (`Choices.ranges`): `CALIBRATED` of its
    module."""
    return bool(getattr(load(name), "CALIBRATED", False))


def module_of(name: str) -> str:
    """Return the name of a pass's module: one of this package, else one of another."""
    return plugins.module_of(name, __name__)


def load(name: str) -> Any:
    """Import a pass's module.

    Raises:
        InputError: a module of another package fails, or has no function `run`.
    """
    try:
        with plugins.started(f"pass {name!r}"):
            module = import_module(module_of(name))
    except (plugins.BrokenPlugin, ImportError) as error:
        raise InputError(f"pass {name!r}: {first_line(error)}") from error
    if not callable(getattr(module, "run", None)):
        raise InputError(f"pass {name!r}: the module {module.__name__} has no function run")
    return module


def rewriting(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the named passes that rewrite the denoiser's program.

    Raises:
        InputError: an unknown name.
    """
    names = tuple(names)
    for name in names:
        if name not in PASSES:
            raise InputError(f"unknown pass {name!r}; {suggestion(name, PASSES)}")
    return tuple(name for name in names if PASSES[name].modules)


def modules(names: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of passes that stand in a precision.

    Raises:
        InputError: a name that cannot stand there.
    """
    standing = {name: each.modules for name, each in PASSES.items() if each.modules}
    names = tuple(names)
    for name in names:
        if name not in standing:
            hint = suggestion(name, standing, "passes that a precision may have")
            raise InputError(f"unknown pass {name!r} in a precision; {hint}")
    return tuple(module for name in names for module in standing[name])


@dataclass(frozen=True)
class Range:
    """A range limits an activation when it is quantised: it is clipped to [low, high]."""

    low: float
    high: float


@dataclass(frozen=True)
class Choices:
    """The choices are what passes are told besides the program.

    kept: names of weights that are not to be quantised, nor what they are multiplied with.
    ranges: by the name of a convolution's or linear layer's node, the range of its activations.
    """

    kept: frozenset[str] = frozenset()
    ranges: Mapping[str, Range] = field(default_factory=dict)
