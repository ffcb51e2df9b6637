"""Core ML: loads ``coreml`` builds, on macOS."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import ClassVar

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.coreml.mil.package import limits_of
from latentc.runtimes.backends.coreml.mil.package_files import files_of
from latentc.runtimes.backends.coreml.mil.session import PackageSession, Stage, packages_of
from latentc.runtimes.backends.coreml.mil.toolkit import load_toolkit
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.structures import Component

_UNITS = ("ALL", "CPU_AND_GPU", "CPU_AND_NE", "CPU_ONLY")


class CoreMLBackend(Backend):
    """Devices are Core ML's choices of compute units."""

    name: ClassVar[str] = "coreml"
    package: ClassVar[str] = "coremltools"
    install: ClassVar[str] = "pip install 'latentc[coreml]' (on macOS)"
    targets: ClassVar[tuple[str, ...]] = ("coreml",)
    memory_per_weight: ClassVar[float] = 4.0
    entries: ClassVar[tuple[str, ...]] = (".json",)
    one_length: ClassVar[bool] = True
    places: ClassVar[Mapping[str, int]] = {
        **{"fp16": 10, "palette8": 11, "palette6": 12, "int8": 13, "palette4": 14},
        "fp32": 60,
    }
    loads_in_parallel: ClassVar[bool] = False  # nor does it promise that threads may load models

    def __init__(self) -> None:
        if platform.system() != "Darwin":
            raise ImportError(
                "Core ML predicts on macOS only; elsewhere use the reference evaluator, "
                "backend 'coreml-reference'"
            )
        self._ct = load_toolkit()

    @classmethod
    def references(cls, entry: Path) -> Iterable[Path]:
        return files_of(entry)

    def version(self) -> str:
        return str(self._ct.__version__)

    def devices(self) -> list[str]:
        return list(_UNITS)

    def option_names(self, device: str) -> Collection[str] | None:
        return ()

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        return PackageSession(component, [self._stage(p, device) for p in packages_of(entry)])

    def _stage(self, package: Path, device: str) -> Stage:
        model = self._ct.models.MLModel(str(package), compute_units=self._ct.ComputeUnit[device])
        one_at_a_time = Lock()  # Core ML does not promise that threads may share a model

        def predict(feeds: Feeds) -> Mapping[str, Array]:
            with one_at_a_time:
                made: Mapping[str, Array] = model.predict(dict(feeds))
            return made

        return Stage(limits_of(model.get_spec()), predict)
