"""Programs, changed to what an export is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import structs

from latentc.exporter.programs.draft import STEPS
from latentc.runtimes.bundle.sizes import dimension
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.programs.statements import (
    Argument,
    Cache,
    Emit,
    Noise,
    NumberRow,
    Numbers,
    Pixels,
    Program,
    Run,
    Statement,
    Symbol,
    emitted,
    loop_of,
    loops_of,
)

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
    cache, main = Cache(component=component, keeps=tuple(keeps), every=_EVERY), loop_of(program)
    steps = tuple(
        structs.replace(main, cache=cache) if statement is main else statement
        for statement in program.steps
    )
    every = Numbers(name=_EVERY, default=(1,), least=1, whole=True)
    names = [argument.name for argument in program.arguments]
    place = names.index(main.plan.steps)
    arguments = (*program.arguments[:place], every, *program.arguments[place:])
    return structs.replace(program, steps=steps, arguments=arguments)


def with_number_fed(program: Program, number: Numbers, input: str) -> Program:
    """Return the program whose calls take a number, which the denoiser is given in all branches.

    Args:
        input: of the denoiser; it is [batch, 1].
    """
    row, main = f"_{number.name}", loop_of(program)
    fed = structs.replace(main, feeds={**main.feeds, input: row})
    place = program.steps.index(main)
    steps = (
        *program.steps[:place],
        NumberRow(gives=row, of=(number.name,)),
        fed,
        *program.steps[place + 1 :],
    )
    return structs.replace(program, arguments=(*program.arguments, number), steps=steps)


def with_planned_steps(
    program: Program, planned: Sequence[int], fixed: Mapping[str, Sequence[int]]
) -> Program:
    """Return the program whose default step counts are the nearest that there are plans for.

    Args:
        planned: the step counts of the pipeline's own scheduler.
        fixed: those of the schedules that loops always follow, by name.
    """
    counts = {
        loop.plan.steps: planned if loop.plan.fixed is None else fixed[loop.plan.fixed]
        for loop in loops_of(program)
    }
    arguments = tuple(
        structs.replace(argument, default=(float(nearest(counts[argument.name], default)),))
        if argument.name in counts and (default := _default_of(argument))
        else argument
        for argument in program.arguments
    )
    return structs.replace(program, arguments=arguments)


def _default_of(argument: Argument) -> int:
    """Return the number that an argument is in a call without it, 0 where it is none."""
    return int(argument.default[0]) if isinstance(argument, Numbers) and argument.default else 0


def usual_steps(program: Program) -> int:
    """Return the step count of a call that asks for none."""
    numbers = (argument for argument in program.arguments if isinstance(argument, Numbers))
    return int(next(number.default[0] for number in numbers if number.name == STEPS))


def nearest(planned: Sequence[int], usual: int) -> int:
    """Return the planned step count that is nearest to the usual one."""
    return min(planned, key=lambda count: abs(count - usual))


def with_postprocessor(
    program: Program, component: Component, arrays: Mapping[str, str]
) -> Program:
    """Return the program that emits what a component makes of its images.

    Args:
        component: of one input, and an output for images of the same form.
        arrays: its other outputs, which are emitted by these names.
    """
    (input,), (output, *_) = component.inputs, component.outputs
    (before,) = emitted(program, "images")
    after = f"_{component.name}_image"
    run = Run(component=component.name, feeds={input: before}, gives={output: after, **arrays})
    made = tuple(step for step in program.steps if not isinstance(step, Emit))
    others = (step for step in program.steps if isinstance(step, Emit) and step.of != before)
    own = (Emit(kind="arrays", of=name) for name in arrays.values())
    emits = (Emit(kind="images", of=after), *others, *own)
    return structs.replace(program, steps=(*made, run, *emits))
