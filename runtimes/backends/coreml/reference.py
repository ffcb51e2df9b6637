"""The reference evaluator of Core ML packages: numpy, on any system, slow and exact.

It checks ``coreml`` builds where there is no Core ML. See `latentc.runtimes.backends.coreml.mil`
for how it rounds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.coreml.mil.evaluator import Evaluator
from latentc.runtimes.backends.coreml.mil.package import limits_of, read_spec
from latentc.runtimes.backends.coreml.mil.package_files import files_of
from latentc.runtimes.backends.coreml.mil.session import PackageSession, Stage, packages_of
from latentc.runtimes.backends.coreml.mil.toolkit import load_toolkit
from latentc.runtimes.backends.session import Session
from latentc.runtimes.bundle.structures import Component


class CoreMLReferenceBackend(Backend):
    """Has one device, the CPU. coremltools reads the files; it is imported with the first one."""

    name: ClassVar[str] = "coreml-reference"
    package: ClassVar[str] = "coremltools"
    install: ClassVar[str] = "pip install 'latentc[coreml]'"
    targets: ClassVar[tuple[str, ...]] = ("coreml",)
    memory_per_weight: ClassVar[float] = 4.0
    entries: ClassVar[tuple[str, ...]] = (".json",)
    slow: ClassVar[bool] = True
    one_length: ClassVar[bool] = True
    loads_in_parallel: ClassVar[bool] = False  # Python under one lock

    def __init__(self) -> None:
        if find_spec("coremltools") is None:
            raise ImportError("No module named 'coremltools'")

    @classmethod
    def references(cls, entry: Path) -> Iterable[Path]:
        return files_of(entry)

    def version(self) -> str:
        return version("coremltools")

    def devices(self) -> list[str]:
        return ["cpu"]

    def option_names(self, device: str) -> Collection[str] | None:
        return ()

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        load_toolkit()
        return PackageSession(component, [_stage(package) for package in packages_of(entry)])


def _stage(package: Path) -> Stage:
    spec = read_spec(package)
    return Stage(limits_of(spec), Evaluator.load(package, spec).predict)
