"""This module tells what a statement looks at: values, arguments of the call, tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.statements import During, Feed, Statement, Test, Window, value_of


def values_used(statement: Statement) -> Iterator[str]:
    """Yield the names of all values that a statement may use, whatever its tests say."""
    match statement:
        case form.Zeros():
            if statement.like is not None:
                yield statement.like
        case form.Run():
            yield from statement.feeds.values()
        case form.Join():
            yield from statement.of
        case form.Cut() | form.Emit():
            yield statement.of
        case form.Choose():
            yield from (statement.then, statement.otherwise)
        case form.Loop():
            for state in statement.states:
                yield state.noise
                if state.clean is not None:
                    yield state.clean
                if state.keep is not None:
                    yield from (state.keep.value, state.keep.where, state.keep.noise)
            yield from (value_of(feed) for _, feed in feeds_of(statement))
        case _:
            return


def arguments_used(statement: Statement) -> Iterator[str]:
    """Yield the names of the arguments that a statement reads, those of its tests aside."""
    match statement:
        case form.Tokens():
            yield statement.text
        case form.Pixels():
            yield statement.of
            if statement.fill_where is not None:
                yield statement.fill_where
        case form.NumberRow():
            yield from form.arguments_of_row(statement)
        case form.Noise():
            yield from statement.rows
        case form.Loop():
            yield from _of_loop(statement)
        case _:
            return


def tests_of(statement: Statement) -> Iterator[Test]:
    """Yield the tests of a statement."""
    if isinstance(statement, form.Choose):
        yield from statement.when
    if isinstance(statement, form.Loop):
        for state in statement.states:
            yield from state.clean_when
        for branch in statement.branches:
            yield from branch.when


def _of_loop(loop: form.Loop) -> Iterator[str]:
    part = loop.part
    names = (*plan_arguments(loop), part.strength, part.start, part.stop)
    yield from (name for name in (*names, loop.rescale) if name is not None)
    if loop.cache is not None:
        yield loop.cache.every
    yield from windows_of_loop(loop)
    yield from windows_of_feeds(loop.feeds.values())
    for branch in loop.branches:
        yield from windows_of_feeds(branch.feeds.values())
        yield from (push.by for push in branch.push)
    for tested in tests_of(loop):
        if tested.argument is not None:
            yield tested.argument


def plan_arguments(loop: form.Loop) -> tuple[str, ...]:
    """Return the arguments that say which plan a loop follows."""
    if loop.plan.fixed is not None:
        return (loop.plan.steps,)
    return (loop.plan.scheduler, loop.plan.steps)


def pushes_of(branch: form.Branch) -> Iterator[str]:
    """Yield the names of the arguments by which a branch pushes, and of the windows of these."""
    for push in branch.push:
        yield push.by
        if push.during is not None:
            yield from bounds_of_window(push.during)


def windows_of_loop(loop: form.Loop) -> Iterator[str]:
    """Yield the names of the arguments that bound the windows of a loop: of its denoisers, branches
    and pushes, not of what is fed."""
    windows: list[Window | None] = [switch.during for switch in loop.switches]
    for branch in loop.branches:
        windows += [branch.during, *(push.during for push in branch.push)]
    for window in windows:
        if window is not None:
            yield from bounds_of_window(window)


def feeds_of(loop: form.Loop) -> list[tuple[str, Feed]]:
    """Return what feeds each input of the denoiser, in the loop and in each of its branches."""
    by_branch = (item for branch in loop.branches for item in branch.feeds.items())
    return [*loop.feeds.items(), *by_branch]


def windows_of_feeds(feeds: Iterable[Feed]) -> Iterator[str]:
    """Yield the names of the arguments that bound the windows of these feeds."""
    for feed in feeds:
        if isinstance(feed, During):
            yield from bounds_of_window(feed.during)


def bounds_of_window(window: Window) -> Iterator[str]:
    """Yield the names of the arguments that bound a window, its start first; numbers that the
    program itself gives have no name."""
    yield from (each for each in (window.start, window.stop) if isinstance(each, str))


def components_run(program: form.Program) -> Iterator[str]:
    """Yield the names of the components that a program may run; one may come several times."""
    for step in program.steps:
        yield from components_of(step)


def components_of(statement: form.Statement) -> Iterator[str]:
    """Yield the names of the components that a statement may run."""
    if isinstance(statement, form.Run):
        yield statement.component
    elif isinstance(statement, form.Loop):
        yield from statement.denoisers
        others = (statement.combine, statement.cache)
        yield from (each.component for each in others if each is not None)
