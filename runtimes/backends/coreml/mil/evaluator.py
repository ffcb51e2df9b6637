"""Executes a `Program`. How it rounds is written in the package's docstring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.coreml.mil.operators import table
from latentc.runtimes.backends.coreml.mil.program import Argument, Call, Program, read
from latentc.runtimes.backends.session import Feeds, first_line
from latentc.runtimes.errors import BackendError


class Evaluator:
    """One package, ready to be computed. Keeps nothing between calls, so threads may share it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._operators = table()

    @classmethod
    def load(cls, package: Path, spec: Any) -> Evaluator:
        """Read a package; `spec` is its Model message
        (`latentc.runtimes.backends.coreml.mil.package.read_spec`).

        Raises:
            BackendError: it has an operator that is not there; names it.
        """
        return cls(read(package, spec, table()))

    def predict(self, feeds: Feeds) -> dict[str, Array]:
        """Return the outputs by name for inputs by name, of the dtypes that the program declares.

        Raises:
            BackendError: an operation cannot be computed; names it.
        """
        program = self._program
        values: dict[str, Any] = {
            name: np.asarray(feeds[name]).astype(dtype, copy=False)
            for name, dtype in program.inputs.items()
        }
        with np.errstate(all="ignore"):  # an overflow shows in the result, as infinity
            for call in program.calls:
                self._execute(call, values)
        return {name: values[name] for name in program.outputs}

    def _execute(self, call: Call, values: dict[str, Any]) -> None:
        inputs = {
            name: _look_up(argument, values, self._program.constants)
            for name, argument in call.arguments.items()
        }
        try:
            result = self._operators[call.kind](**inputs)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise BackendError(
                f"operation {call.name!r} ({call.kind}): {first_line(error)}"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        for (name, dtype), value in zip(call.outputs, results, strict=True):
            values[name] = np.asarray(value).astype(dtype, copy=False)
        for name in call.last_use:
            values.pop(name, None)


def _look_up(argument: Argument, values: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    if isinstance(argument, tuple):
        return [_look_up(name, values, constants) for name in argument]
    return _widen(values[argument] if argument in values else constants[argument])


def _widen(value: Any) -> Any:
    """Return a value of half precision in float32: half is only stored, all arithmetic is
    float32's.
    """
    if isinstance(value, np.ndarray | np.float16) and value.dtype == np.float16:
        return value.astype(np.float32)
    return value
