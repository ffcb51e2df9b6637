"""A backend in a package of its own: runs the ONNX builds of any bundle in plain numpy.

The engine is the reference evaluator of the ``onnx`` package: slow, and exact enough to
check faster engines against. docs/extending.md walks through this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.structures import Component


class NumpyBackend(Backend):
    """Has one device, the CPU."""

    name: ClassVar[str] = "numpy"
    package: ClassVar[str] = "onnx"
    install: ClassVar[str] = "pip install onnx"
    targets: ClassVar[tuple[str, ...]] = ("onnx",)

    def __init__(self) -> None:
        import onnx
        import onnx.reference

        self._onnx = onnx

    def version(self) -> str:
        return str(self._onnx.__version__)

    def devices(self) -> list[str]:
        return ["cpu"]

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        model = self._onnx.load(str(entry))
        return NumpySession(self._onnx.reference.ReferenceEvaluator(model), component)


class NumpySession(Session):
    """A graph of the reference evaluator, which keeps nothing between calls."""

    def __init__(self, evaluator: Any, component: Component) -> None:
        super().__init__(component.inputs, component.outputs)
        self._evaluator = evaluator

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        names = list(self.outputs)
        return dict(zip(names, self._evaluator.run(names, dict(feeds)), strict=True))

    def _close(self) -> None:
        self._evaluator = None
