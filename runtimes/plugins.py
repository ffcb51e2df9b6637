"""What installed packages offer by entry points, and importing it.

A package may be broken in any way; that concerns whoever asks for it, and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Generic, TypeVar

from latentc.runtimes.errors import InputError, LatentcError, first_line

_T = TypeVar("_T")


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


class Registry(Mapping[str, _T], Generic[_T]):
    """A registry holds latentc's own things of a kind, then those of installed packages, each under
    its name. A thing is imported when it is looked at: an instance of the kind, or a function that
    returns one.

    Iterating passes over packages that are broken; asking for one by its name raises InputError,
    which says what it raised.

    Args:
        noun: what a thing is called in messages.
        kind: the class of all things.
        group: the entry-point group of other packages' things.
        own: ``"module:attribute"`` of latentc's, by name; another package cannot replace one.
    """

    def __init__(self, noun: str, kind: type[_T], group: str, own: Mapping[str, str]) -> None:
        self._noun, self._kind, self._group, self._own = noun, kind, group, own

    def __getitem__(self, name: str) -> _T:
        reference = self.reference(name)
        try:
            thing = resolve(reference)
            if callable(thing):
                with started(reference):
                    thing = thing()
        except (BrokenPlugin, ImportError) as error:
            raise InputError(f"{self._noun} {name!r}: {first_line(error)}") from error
        if not isinstance(thing, self._kind):
            kind = self._kind.__name__
            raise InputError(f"{self._noun} {name!r}: {reference} is no {kind}")
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self.references()

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        for name in self.references():
            if name not in self._own:
                with suppress(InputError):
                    self[name]
                    yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def reference(self, name: str) -> str:
        """Return ``"module:attribute"`` of a thing.

        Raises:
            KeyError: there is none of this name.
        """
        return self._own.get(name) or entry_points(self._group)[name]

    def references(self) -> dict[str, str]:
        """Return ``"module:attribute"`` of each thing, whether it can be imported or not."""
        return {**entry_points(self._group), **self._own}
