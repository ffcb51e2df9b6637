"""What installed packages offer by entry points, and importing it.

A package may be broken in any way; that concerns whoever asks for it, and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from latentc.runtimes.errors import LatentcError, first_line


class BrokenPlugin(LatentcError):
    """A package could not be imported or started; says what it raised."""


def entry_points(group: str) -> dict[str, str]:
    """Name → ``"module:attribute"``. Looking for them costs milliseconds, nothing is imported.

    Packages whose metadata cannot be read are passed over.
    """
    from importlib import metadata

    try:
        return {point.name: point.value for point in metadata.entry_points(group=group)}
    except Exception:  # of one package: each by itself
        found: dict[str, str] = {}
        for distribution in metadata.distributions():
            try:
                points = distribution.entry_points.select(group=group)
            except Exception:
                continue
            found |= {point.name: point.value for point in points if point.name not in found}
        return found


def resolve(reference: str) -> Any:
    """Import what ``"module:attribute"`` names.

    Raises:
        BrokenPlugin: whatever the package raised on import.
    """
    module, _, attribute = reference.partition(":")
    try:
        with started(reference):
            return getattr(import_module(module), attribute)
    except ImportError as error:  # what it needs is not installed, or it is not there itself
        raise BrokenPlugin(f"{reference} fails: {first_line(error)}") from error


@contextmanager
def started(what: str) -> Iterator[None]:
    """Inside, code of another package runs for the first time; whatever it raises, an exit of the
    process included, becomes a `BrokenPlugin`. Errors of latentc's own and ImportError (an engine
    that is not installed) pass."""
    try:
        yield
    except (LatentcError, ImportError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit, and panics of Rust code
        kind, said = type(error).__name__, first_line(error)
        why = said if said == kind else f"{kind}: {said}"
        raise BrokenPlugin(f"{what} fails: {why}") from error
