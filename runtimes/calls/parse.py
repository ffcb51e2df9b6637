"""The arguments of a call become a request, or are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from latentc.runtimes.calls import values as checked
from latentc.runtimes.calls.arguments import (
    array_of,
    check_encoded,
    check_groups,
    in_pixels,
    masking_of,
    missing,
    numbers_of,
    prompts_of_values,
    rows_of,
    shaped,
    spread_rows,
    taken_as_values,
    texts_of,
)
from latentc.runtimes.calls.choices import MASK_OPTIONS, READING, check_output_type
from latentc.runtimes.calls.facts import SEVERAL, Facts
from latentc.runtimes.calls.given_generators import generators_of, seeds_of
from latentc.runtimes.calls.images import check_counts, listed, prepared, with_pixels
from latentc.runtimes.calls.reading import check_reading
from latentc.runtimes.calls.request import Request, singles
from latentc.runtimes.calls.sizes import binning_of, sizes_of
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.demand import Demand, holds, of_call, truth_of
from latentc.runtimes.programs.statements import Loop, Pixels
from latentc.runtimes.programs.uses import bounds_of_window
from latentc.runtimes.programs.values import Rows
from latentc.runtimes.sampling.views import MOST_VIEWS, count_views

_CALL_WIDE = (
    *("seed", "generator", "scheduler", *SEVERAL.values(), "batch_size", "output_type"),
    *(*READING, *MASK_OPTIONS),
)


def parse(
    facts: Facts, arguments: Mapping[str, Any], scheduler: str, wanted: Sequence[str] = ()
) -> Request:
    """Check a call's arguments; those that are None count as not given.

    Args:
        scheduler: the name of the one that is used.
        wanted: names of values that are asked for, in the place of images.

    Raises:
        InputError: an unknown name, a value that cannot be used or has no effect, or one that is
            missing.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    _refuse_others(facts, given)
    given, values, labels = taken_as_values(facts, given)
    arrays = {name: array_of(facts, name, value) for name, value in values.items()}
    check_groups(facts, arrays)
    images_by_argument = listed(facts, given)
    each = checked.count(given, facts.several, 1)
    rows = prompts_of_values(facts, arrays, images_by_argument, each, wanted)
    row_lists = rows_of(facts, given)
    rows = max((rows, *map(len, row_lists.values())))
    texts, prompts = texts_of(facts, given, rows)
    row_numbers = spread_rows(facts, row_lists, prompts)
    made = prompts * each
    if made > checked.MOST_IMAGES:
        raise InputError(f"{made} images in one call: at most {checked.MOST_IMAGES}")
    values = {n: shaped(facts, n, array, each, prompts, labels[n]) for n, array in arrays.items()}
    check_encoded(facts, values)
    check_counts(facts, images_by_argument, made, prompts)
    named_numbers = numbers_of(facts, given)
    sizes = sizes_of(facts, given, values, images_by_argument)
    numbers = {name: in_pixels(value, sizes.told) for name, value in named_numbers.items()}
    flags = set() if facts.program.bins is None else {facts.program.bins.argument}
    named = frozenset({*given, *values} - {*_CALL_WIDE, *flags})
    single_numbers = singles(numbers)
    output_type = given.get("output_type", "pil")
    check_output_type(output_type)
    if output_type == "latent":
        wanted = wanted or (facts.loop.state.name,)
    demand = of_call(facts.program, named, single_numbers, wanted)
    _refuse_unused(facts, named, texts, wanted)
    _refuse_missing(facts, demand, named, {*texts, *row_numbers})
    for loop in facts.loops:
        _refuse_two_starts(loop, named, single_numbers, labels)
        _refuse_empty_windows(loop, single_numbers)
    masking = masking_of(facts, given)
    weighting = checked.boolean(given, "prompt_weighting")
    chunks = checked.count(given, "max_embeddings_multiples", 1)
    check_reading(facts, demand, texts, weighting, chunks)
    symbols = {
        symbol: (sizes.made[spec.argument] - spec.offset) // spec.unit
        for symbol, spec in facts.program.symbols.items()
    }
    if facts.loop_place in demand.live:
        _refuse_many_views(facts, symbols)
    generators = generators_of(given, made)
    live = (facts.program.steps[place] for place in demand.live)
    images = with_pixels(
        prepared(facts, images_by_argument, sizes, masking),
        [step for step in live if isinstance(step, Pixels) and step.gives not in values],
        symbols,
    )
    return Request(
        facts=facts,
        texts=texts,
        numbers=numbers,
        row_numbers=row_numbers,
        images=images,
        values=values,
        given=named,
        prompts=prompts,
        images_per_prompt=each,
        seeds=checked.seeds(given.get("seed"), made) if not generators else seeds_of(generators),
        generators=generators,
        sizes=sizes,
        symbols=symbols,
        scheduler=scheduler,
        output_type=output_type,
        demand=demand,
        prompt_weighting=weighting,
        max_embeddings_multiples=chunks,
        masking=masking,
        binning=binning_of(facts, given),
    )


