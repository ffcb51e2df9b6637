"""Programs, changed to what an export is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import structs

from exporter.programs.draft import STEPS
from runtimes.programs.statements import (
    Cache,
    Loop,
    Noise,
    Numbers,
    Pixels,
    Program,
    Statement,
    Symbol,
    loop_of,
)
from runtimes.sizes import dimension

_EVERY = "cache_interval"


def with_sizes(program: Program, fixed: Mapping[str, int]) -> Program:
    """Return the program for one size. `fixed`: latents by symbol."""
    symbols = {name: _fixed(symbol, fixed.get(name)) for name, symbol in program.symbols.items()}
    steps = tuple(_sized(statement, fixed) for statement in program.steps)
    return structs.replace(program, symbols=symbols, steps=steps)


def _fixed(symbol: Symbol, size: int | None) -> Symbol:
    if size is None:
        return symbol
    return structs.replace(symbol, default=size, multiple=1, least=size, most=size)


def _sized(statement: Statement, fixed: Mapping[str, int]) -> Statement:
    if not isinstance(statement, Pixels | Noise):
        return statement
    shape = tuple(dimension(size, fixed) for size in statement.shape)
    return structs.replace(statement, shape=shape)


def with_cache(program: Program, component: str, keeps: Sequence[str]) -> Program:
    """Return the program with step caching: a call says how often the whole denoiser runs.

    Args:
        component: what runs in the denoiser's place.
        keeps: the outputs of the denoiser that it takes.
    """
    cache = Cache(component=component, keeps=tuple(keeps), every=_EVERY)
    steps = tuple(
        structs.replace(statement, cache=cache) if isinstance(statement, Loop) else statement
        for statement in program.steps
    )
    every = Numbers(name=_EVERY, default=(1,), least=1, whole=True)
    names = [argument.name for argument in program.arguments]
    place = names.index(loop_of(program).plan.steps)
    arguments = (*program.arguments[:place], every, *program.arguments[place:])
    return structs.replace(program, steps=steps, arguments=arguments)


def with_planned_steps(program: Program, planned: Sequence[int]) -> Program:
    """Return the program whose default step count is the nearest that there is a plan for."""
    arguments = tuple(
        structs.replace(argument, default=(float(nearest(planned, usual_steps(program))),))
        if argument.name == STEPS and isinstance(argument, Numbers)
        else argument
        for argument in program.arguments
    )
    return structs.replace(program, arguments=arguments)


def usual_steps(program: Program) -> int:
    """Return the step count of a call that asks for none."""
    numbers = (each for each in program.arguments if isinstance(each, Numbers))
    return int(next(each.default[0] for each in numbers if each.name == STEPS))


def nearest(planned: Sequence[int], usual: int) -> int:
    """Return the planned step count that is nearest to the usual one."""
    return min(planned, key=lambda count: abs(count - usual))
