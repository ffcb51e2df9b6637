"""Options of single targets: a frozen dataclass each, which carries them everywhere.

A field is a keyword of `latentc.export` and, with hyphens, a flag of `latentc export`. The
values are a part of the key of everything that the target writes, so that another value makes
it anew. A target without options of its own has the base class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.latents import Latents


@dataclass(frozen=True)
class TargetOptions:
    """What a target may be told, and what follows from it before anything is lowered."""

    def passes(self) -> tuple[str, ...]:
        """Passes (of `latentc.exporter.passes`) to run after those of the precision."""
        return ()

    def check_alone(self, fixed: bool) -> None:
        """Raise InputError for what fits no pipeline; `fixed`: the size is fixed."""

    def check(self, latents: Latents, fixed: bool) -> None:
        """Raise InputError for what does not fit a pipeline; `fixed`: its size is fixed."""

    def probe_sizes(self, latents: Latents, traced: Mapping[str, int]) -> list[dict[str, int]]:
        """Values of dimension symbols at which the target can be probed, where those that every
        target is probed at are too free for it. `traced`: what the graphs are traced at."""
        return []

    def loop_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the whole-loop check must have, if only some can be."""
        return None


@dataclass(frozen=True)
class Settings:
    """What the lowering of a target with options is told besides the program."""

    precision: str
    options: Any
    latents: Latents


def option(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    """A field of an options class: `text` is its line in ``latentc export --help``."""
    return field(default=default, metadata={"help": text, "choices": tuple(choices)})


def gather(
    given: Mapping[str, Any], kinds: Mapping[str, type[TargetOptions]], asked: Sequence[str]
) -> dict[str, TargetOptions]:
    """The options of every target in `asked`, from keywords; None counts as not given.

    Raises:
        InputError: an unknown keyword, one of a target that is not asked for, or a bad value.
    """
    given = {name: value for name, value in given.items() if value is not None}
    owners = {each.name: (target, each) for target, kind in kinds.items() for each in fields(kind)}
    for name, value in given.items():
        if name not in owners:
            raise InputError(f"unknown option {name!r}; options of targets: {', '.join(owners)}")
        target, known = owners[name]
        if target not in asked:
            raise InputError(f"{flag(name)} is for target {target!r}, which is not asked for")
        _check(known, value)
    return {
        target: kind(**{n: v for n, v in given.items() if owners[n][0] == target})
        for target, kind in kinds.items()
        if target in asked
    }


def flag(name: str) -> str:
    """A field's name as it stands on the command line."""
    return "--" + name.replace("_", "-")


def _check(known: Field[Any], value: Any) -> None:
    choices = known.metadata["choices"]
    if choices and value not in choices:
        raise InputError(f"{flag(known.name)} {value!r}: expected one of {', '.join(choices)}")
    assert known.default is not MISSING
    if type(value) is not type(known.default):
        kind = type(known.default).__name__
        raise InputError(f"{flag(known.name)} {value!r}: expected a value of type {kind}")
