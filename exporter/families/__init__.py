"""One file for each family of pipelines: which graphs it has, and what its programs do with
them. A family may be a module of another package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from latentc.exporter.classes import record_of
from latentc.exporter.components.description import Description
from latentc.runtimes import plugins
from latentc.runtimes.errors import InputError, first_line


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
        InputError: the family of another package fails, or is none.
    """
    name = plugins.module_of(record_of(class_name).family, __name__)
    try:
        with plugins.started(f"the family {name!r}"):
            module: Any = import_module(name)
    except (plugins.BrokenPlugin, ImportError) as error:
        raise InputError(f"pipeline class {class_name!r}: {first_line(error)}") from error
    for needed in ("COMPONENTS", "describe"):
        if not hasattr(module, needed):
            raise InputError(
                f"pipeline class {class_name!r}: the module {name} has no {needed}, which a family "
                "has (docs/extending.md)"
            )
    return module  # type: ignore[no-any-return]
