"""Attributes of pipelines and runs: what can be set, and what those who know diffusers look for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from latentc.runtimes.errors import InputError
from latentc.runtimes.unknown_names import ADVICE_ON_ATTRIBUTES, advised, suggestion


class UnknownAttribute(InputError, AttributeError):
    """An attribute that is not there, or that cannot be set."""


class Telling(type):
    """A class that says what to do in the place of what it does not have."""

    def __getattr__(cls, name: str) -> Any:
        raise _unknown(name, cls.__name__, dir(cls))


class Sealed(metaclass=Telling):
    """An object on which only those attributes can be set that change something.

    `_settable` names them. A class sets `_sealed` when it is made; its private attributes that
    are there by then can still be set.
    """

    _settable: ClassVar[tuple[str, ...]] = ()
    _sealed = False

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self._settable or (name.startswith("_") and name in self.__dict__)
        if self._sealed and not own:
            told = advised(name, ADVICE_ON_ATTRIBUTES)
            raise UnknownAttribute(
                f"{type(self).__name__}.{name} cannot be set, as it would change nothing; what can "
                f"be set: {', '.join(self._settable)}{f'. {told}' if told else ''}"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        raise _unknown(name, type(self).__name__, dir(type(self)))


def _unknown(name: str, owner: str, known: Iterable[str]) -> AttributeError:
    """Return the error about an attribute that is not there; those of Python's own are looked for
    by libraries, which need no words."""
    if name.startswith("__"):
        return AttributeError(name)
    public = [each for each in known if not each.startswith("_")]
    hint = suggestion(name, public, "it has", advice=ADVICE_ON_ATTRIBUTES)
    return UnknownAttribute(f"{owner} has no attribute {name!r}; {hint}")


class SchedulerName(str):
    """A scheduler's name, which says so where a diffusers scheduler is expected."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownAttribute(
            f"pipe.scheduler is the name {str(self)!r}, not a scheduler object with {name!r}: "
            "assign another name of pipe.schedulers"
        )
