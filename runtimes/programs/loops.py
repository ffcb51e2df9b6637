"""This module checks what a loop of a program must keep to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.dimensions import Dimension, parse
from latentc.runtimes.programs.graphs import ROWS, TIMESTEP, Form, Graph
from latentc.runtimes.programs.statements import (
    Branch,
    During,
    Feed,
    Loop,
    Numbers,
    Window,
    value_of,
)
from latentc.runtimes.programs.values import Rows, Type, fits, type_of

MOST_BRANCHES = 16
LARGEST_VIEW = 4096  # latents along a side
MOST_STEPS = 10_000  # plans have fewer, and what is counted beforehand stays short


LARGEST_TIMESTEP = 1e6


def loop_types(loop: Loop, types: Mapping[str, Type]) -> dict[str, Type]:
    """Return the types of what a loop gives, by name."""
    return {state.name: Type(False, types[state.noise].shape, Rows.IMAGES) for state in loop.states}


def loop_problems(
    loop: Loop,
    graphs: Mapping[str, Graph],
    types: Mapping[str, Type],
    arguments: Mapping[str, form.Argument],
    sizes: Mapping[str, form.Symbol],
) -> Iterator[str]:
    """Yield what is wrong with a loop whose names are all known.

    Args:
        types: of the values before it.
        sizes: the symbols of the program.
    """
    denoiser = graphs.get(loop.denoiser)
    if denoiser is None:
        yield f"no component {loop.denoiser!r}"
        return
    if not 1 <= len(loop.branches) <= MOST_BRANCHES:
        yield f"{len(loop.branches)} branches: expected 1 to {MOST_BRANCHES}"
        return  # what follows looks at all of them for each
    if max(len(loop.other_states), len(loop.switches)) >= MOST_BRANCHES:
        yield f"{len(loop.states)} states and {len(loop.switches)} switches: too many"
        return
    yield from _argument_problems(loop, arguments)
    for state in loop.states:
        yield from _state_problems(loop, state, types)
    yield from _branch_problems(loop, arguments)
    timestep_problems = [*_timestep_problems(loop, denoiser)]
    if timestep_problems:
        yield from timestep_problems
        return  # what follows looks these inputs up
    if loop.views is None:
        yield from _prediction_problems(loop, denoiser, types)
    else:
        yield from _view_problems(loop, loop.views, denoiser, types, sizes)
    for branch in loop.branches:
        yield from _feed_problems(loop, branch, denoiser, types, arguments)
    if loop.other_states:
        yield from _several_state_problems(loop)
    for switch in loop.switches:
        yield from _switch_problems(loop, switch, denoiser, graphs, arguments)
    if loop.combine is not None:
        yield from _combine_problems(loop, loop.combine, denoiser, graphs)
    if loop.cache is not None:
        yield from _cache_problems(loop, loop.cache, denoiser, graphs)


def _argument_problems(loop: Loop, arguments: Mapping[str, form.Argument]) -> Iterator[str]:
    part = loop.part
    every = None if loop.cache is None else loop.cache.every
    names = (loop.plan.steps, part.strength, part.stop, loop.rescale, every)
    pushes = (push.by for branch in loop.branches for push in branch.push)
    for name in (*names, *pushes):
        if name is not None and not is_number(arguments.get(name)):
            yield f"{name!r} is no number, or none in calls without it"
    if part.start is not None and _count(arguments.get(part.start)) != 1:
        yield f"{part.start!r} is no number"
    steps = arguments.get(loop.plan.steps)
    if isinstance(steps, Numbers) and not 1 <= (steps.most or 0) <= MOST_STEPS:
        yield f"{loop.plan.steps!r} must have a largest number of at most {MOST_STEPS}"
    if loop.plan.scheduler in arguments:
        yield f"{loop.plan.scheduler!r} is no scheduler"
    if loop.plan.fixed is not None and loop.plan.scheduler != form.Plan().scheduler:
        yield f"the plans of {loop.plan.fixed!r}, and an argument that names others"


def is_number(argument: form.Argument | None) -> bool:
    """Return whether an argument is one number in every call, whatever its size."""
    return (
        isinstance(argument, Numbers)
        and argument.count == 1
        and not argument.rows
        and not argument.optional
        and not any(isinstance(each, str) for each in argument.default)
    )


def _count(argument: form.Argument | None) -> int:
    return argument.count if isinstance(argument, Numbers) and not argument.rows else 0


def _state_problems(loop: Loop, state: form.State, types: Mapping[str, Type]) -> Iterator[str]:
    noise = types[state.noise]
    if noise.integers or noise.rows != Rows.IMAGES:
        yield f"{state.noise!r} is {noise} with rows {noise.rows}: no noise of images"
    elif noise.shape[0].symbol is not None:
        yield f"{state.noise!r} is {noise}: its channels must be a number"
    if state.clean is None and (state.clean_when or loop.part.strength or loop.part.start):
        yield "a strength, a start, or tests of a clean value, and none to start from"
    if state.clean is not None and not types[state.clean].same_form(noise):
        yield f"{state.clean!r} is {types[state.clean]}, and {state.noise!r} {noise}"
    if state.keep is None:
        return
    for name in (state.keep.value, state.keep.noise):
        if not types[name].same_form(noise):
            yield f"{name!r} is {types[name]}, and {state.noise!r} {noise}"
    where = types[state.keep.where]
    if where.integers or where.shape != (Dimension(1), *noise.shape[1:]):
        yield f"{state.keep.where!r} is {where}: expected one channel of {noise}"


def _branch_problems(loop: Loop, arguments: Mapping[str, form.Argument]) -> Iterator[str]:
    names = [branch.name for branch in loop.branches]
    if len({*names}) < len(names):
        yield f"the branches {names}: expected different names"
    if form.GUIDED in names:
        yield f"a branch {form.GUIDED!r}: that is what the branches make together"
    bases = [branch for branch in loop.branches if not branch.push]
    if len(bases) != 1 or bases[0].when or bases[0].during:
        yield "expected one branch that always runs and pushes nothing"
    tests = {branch.name: {*map(repr, branch.when)} for branch in loop.branches}
    for branch in loop.branches:
        for push in branch.push:
            if push.branch not in names or push.branch == branch.name:
                yield f"branch {branch.name!r} pushes {push.branch!r}"
            elif not tests[push.branch] <= tests[branch.name]:
                yield f"branch {branch.name!r} pushes {push.branch!r}, which may not run then"
            if push.during is not None:
                yield from _window_problems(push.during, arguments, 1)
        if branch.during is not None:
            yield from _window_problems(branch.during, arguments, 1)
            if branch.during.count == "timestep":
                yield f"branch {branch.name!r}: a window of timesteps; expected one of evaluations"


def _window_problems(
    window: Window, arguments: Mapping[str, form.Argument], columns: int
) -> Iterator[str]:
    for bound in (window.start, window.stop):
        if isinstance(bound, str):
            argument = arguments.get(bound)
            missing = isinstance(argument, Numbers) and argument.optional
            if _count(argument) not in (1, columns) or missing:
                yield f"a window by {bound!r}, which has not 1 or {columns} numbers in every call"
        elif window.count == "timestep" and not 0 <= bound <= LARGEST_TIMESTEP:
            yield f"a window with {bound:g}: expected timesteps from 0 to {LARGEST_TIMESTEP:g}"
        elif window.count != "timestep" and not 0 <= bound <= 1:
            yield f"a window with {bound:g}: expected fractions"
    start, stop = window.start, window.stop
    if not isinstance(start, str) and not isinstance(stop, str) and start >= stop:
        yield f"a window from {start:g} to {stop:g}, which holds nothing"


def _feed_problems(
    loop: Loop,
    branch: Branch,
    denoiser: Graph,
    types: Mapping[str, Type],
    arguments: Mapping[str, form.Argument],
) -> Iterator[str]:
    fed: dict[str, Feed] = {**loop.feeds, **branch.feeds}
    if loop.feeds.keys() & branch.feeds.keys():
        yield f"branch {branch.name!r} feeds what the loop feeds"
    wanted = denoiser.inputs.keys() - {*(state.input for state in loop.states), TIMESTEP}
    if fed.keys() != wanted:
        yield f"branch {branch.name!r} feeds {sorted(fed)}: expected {sorted(wanted)}"
        return
    symbols: dict[str, Dimension] = {}
    own = {*denoiser.inputs[loop.state.input].shape[1:]}  # symbols of a view among them
    for state in loop.states if loop.views is None else ():
        fits(types[state.noise], denoiser.inputs[state.input], symbols)
    for name, feed in fed.items():
        value = types[value_of(feed)]
        if loop.views is not None and _depends(value.shape, denoiser.inputs[name], own):
            yield f"views of the state, and {value_of(feed)!r} is {value}, as large as all of it"
        if not fits(value, denoiser.inputs[name], symbols):
            spec: Form = denoiser.inputs[name]
            yield (
                f"branch {branch.name!r}: the denoiser takes {spec.dtype} {list(spec.shape)} as "
                f"{name!r}, not {value} ({value_of(feed)})"
            )
        if isinstance(feed, During):
            columns = value.shape[0].offset if len(value.shape) == 1 else 1
            yield from _window_problems(feed.during, arguments, columns)


def _view_problems(
    loop: Loop,
    views: form.Views,
    denoiser: Graph,
    types: Mapping[str, Type],
    sizes: Mapping[str, form.Symbol],
) -> Iterator[str]:
    """Yield what is wrong with views: they must cover latents of every size, and the denoiser must
    take a view whatever its sides are."""
    noise, state = types[loop.state.noise], loop.state
    if not 1 <= views.stride <= views.size or views.size % views.stride:
        yield f"views of {views.size} every {views.stride}: expected a multiple of the stride"
        return
    if views.size > LARGEST_VIEW:
        yield f"views of {views.size}: expected at most {LARGEST_VIEW}"
        return
    if loop.cache is not None:
        yield "views, and a cache, which knows one"
    if state.variance is not None:
        yield "views, and a variance, which is that of one"
    if len(noise.shape) != 3 or any(
        _multiple(side, sizes) % views.stride for side in noise.shape[1:]
    ):
        yield f"views every {views.stride} of {noise}: expected sides that are multiples of it"
        return
    given, made = denoiser.inputs.get(state.input), denoiser.outputs.get(state.prediction)
    wanted = (ROWS, *(each.offset for each in noise.shape[:1]))
    if given is None or made != given or len(given.shape) != 4 or given.shape[:2] != wanted:
        yield f"{loop.denoiser!r} does not give {state.prediction!r} in the form of {state.input!r}"
        return
    symbols = [each for each in (*given.shape[2:], ROWS) if isinstance(each, str)]
    if len(set(symbols)) < len(symbols):
        yield f"{loop.denoiser!r} takes {list(given.shape)}: expected different symbols"
    for own, side in zip(noise.shape[1:], given.shape[2:], strict=True):
        taken = parse(side)
        least = own.offset if own.symbol is None else sizes[own.symbol].least
        most = own.offset if own.symbol is None else LARGEST_VIEW
        only = {min(least, views.size), min(most, views.size)}  # sides of views
        if taken is None or (taken.symbol is None and {taken.offset} != only):
            yield f"{loop.denoiser!r} takes sides of {side}, not every view of {views.size}"
        elif taken.symbol is not None and taken != Dimension(0, 1, taken.symbol):
            yield f"{loop.denoiser!r} takes sides of {side}: expected a symbol alone"


def _multiple(side: Dimension, sizes: Mapping[str, form.Symbol]) -> int:
    """Return what a side of a state is a multiple of; 1 where it is more than a symbol."""
    if side.symbol is None:
        return side.offset
    return sizes[side.symbol].multiple if side == Dimension(0, 1, side.symbol) else 1


def _depends(shape: Sequence[Dimension], form: Form, sides: Collection[int | str]) -> bool:
    """Return whether a value, or the input that it feeds, has a size that follows from the
    state's."""
    parsed = [parse(size) for size in form.shape[1:]]
    names = [size.symbol for size in parsed if size is not None and size.symbol is not None]
    return any(size.symbol is not None for size in shape) or any(name in sides for name in names)


