"""A component made of one or more packages that run one after the other, each with a fixed batch.

Both Core ML backends use it; they differ in how a package predicts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.coreml.mil.package import Limits
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import BackendError, InputError
from latentc.runtimes.storage.files import read_regular
from latentc.runtimes.storage.parsing import parser

_MOST_BYTES = 1 << 20  # of a document


@dataclass(frozen=True)
class Stage:
    """One loaded package: what it takes, and how it predicts."""

    inputs: Mapping[str, Limits]
    predict: Callable[[Feeds], Mapping[str, Array]]


@parser(BackendError, "entry", "a list of packages")
def packages_of(entry: Path) -> list[Path]:
    """Return the packages that a ``model.json`` lists, which are folders beside it.

    Raises:
        BackendError: it is no such list.
    """
    names = json.loads(read_regular(entry, _MOST_BYTES))["packages"]
    if not names or not all(_is_plain(name) for name in names):
        raise ValueError(f"not a list of folders beside it: {names!r:.80}")
    return [entry.parent / name for name in names]


class PackageSession(Session):
    """Feeds each stage the inputs that it names, from the call and from earlier stages.

    A package's batch is fixed. A batch of n rows becomes as many calls as are needed; the last
    one is filled up by repeating its last row.
    """

    def __init__(self, component: Component, stages: Sequence[Stage]) -> None:
        super().__init__(component.inputs, component.outputs)
        self._stages = tuple(stages)
        self._limits = {
            name: stage.inputs[name]
            for stage in self._stages
            for name in component.inputs
            if name in stage.inputs
        }
        self._rows = [n for n, spec in component.inputs.items() if self._is_batched(n, spec)]
        self._batch = self._limits[self._rows[0]].batch if self._rows else 1

    def _is_batched(self, name: str, spec: TensorSpec) -> bool:
        """Return whether the rows of an input are dealt out to several calls of the package.

        A session that is for calls of one size has a number in place of the batch: its rows are
        dealt out if the package has another number.
        """
        if name not in self._limits or not spec.shape:
            return False
        first = spec.shape[0]
        return first == "batch" or (isinstance(first, int) and first != self._limits[name].batch)

    def accepts(self, feeds: Feeds) -> bool:
        return all(
            limits.allows(self._shape(name, feeds[name])) for name, limits in self._limits.items()
        )

    def _shape(self, name: str, value: Array) -> tuple[int, ...]:
        """Return the shape in which a value reaches the package."""
        return (self._batch, *value.shape[1:]) if name in self._rows else value.shape

    def check_each(self, feeds: Feeds, symbols: dict[str, int]) -> None:
        super().check_each(feeds, symbols)
        for name in (feed for feed in feeds if feed in self._limits):
            limits = self._limits[name]
            if not limits.allows(self._shape(name, feeds[name])):
                raise InputError(
                    f"input {name!r}: this build was not made for the shape "
                    f"{list(feeds[name].shape)}; per call of {self._batch} it takes {limits}"
                )

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        made = self._in_calls(feeds) if self._rows else self._call(feeds)
        return {
            name: made[name].astype(spec.dtype, copy=False)
            for name, spec in self.outputs.items()
            if name in made
        }

    def _in_calls(self, feeds: Feeds) -> dict[str, Array]:
        count = len(feeds[self._rows[0]])
        parts = []
        for start in range(0, count, self._batch):
            rows = np.minimum(np.arange(start, start + self._batch), count - 1)
            part = {n: v[rows] if n in self._rows else v for n, v in feeds.items()}
            parts.append(self._call(part))
        return {
            name: np.concatenate([part[name] for part in parts])[:count]
            for name in self.outputs
            if name in parts[0]
        }

    def _call(self, feeds: Feeds) -> dict[str, Array]:
        values = dict(feeds)
        for stage in self._stages:
            taken = {
                n: values[n].astype(each.dtype, copy=False) for n, each in stage.inputs.items()
            }
            values |= stage.predict(taken)
        return values

    def _close(self) -> None:
        self._stages = ()


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".mlpackage")