def _refuse_others(facts: Facts, given: Mapping[str, Any]) -> None:
    """Refuse what other programs of the bundle take."""
    bins = facts.program.bins
    flags = () if bins is None else (bins.argument,)
    values = sorted(facts.public)
    known = (*facts.texts, *facts.images, *facts.numbers, *facts.symbols, *flags, *values)
    others = {*SEVERAL.values()} - {facts.several}
    unknown = [name for name in given if name not in known and name not in {*_CALL_WIDE} - others]
    if unknown:
        raise InputError(
            f"{unknown[0]!r} changes nothing in {facts.program.name}: leave it out, or give what "
            "it is for"
        )


def _refuse_unused(
    facts: Facts,
    given: frozenset[str],
    texts: Mapping[str, tuple[str, ...]],
    wanted: Sequence[str],
) -> None:
    """Refuse what no call of these names could need, whatever its numbers are; what a whole call
    needs may also be given where values are asked for."""
    named = {name for name in given if name not in facts.texts or name in texts}
    could = _needed(facts, named, wanted)
    for name in sorted(named):
        if name in could or name in facts.symbols:
            continue
        instead = _what_stands_for_it(facts, name, named, wanted)
        if instead is not None and _says_the_same(facts, name, instead):
            raise InputError(f"{name!r} and {instead!r} say the same thing: give one of them")
        if instead is not None:
            raise InputError(f"{name!r} has no effect beside {instead!r}: give one of them")
        other = _what_it_needs(facts, name, named, wanted)
        if other is not None:
            raise InputError(
                f"{name!r} changes nothing without {other!r}: give {other!r} too, or leave it out"
            )
        raise InputError(f"{name!r} changes nothing in this call: leave it out")


def _needed(facts: Facts, given: Collection[str], wanted: Sequence[str]) -> frozenset[str]:
    """Return what a call could need that gives this, or could need if no values were asked for."""
    asked = (wanted, ()) if wanted else (wanted,)
    demands = [of_call(facts.program, given, None, each) for each in asked]
    return frozenset().union(*(each.values | each.arguments for each in demands))


def _says_the_same(facts: Facts, argument: str, value: str) -> bool:
    """Return whether a value is what is made of a text."""
    return argument in facts.texts and facts.types[value].rows == Rows.PROMPTS


def _what_stands_for_it(
    facts: Facts, name: str, given: set[str], wanted: Sequence[str]
) -> str | None:
    """Return a value that is given in the place of what this argument would count for."""
    for value in sorted(given & facts.public - {name}):
        if name in _needed(facts, given - {value}, wanted):
            return value
    return None


def _what_it_needs(facts: Facts, name: str, given: set[str], wanted: Sequence[str]) -> str | None:
    """Return another argument with which this one would count; None where there is none."""
    for other in (*facts.texts, *facts.numbers):
        if other not in given and name in _needed(facts, {*given, other}, wanted):
            return other
    return None


def _refuse_missing(
    facts: Facts,
    demand: Demand,
    given: frozenset[str],
    known: Collection[str],
) -> None:
    """Refuse a call without a text, an image or a number for each prompt that it needs.

    Args:
        known: texts and numbers that there are, defaults included.
    """
    for name in sorted(demand.arguments):
        listed = name in facts.texts or name in facts.row_numbers
        needed = name in facts.images or (listed and name not in known)
        if needed and name not in given:
            raise InputError(missing(facts, name))


def _refuse_many_views(facts: Facts, symbols: Mapping[str, int]) -> None:
    """Refuse an image that would be made in more views than anybody waits for."""
    views = facts.loop.views
    if views is None:
        return
    count = count_views([*symbols.values()][:2], views.size, views.stride)
    if count > MOST_VIEWS:
        raise InputError(
            f"an image of this size is {count} views, each of which is denoised in every step: at "
            f"most {MOST_VIEWS}"
        )


def _refuse_empty_windows(loop: Loop, numbers: Mapping[str, float]) -> None:
    """Refuse windows of branches that hold nothing, and parts of a schedule."""
    for window in {each.during for each in loop.branches if each.during is not None}:
        names = [*bounds_of_window(window)]
        if len(names) < 2:
            continue
        start, stop = (numbers[name] for name in names)
        if not start < stop:
            raise InputError(
                f"{names[0]!r} {start:g} and {names[1]!r} {stop:g}: expected fractions of the "
                f"steps, 0 <= {names[0]} < {names[1]} <= 1"
            )
    part = loop.part
    ends = (numbers.get(part.start or "", 0.0), numbers.get(part.stop or "", 1.0))
    if part.start is not None and part.start in numbers and ends[0] >= ends[1]:
        raise InputError(f"{part.start!r} must be below {part.stop!r}")


def _refuse_two_starts(
    loop: Loop,
    given: frozenset[str],
    numbers: Mapping[str, float],
    labels: Mapping[str, str],
) -> None:
    """Refuse noise beside an image that the loop starts from: diffusers' classes mean three
    different things by it. What the image became may be given beside it, by its own name. Refuse to
    go on from latents that are not given."""
    part = loop.part
    for state in loop.states:
        tested = holds(state.clean_when, truth_of(given, numbers))
        clean = state.clean is not None and tested is True
        if clean and state.noise in given and labels.get(state.clean or "") != state.clean:
            raise InputError(
                f"{state.noise!r} and 'image' are both what to start from: give one of them"
            )
    if part.start in given and any(state.clean not in given for state in loop.states):
        raise InputError(
            f"{part.start!r} goes on from another run's latents: give them, float32 [images, "
            "channels, height, width] of a call with output_type='latent'"
        )
