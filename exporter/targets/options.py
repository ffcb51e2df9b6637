"""Options of single targets: a class for each target, whose instance carries them everywhere.

They are declared in a TypedDict, as those of every target are (`latentc.runtimes.options`): each is
a keyword of `latentc.export` and a flag of `latentc export`. The values are a part of the key of
everything that the target writes, so that another value makes it anew. A target without options of
its own has the base class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from latentc.runtimes.errors import InputError
from latentc.runtimes.options import complete, declared
from latentc.runtimes.programs.latents import Latents


class NoArguments(TypedDict):
    """A target without options of its own takes no arguments."""


@dataclass(frozen=True, init=False)
class TargetOptions:
    """The options say what a target may be told, and what follows from it before anything is
    lowered.
    """

    ARGUMENTS: ClassVar[type] = NoArguments
    values: Mapping[str, Any]

    def __init__(self, **given: Any) -> None:
        """Raise InputError for an unknown name or a bad value."""
        object.__setattr__(self, "values", complete(self.ARGUMENTS, given))

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
    """The settings are what the lowering of a target with options is told besides the program."""

    precision: str
    options: Any
    latents: Latents


def of_targets(
    given: Mapping[str, Any], kinds: Mapping[str, type[TargetOptions]], wanted: Sequence[str]
) -> dict[str, TargetOptions]:
    """Return the options of every target in `wanted`, of those keywords in `given` that are one's.

    Raises:
        InputError: an option of a target that is not wanted, or a bad value.
    """
    owners = {name: target for target, kind in kinds.items() for name in declared(kind.ARGUMENTS)}
    values: dict[str, dict[str, Any]] = {target: {} for target in wanted}
    for name in given.keys() & owners.keys():
        target = owners[name]
        if target not in wanted:
            (flag, *_) = declared(kinds[target].ARGUMENTS)[name].flags
            raise InputError(f"{flag} is for target {target!r}, which is not asked for")
        values[target][name] = given[name]
    return {target: kinds[target](**values[target]) for target in wanted if target in kinds}