def _timestep_problems(loop: Loop, denoiser: Graph) -> Iterator[str]:
    for state in loop.states:
        if state.input not in denoiser.inputs or TIMESTEP not in denoiser.inputs:
            yield f"{loop.denoiser!r} has no input {state.input!r}, or none for the timestep"
            return
        dtype = denoiser.inputs[state.input].dtype
        if dtype != "float32":
            yield f"{loop.denoiser!r} takes {dtype} as {state.input!r}"
    timestep = denoiser.inputs[TIMESTEP]
    if timestep.dtype != "float32" or timestep.shape not in ((1,), (ROWS,)):
        yield (
            f"{loop.denoiser!r} takes the timestep as {timestep.dtype} {list(timestep.shape)}; "
            f"expected float32 [1] or [{ROWS}]"
        )


def _prediction_problems(loop: Loop, denoiser: Graph, types: Mapping[str, Type]) -> Iterator[str]:
    symbols: dict[str, Dimension] = {}
    for state in loop.states:
        noise = types[state.noise]
        if not fits(noise, denoiser.inputs[state.input], symbols):
            yield f"{loop.denoiser!r} does not take {noise} ({state.noise}) as {state.input!r}"
            return
    for state in loop.states:
        noise, output = types[state.noise], denoiser.outputs.get(state.prediction)
        prediction = None if output is None else type_of(output, symbols, noise.rows)
        if prediction is None or not prediction.same_form(noise):
            yield f"{loop.denoiser!r} gives no {state.prediction!r} of the form {noise}"
        said = None if state.variance is None else denoiser.outputs.get(state.variance)
        if state.variance is not None and (said != output or state.variance == state.prediction):
            yield f"{loop.denoiser!r} gives no {state.variance!r} like {state.prediction!r}"


