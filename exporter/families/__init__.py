"""One file for each family of pipelines: which graphs it has, and what its programs do with
them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from latentc.exporter.classes import record_of
from latentc.exporter.components.description import Description


class Family(Protocol):
    """The interface of a family's module.

    `COMPONENTS` maps each component to the subfolders of the source that it is made of, so
    that an unchanged export is recognised without loading anything.
    """

    __name__: str
    COMPONENTS: Mapping[str, tuple[str, ...]]

    def describe(self, pipe: Any) -> Description: ...


def family_of(class_name: str) -> Family:
    """Return the family's module for a diffusers pipeline class.

    Raises:
        UnsupportedPipeline: listing the supported classes.
    """
    module: Any = import_module(f"latentc.exporter.families.{record_of(class_name).family}")
    return module  # type: ignore[no-any-return]
