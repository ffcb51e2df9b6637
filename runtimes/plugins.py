"""This module finds what installed packages offer by entry points, and imports it.

A package may be broken in any way; that concerns whoever asks for it, and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from latentc.runtimes.errors import InputError, LatentcError, first_line

_T = TypeVar("_T")


class BrokenPlugin(LatentcError):
    """A package could not be imported or started; says what it raised."""


def entry_points(group: str) -> dict[str, str]:
    """Return the entry points of a group, name → ``"module:attribute"``.

    Looking for them costs milliseconds, nothing is imported.

    Packages whose metadata cannot be read are passed over.
    """
    from importlib import metadata

    try:
        return {point.name: point.value for point in metadata.entry_points(group=group)}
    except Exception:  # of one package: each by itself
        references: dict[str, str] = {}
        for distribution in metadata.distributions():
            try:
                points = distribution.entry_points.select(group=group)
            except Exception:
                continue
            references |= {
                point.name: point.value for point in points if point.name not in references
            }
        return references


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


def module_of(name: str, package: str) -> str:
    """Return the whole name of a module that is named as a file of a package of latentc, or as a
    module of another one."""
    own = f"{package}.{name}"
    return name if "." in name or find_spec(own) is None else own


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
        own: latentc's by name, each itself or its ``"module:attribute"``; another package cannot
            replace one.
    """

    def __init__(self, noun: str, kind: type[_T], group: str, own: Mapping[str, str | _T]) -> None:
        self._noun, self._kind, self._group, self._own = noun, kind, group, own

    def __getitem__(self, name: str) -> _T:
        reference = self._reference(name)
        if not isinstance(reference, str):
            return reference
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
        return name in self._own or name in entry_points(self._group)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        for name in entry_points(self._group):
            if name not in self._own:
                with suppress(InputError):
                    self[name]
                    yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def modules(self, name: str) -> tuple[str, ...]:
        """Return the module that a thing is named in; none for one that is at hand.

        Raises:
            KeyError: there is no thing of this name.
        """
        reference = self._reference(name)
        return (reference.partition(":")[0],) if isinstance(reference, str) else ()

    def _reference(self, name: str) -> str | _T:
        return self._own[name] if name in self._own else entry_points(self._group)[name]