def _several_state_problems(loop: Loop) -> Iterator[str]:
    """Yield what is wrong with a loop over several states, beyond each of them."""
    for kind, names in {
        "input": [state.input for state in loop.states],
        "prediction": [state.prediction for state in loop.states],
    }.items():
        if len({*names}) < len(names):
            yield f"several states with the {kind}s {names}: expected different ones"
    clean = [state.clean is not None for state in loop.states]
    if (loop.part.strength or loop.part.start) and not all(clean):
        yield "a part of the plan, and a state that is not clean at its start"
    for name in ("cache", "views", "rescale", "combine"):
        if getattr(loop, name) is not None:
            yield f"several states, and {name!r}, which knows one"
    if any(state.variance is not None for state in loop.states):
        yield "several states, and a variance, which is that of one"


def _switch_problems(
    loop: Loop,
    switch: form.Switch,
    denoiser: Graph,
    graphs: Mapping[str, Graph],
    arguments: Mapping[str, form.Argument],
) -> Iterator[str]:
    yield from _window_problems(switch.during, arguments, 1)
    other = graphs.get(switch.component)
    if other is None or switch.component == loop.denoiser:
        yield f"no component {switch.component!r} in the place of {loop.denoiser!r}"
        return
    predictions = [*(state.prediction for state in loop.states), loop.state.variance]
    if dict(other.inputs) != dict(denoiser.inputs) or any(
        other.outputs.get(name) != denoiser.outputs.get(name) for name in predictions if name
    ):
        yield f"{switch.component!r} does not take and predict what {loop.denoiser!r} does"
    if loop.cache is not None:
        yield f"{switch.component!r}, and a cache, which knows one denoiser"


