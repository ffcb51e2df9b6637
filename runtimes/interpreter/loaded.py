"""Programs of a loaded bundle: which one a call is, and its execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtimes.errors import InputError
from runtimes.interpreter.call import Call, parse
from runtimes.interpreter.execution import Execution
from runtimes.interpreter.facts import Facts
from runtimes.interpreter.loop import Schedule
from runtimes.manifest import Manifest
from runtimes.programs.version_1 import positions, programs
from runtimes.request import scheduler_name

if TYPE_CHECKING:
    from runtimes.pipeline import Pipeline


def facts_of(manifest: Manifest) -> tuple[Facts, ...]:
    """Return the checked programs of a bundle.

    Raises:
        BundleError: a program does not keep to the rules.
    """
    graphs = {component.name: component for component in manifest.components}
    where = positions(manifest)
    return tuple(Facts.of(program, graphs, where) for program in programs(manifest))


def choose(facts: Sequence[Facts], arguments: Mapping[str, Any]) -> Facts:
    """Return the program whose images a call gives.

    Raises:
        InputError: there is none.
    """
    given = {name for name, value in arguments.items() if value is not None}
    every = {name for each in facts for name in each.images}
    for each in facts:
        if each.images.keys() == given & every:
            return each
    known = " or ".join(_spoken(each) for each in facts)
    raise InputError(
        f"this call gives {_joined(given & every) or 'no image'}; this bundle takes {known}"
    )


def _spoken(facts: Facts) -> str:
    return f"{_joined(facts.images) or 'no image'} ({facts.program.name})"


def _joined(names: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    return " and ".join(repr(name) for name in sorted(names))


@dataclass(frozen=True)
class Programs:
    """The programs of a loaded pipeline, ready for calls."""

    pipeline: Pipeline
    facts: tuple[Facts, ...]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Programs:
        """Check the programs of a pipeline's bundle. Raises BundleError."""
        return cls(pipeline, facts_of(pipeline.manifest))

    def execution(self, arguments: Mapping[str, Any], wanted: Sequence[str] = ()) -> Execution:
        """Return the execution of a call, of which nothing has run yet.

        Args:
            wanted: names of values that are asked for in the place of images.

        Raises:
            InputError: an argument that cannot be used, has no effect or is missing.
        """
        pipeline = self.pipeline
        scheduler = scheduler_name(pipeline.manifest, arguments.get("scheduler"))
        call = parse(choose(self.facts, arguments), arguments, scheduler, wanted)
        return Execution(
            call,
            pipeline.sessions,
            pipeline.tokenizers,
            self._schedule(call),
            pipeline.encoded,
            pipeline.tiles,
        )

    def _schedule(self, call: Call) -> Schedule:
        pipeline = self.pipeline
        schedule = pipeline.manifest.schedule(call.scheduler)
        shift = pipeline.shift(call.scheduler, *[*call.symbols.values()][:2])
        table = pipeline.plans(call.scheduler)
        return Schedule(table, schedule.num_train_timesteps, shift)
