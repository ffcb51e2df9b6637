"""This module tells which values may have another length along their first axis than their type
says.

They are encoded texts of several chunks, or of as many ids as they have, for a denoiser whose input
has a symbol there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.graphs import Graph
from latentc.runtimes.programs.statements import Program, Statement, names_given, value_of
from latentc.runtimes.programs.uses import feeds_of


def stretchable(program: Program, graphs: Mapping[str, Graph]) -> frozenset[str]:
    """Return the values made of texts that all that take them take at any length."""
    fixed: set[str] = set()
    taken: set[str] = set()
    for statement in reversed(program.steps):
        for value, free in _uses(statement, graphs, fixed):
            taken.add(value)
            if not free:
                fixed.add(value)
    return frozenset(name for name in taken - fixed if name in _of_texts(program))


def _uses(
    statement: Statement, graphs: Mapping[str, Graph], fixed: set[str]
) -> Iterator[tuple[str, bool]]:
    """Yield the values that a statement uses, and whether it takes them at any length."""
    free = not any(name in fixed for name in names_given(statement))
    match statement:
        case form.Loop():
            inputs = graphs[statement.denoiser].inputs
            for name, feed in feeds_of(statement):
                shape = inputs[name].shape
                yield value_of(feed), len(shape) > 1 and isinstance(shape[1], str)
        case form.Run():
            for name, value in statement.feeds.items():
                shape = graphs[statement.component].inputs[name].shape
                yield value, len(shape) > 1 and isinstance(shape[1], str)
        case form.Join():
            yield from ((value, free and statement.axis > 1) for value in statement.of)
        case form.Cut():
            yield statement.of, free and statement.axis > 1
        case form.Choose():
            yield from ((value, free) for value in (statement.then, statement.otherwise))
        case _:
            return


def _of_texts(program: Program) -> frozenset[str]:
    """Return the values that are made of token ids alone."""
    tokens: set[str] = set()
    made: set[str] = set()
    for statement in program.steps:
        match statement:
            case form.Tokens():
                tokens.add(statement.gives)
            case form.Run() if statement.feeds and tokens.issuperset(statement.feeds.values()):
                made.update(statement.gives.values())
            case form.Join() if made.issuperset(statement.of):
                made.add(statement.gives)
            case form.Cut() if statement.of in made:
                made.update(statement.gives)
            case form.Choose() if {statement.then, statement.otherwise} & made:
                made.add(statement.gives)
            case form.Zeros() if statement.like in made:
                made.add(statement.gives)
            case _:
                pass
    return frozenset(made)