def _combine_problems(
    loop: Loop, combine: form.Combine, denoiser: Graph, graphs: Mapping[str, Graph]
) -> Iterator[str]:
    """Yield what is wrong with a component that makes the prediction: it takes predictions and
    gives one."""
    component, name = graphs.get(combine.component), loop.state.prediction
    if component is None:
        yield f"no component {combine.component!r}"
        return
    if combine.feeds.keys() != component.inputs.keys():
        yield f"{combine.component!r} takes {sorted(component.inputs)}: fed {sorted(combine.feeds)}"
        return
    sources = {form.GUIDED, *(branch.name for branch in loop.branches)}
    for source in combine.feeds.values():
        if source not in sources:
            yield f"{combine.component!r} is fed {source!r}: expected one of {sorted(sources)}"
    prediction = denoiser.outputs.get(name)
    specs = [*component.inputs.values(), component.outputs.get(name)]
    if any(spec != prediction for spec in specs):
        yield f"{combine.component!r} does not take and give {name!r} as the denoiser gives it"
    if len(loop.branches) < 2:
        yield f"{combine.component!r}, and one branch: it would never run"
    if loop.views is not None:
        yield f"{combine.component!r}, and views"


def _cache_problems(
    loop: Loop, cache: form.Cache, denoiser: Graph, graphs: Mapping[str, Graph]
) -> Iterator[str]:
    shallow = graphs.get(cache.component)
    if shallow is None:
        yield f"no component {cache.component!r}"
        return
    known = {**denoiser.inputs, **{name: denoiser.outputs.get(name) for name in cache.keeps}}
    for name, spec in shallow.inputs.items():
        if known.get(name) != spec:
            yield f"{cache.component!r} takes {name!r}, which the denoiser neither takes nor gives"
    if not {loop.state.input, TIMESTEP} <= shallow.inputs.keys():
        yield f"{cache.component!r} needs the inputs {loop.state.input!r} and {TIMESTEP!r}"
    if not cache.keeps or not set(cache.keeps) <= shallow.inputs.keys():
        yield f"{cache.component!r} does not take all of {list(cache.keeps)}"
    for output in (loop.state.prediction, loop.state.variance):
        if output is not None and shallow.outputs.get(output) != denoiser.outputs.get(output):
            yield f"{cache.component!r} does not give {output!r} as the denoiser does"
