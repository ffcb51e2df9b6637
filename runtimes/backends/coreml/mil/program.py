"""A MIL program read back from an ``.mlpackage``, as plain data: constants and a list of calls.

coremltools does the reading (its protocol buffers, its reader of weight files, its decompression
of compressed weights). It imports PyTorch where that is installed; nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from latentc.runtimes.errors import BackendError

# The name of a value, or the names of a list of them.
Argument: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One operation: its kind, where its inputs come from, and its outputs with their dtypes.

    `last_use` names the values that nobody needs after it.
    """

    kind: str
    name: str
    arguments: Mapping[str, Argument]
    outputs: tuple[tuple[str, np.dtype[Any]], ...]
    last_use: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """`constants` by name; `calls` in the program's order; names of inputs and outputs."""

    inputs: Mapping[str, np.dtype[Any]]
    constants: Mapping[str, Any]
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]


def read(package: Path, spec: Any, known: Iterable[str]) -> Program:
    """Read the function ``main`` of a package.

    Args:
        spec: its Model message.
        known: the kinds of operation that the reader can execute.

    Raises:
        BackendError: the program has operations of other kinds; names them.
    """
    function = _load(package, spec).functions["main"]
    constants: dict[str, Any] = {}
    calls = []
    for operation in function.operations:
        if operation.op_type == "const":
            constants[operation.outputs[0].name] = operation.outputs[0].val
        elif operation.op_type.startswith("constexpr_"):
            constants[operation.outputs[0].name] = operation.materialized_val_inference()
        else:
            calls.append(_call(operation))
    unknown = sorted({call.kind for call in calls} - set(known))
    if unknown:
        raise BackendError(
            f"{package.name}: the reference evaluator has no operator {', '.join(unknown)}; "
            "it was written for what latentc exports"
        )
    outputs = tuple(str(value.name) for value in function.outputs)
    inputs = {str(name): _dtype(value) for name, value in function.inputs.items()}
    return Program(inputs, constants, _with_last_use(calls, outputs), outputs)


def _load(package: Path, spec: Any) -> Any:
    from coremltools.converters.mil.frontend.milproto.load import load

    weights = package / "Data" / "com.apple.CoreML" / "weights"
    return load(spec, spec.specificationVersion, str(weights))


def _call(operation: Any) -> Call:
    arguments: dict[str, Argument] = {}
    for name, value in operation.inputs.items():
        if isinstance(value, list | tuple):
            arguments[name] = tuple(str(each.name) for each in value)
        elif value is not None:
            arguments[name] = str(value.name)
    outputs = tuple((str(value.name), _dtype(value)) for value in operation.outputs)
    return Call(str(operation.op_type), str(operation.name), arguments, outputs)


def _dtype(value: Any) -> np.dtype[Any]:
    from coremltools.converters.mil.mil.types import nptype_from_builtin

    found: np.dtype[Any] = np.dtype(nptype_from_builtin(value.dtype))
    return found


def names_in(arguments: Iterable[Argument]) -> Iterator[str]:
    """Yield the names in a call's arguments, those in lists included."""
    for argument in arguments:
        if isinstance(argument, str):
            yield argument
        else:
            yield from argument


def _with_last_use(calls: list[Call], outputs: tuple[str, ...]) -> tuple[Call, ...]:
    """Note with each call what can be freed after it."""
    needed = set(outputs)
    made: list[Call] = []
    for call in reversed(calls):
        used = {*names_in(call.arguments.values()), *(name for name, _ in call.outputs)}
        done = tuple(sorted(used - needed))
        needed |= used
        made.append(Call(call.kind, call.name, call.arguments, call.outputs, done))
    return tuple(reversed(made))
