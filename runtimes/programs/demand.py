"""This module tells what a call needs.

Demand decides whether a statement runs, the program's order decides when.

Demand is followed backwards from what a call wants, stopping at values that are given, and only
into branches whose tests hold. Tests read arguments alone, so that all of this is known before
anything runs. A call that wants values draws what the whole call would have drawn before, so that
they are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.statements import (
    Loop,
    Numbers,
    Program,
    Statement,
    Test,
    Text,
    names_given,
    value_of,
)
from latentc.runtimes.programs.uses import (
    arguments_used,
    bounds_of_window,
    plan_arguments,
    pushes_of,
    values_used,
    windows_of_feeds,
)

# Whether a test holds; None where it is not known, so that both ways must be followed.
Truth: TypeAlias = Callable[[Test], bool | None]


@dataclass(frozen=True)
class Demand:
    """A demand says what a call needs.

    `live`: places of the statements that run, in order. `values`: names that something needs,
    those that are given among them. `arguments`: those that live statements read.
    """

    live: tuple[int, ...]
    values: frozenset[str]
    arguments: frozenset[str]

    def needs(self, name: str) -> bool:
        """Return whether a value or an argument is needed."""
        return name in self.values or name in self.arguments


def of_call(
    program: Program,
    given: Collection[str],
    numbers: Mapping[str, float] | None,
    wanted: Sequence[str] = (),
) -> Demand:
    """Return what a call needs.

    Args:
        given: names of arguments and values that it gives.
        numbers: the values of arguments of one number, defaults included; with None every test of
            a number counts as open, which finds what any call of these names could need.
        wanted: names of values; where there are none, what the program emits.
    """
    return _Walk(program, given, truth_of(given, numbers)).demand(wanted)


def truth_of(given: Collection[str], numbers: Mapping[str, float] | None) -> Truth:
    """Return what tests a call passes, see `of_call`."""

    def truth(test: Test) -> bool | None:
        if test.given:
            return any(name in given for name in test.given)
        return None if numbers is None else compares(test, numbers[test.argument or ""])

    return truth


def compares(test: Test, number: float) -> bool:
    """Return whether the test of an argument holds for this number."""
    return (
        (test.above is None or number > test.above)
        and (test.at_least is None or number >= test.at_least)
        and (test.below is None or number < test.below)
        and (test.at_most is None or number <= test.at_most)
    )


def holds(tests: Sequence[Test], truth: Truth) -> bool | None:
    """Return whether all tests hold; None where that is open."""
    found = [truth(test) for test in tests]
    if False in found:
        return False
    return None if None in found else True


def continues(loop: Loop, given: Collection[str]) -> bool:
    """Return whether a loop goes on from another one's latents in a call that gives this."""
    return loop.part.start is not None and loop.part.start in given


class _Walk:
    def __init__(self, program: Program, given: Collection[str], truth: Truth) -> None:
        self._program = program
        self._given = given
        self._truth = truth
        self._maker = {
            name: place for place, step in enumerate(program.steps) for name in names_given(step)
        }

    def demand(self, wanted: Sequence[str]) -> Demand:
        live, values = self._of_emitted()
        if wanted:
            drawing = {place for place in live if self._draws(place)}
            live, values = self._of(wanted, ())
            last = max((place for place in live if self._draws(place)), default=-1)
            live, values = self._of(wanted, sorted(place for place in drawing if place < last))
        steps = self._program.steps
        arguments = {name for place in live for name in self._arguments(steps[place])}
        return Demand(tuple(sorted(live)), frozenset(values), frozenset(self._whole(arguments)))

    def _draws(self, place: int) -> bool:
        """Return whether a statement draws from the call's generators."""
        return isinstance(self._program.steps[place], form.Noise | Loop)

    def _of_emitted(self) -> tuple[set[int], set[str]]:
        """Return what a whole call needs: the places of its statements, and values."""
        places = [
            place
            for place, step in enumerate(self._program.steps)
            if isinstance(step, form.Emit) or (isinstance(step, form.Noise) and step.always)
        ]
        return self._of((), places)

    def _of(self, wanted: Sequence[str], places: Sequence[int]) -> tuple[set[int], set[str]]:
        """Return the places of the statements that these values and statements need, and the names
        of the values."""
        steps, live, values = self._program.steps, {*places}, set[str]()
        todo = [*wanted, *(name for place in places for name in self._values(steps[place]))]
        while todo:
            name = todo.pop()
            if name in values:
                continue
            values.add(name)
            if name not in self._given:
                live.add(self._maker[name])
                todo += self._values(steps[self._maker[name]])
        return live, values

    def _whole(self, arguments: set[str]) -> set[str]:
        """Add the sizes, and what arguments that are not given fall back to."""
        known = {argument.name: argument for argument in self._program.arguments}
        todo = [*arguments]
        while todo:
            argument = known.get(todo.pop())
            if not isinstance(argument, Text | Numbers):
                continue
            # A text that others fall back to counts beside them: it says that there is one.
            if isinstance(argument, Numbers) and argument.name in self._given:
                continue
            if argument.fallback is not None and argument.fallback not in arguments:
                arguments.add(argument.fallback)
                todo.append(argument.fallback)
        return arguments | {symbol.argument for symbol in self._program.symbols.values()}

    def _values(self, statement: Statement) -> Iterator[str]:
        """Yield the values that a statement needs in this call."""
        match statement:
            case form.Choose():
                chosen = holds(statement.when, self._truth)
                if chosen is not False:
                    yield statement.then
                if chosen is not True:
                    yield statement.otherwise
            case Loop():
                yield from self._values_of_loop(statement)
            case _:
                yield from values_used(statement)

    def _values_of_loop(self, loop: Loop) -> Iterator[str]:
        for state in loop.states:
            if not continues(loop, self._given):
                yield state.noise
            if state.clean is not None and self._starts_clean(loop, state) is not False:
                yield state.clean
            if state.keep is not None:
                yield from (state.keep.value, state.keep.where, state.keep.noise)
        yield from map(value_of, loop.feeds.values())
        for branch in loop.branches:
            if holds(branch.when, self._truth) is not False:
                yield from map(value_of, branch.feeds.values())

    def _starts_clean(self, loop: Loop, state: form.State) -> bool | None:
        return continues(loop, self._given) or holds(state.clean_when, self._truth)

    def _arguments(self, statement: Statement) -> Iterator[str]:
        """Yield the arguments that a statement reads in this call."""
        if not isinstance(statement, Loop):
            yield from arguments_used(statement)
            if isinstance(statement, form.Choose):
                yield from _tested(statement.when)
            return
        part = statement.part
        names = (*plan_arguments(statement), part.start, part.stop)
        yield from (name for name in (*names, statement.rescale) if name is not None)
        clean = [self._starts_clean(statement, state) for state in statement.states]
        if part.strength is not None and any(each is not False for each in clean):
            yield part.strength
        for state in statement.states:
            yield from _tested(state.clean_when)
        if statement.cache is not None:
            yield statement.cache.every
        for switch in statement.switches:
            yield from bounds_of_window(switch.during)
        yield from windows_of_feeds(statement.feeds.values())
        for branch in statement.branches:
            yield from _tested(branch.when)
            if holds(branch.when, self._truth) is not False:
                yield from windows_of_feeds(branch.feeds.values())
                yield from pushes_of(branch)
                if branch.during is not None:
                    yield from bounds_of_window(branch.during)


def _tested(tests: Sequence[Test]) -> Iterator[str]:
    """Yield the arguments whose numbers are tested."""
    yield from (test.argument for test in tests if test.argument is not None)
