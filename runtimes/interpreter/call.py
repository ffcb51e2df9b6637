"""The arguments of a call, checked against the program that they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtimes import argument_values as checked
from runtimes.errors import InputError
from runtimes.interpreter.facts import Facts
from runtimes.interpreter.images import Images, MaskOptions, Sizes, listed, prepared
from runtimes.interpreter.reading import check_reading
from runtimes.pictures import size as pixels_of
from runtimes.programs.demand import Demand, holds, of_call, truth_of
from runtimes.programs.statements import Image, Numbers, Program, Symbol, Test
from runtimes.programs.values import Rows
from runtimes.session import Array
from runtimes.sizes import check_side, nearest_bin, rounded

CALL_WIDE = (
    *("seed", "scheduler", "num_images_per_prompt", "batch_size", "output_type"),
    *("prompt_weighting", "max_embeddings_multiples", "mask_blur", "padding_mask_crop"),
)
_MOST_BLUR = 1 << 16  # pixels, as long as the longest side


@dataclass(frozen=True)
class Call:
    """What a call gives, and what it needs.

    Attributes:
        texts: one for each prompt, by argument; those that the call gives and defaults.
        numbers: by argument, defaults included.
        images: what the call's images became.
        values: arrays that the call gives in the place of what the program would make.
        given: the names of all that the call gives.
        prompts, images_per_prompt: how many.
        seeds: one for the whole batch, or one for each image.
        sizes: in pixels; `symbols`: in latents, by symbol.
        demand: what of the program is needed.
    """

    facts: Facts
    texts: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[float, ...]]
    images: Images
    values: Mapping[str, Array]
    given: frozenset[str]
    prompts: int
    images_per_prompt: int
    seeds: tuple[int, ...]
    sizes: Sizes
    symbols: Mapping[str, int]
    scheduler: str
    output_type: str
    demand: Demand
    prompt_weighting: bool = False
    max_embeddings_multiples: int = 1
    masking: MaskOptions = field(default_factory=MaskOptions)

    @property
    def made(self) -> int:
        """How many images are made."""
        return self.prompts * self.images_per_prompt

    def number(self, name: str) -> float:
        """Return the value of an argument that is one number."""
        return self.numbers[name][0]

    def holds(self, tests: Sequence[Test]) -> bool:
        """Return whether all tests hold in this call."""
        return holds(tests, truth_of(self.given, _singles(self.numbers))) is True


def _singles(numbers: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Return the numbers of arguments that are one."""
    return {name: value[0] for name, value in numbers.items() if len(value) == 1}


def parse(
    facts: Facts, arguments: Mapping[str, Any], scheduler: str, wanted: Sequence[str] = ()
) -> Call:
    """Check a call's arguments; those that are None count as not given.

    Args:
        scheduler: the name of the one that is used.
        wanted: names of values that are asked for, in the place of images.

    Raises:
        InputError: an unknown name, a value that cannot be used or has no effect, or one that is
            missing.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    _refuse_unknown(facts, given)
    given, values = _taken_as_values(facts, given)
    rows = _encoded_rows(facts, values)
    texts, prompts = _texts(facts, given, rows)
    each = checked.count(given, "num_images_per_prompt", 1, checked.MOST_IMAGES)
    made = prompts * each
    if made > checked.MOST_IMAGES:
        raise InputError(f"{made} images in one call: at most {checked.MOST_IMAGES}")
    values = {name: _shaped(facts, name, value, prompts, made) for name, value in values.items()}
    named_numbers = _numbers(facts, given)
    pictures = listed(facts, given, made)
    sizes = _sizes(facts, given, values, pictures)
    numbers = {name: _in_pixels(value, sizes.told) for name, value in named_numbers.items()}
    flags = set() if facts.program.bins is None else {facts.program.bins.argument}
    named = frozenset({*given, *values} - {*CALL_WIDE, *flags})
    singles = _singles(numbers)
    if given.get("output_type") == "latent":
        wanted = wanted or (facts.loop.state.name,)
    demand = of_call(facts.program, named, singles, wanted)
    _refuse_unused(facts, named, texts, wanted)
    _refuse_missing(facts, demand, named, texts)
    _refuse_two_starts(facts, named, singles)
    masking = _masking(facts, given)
    weighting = checked.boolean(given, "prompt_weighting")
    chunks = checked.count(given, "max_embeddings_multiples", 1)
    check_reading(facts, demand, texts, weighting, chunks)
    symbols = {
        facts.symbols[name]: side // facts.program.symbols[facts.symbols[name]].unit
        for name, side in sizes.made.items()
    }
    return Call(
        facts=facts,
        texts=texts,
        numbers=numbers,
        images=prepared(facts, pictures, sizes, masking),
        values=values,
        given=named,
        prompts=prompts,
        images_per_prompt=each,
        seeds=checked.seeds(given.get("seed"), made),
        sizes=sizes,
        symbols=symbols,
        scheduler=scheduler,
        output_type=given.get("output_type", "pil"),
        demand=demand,
        prompt_weighting=weighting,
        max_embeddings_multiples=chunks,
        masking=masking,
    )


def _refuse_unknown(facts: Facts, given: Mapping[str, Any]) -> None:
    bins = facts.program.bins
    flags = () if bins is None else (bins.argument,)
    values = sorted(facts.public)
    known = (*facts.texts, *facts.images, *facts.numbers, *facts.symbols, *flags, *values)
    unknown = [name for name in given if name not in known and name not in CALL_WIDE]
    if unknown:
        raise InputError(
            f"unknown argument {', '.join(map(repr, unknown))}; this program takes: "
            f"{', '.join((*known, *CALL_WIDE))}"
        )


def _taken_as_values(
    facts: Facts, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part what is given into arguments and values; latents in the place of an image are a value,
    told apart by their channels as in diffusers."""
    values = {name: given[name] for name in given if name in facts.public}
    arguments = {name: value for name, value in given.items() if name not in values}
    for name, argument in facts.images.items():
        if not isinstance(argument, Image) or argument.latents is None or name not in arguments:
            continue
        shape = tuple(getattr(arguments[name], "shape", ()))
        channels = facts.types[argument.latents].shape[0].offset
        if len(shape) == 4 and shape[1] == channels:
            values[argument.latents] = arguments.pop(name)
    return arguments, values


def _encoded_rows(facts: Facts, values: Mapping[str, Any]) -> int:
    """Return how many prompts the given encoded texts are for; 0 where there are none."""
    for group, names in facts.groups.items():
        here = [name for name in names if name in values]
        missing = [name for name in names if name not in values]
        if here and missing:
            raise InputError(
                f"{' and '.join(map(repr, here))} without {' and '.join(map(repr, missing))}: a "
                f"call gives all values of {group!r}, or none"
            )
    of_prompts = [name for name in values if facts.types[name].rows == Rows.PROMPTS]
    return max((len(np.asarray(values[name])) for name in of_prompts), default=0)


def _texts(
    facts: Facts, given: Mapping[str, Any], encoded: int
) -> tuple[dict[str, tuple[str, ...]], int]:
    """Return the texts, one for each prompt, and how many prompts there are."""
    if not facts.texts:
        return {}, checked.count(given, "batch_size", 1, checked.MOST_IMAGES)
    lists = {n: checked.strings(n, given[n]) for n in facts.texts if n in given}
    # An empty string beside a text that it falls back to is none, as in diffusers.
    lists = {n: v for n, v in lists.items() if given[n] or facts.texts[n].fallback is None}
    own = [len(v) for n, v in lists.items() if facts.root(n) in facts.required]
    prompts = max(own, default=encoded or 1)
    for name, values in lists.items():
        if len(values) != prompts and not isinstance(given[name], str):
            raise InputError(f"{name!r} has {len(values)} texts for {prompts} prompts")
    texts = {name: values * (prompts // len(values)) for name, values in lists.items()}
    for name, text in facts.texts.items():
        if name not in texts and text.default is not None:
            texts[name] = (text.default,) * prompts
        elif name not in texts and text.fallback in texts:
            texts[name] = texts[text.fallback]
    return texts, prompts


def _shaped(facts: Facts, name: str, value: Any, prompts: int, made: int) -> Array:
    """Return a given value as an array of its type, with a row for what its type says."""
    kind = facts.types[name]
    dtype = np.int64 if kind.integers else np.float32
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"of {array.dtype}")
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name!r} must be an array of numbers: {error}") from None
    wanted = [
        str(each) if each.symbol or (place == 0 and name in facts.stretchable) else each.offset
        for place, each in enumerate(kind.shape)
    ]
    sizes = zip(wanted, array.shape[1:], strict=False)
    if (
        array.ndim != len(wanted) + 1
        or not array.size
        or any(isinstance(size, int) and size != found for size, found in sizes)
    ):
        rest = ", ".join(map(str, wanted))
        raise InputError(f"{name!r} must have the shape [rows, {rest}], not {[*array.shape]}")
    if not np.isfinite(array).all():
        raise InputError(f"{name!r} holds NaN, infinity or numbers beyond {np.dtype(dtype)}")
    return _with_rows(name, array, kind.rows, prompts, made)


def _with_rows(name: str, array: Array, rows: Rows, prompts: int, made: int) -> Array:
    if rows == Rows.PROMPTS:
        if len(array) not in (1, prompts):
            raise InputError(f"{name!r} has {len(array)} rows for {prompts} prompts")
        return array if len(array) == prompts else np.repeat(array, prompts, axis=0)
    if rows == Rows.GIVEN and made % len(array):
        raise InputError(f"{len(array)} latents in {name!r} for {made} images to be made")
    if rows == Rows.IMAGES and len(array) != made:
        raise InputError(f"{name!r} has {len(array)} rows for {made} images")
    return array


def _numbers(facts: Facts, given: Mapping[str, Any]) -> dict[str, tuple[float | str, ...]]:
    """Return all numbers of the program; defaults may be names of sizes."""
    found: dict[str, tuple[float | str, ...]] = {}
    for name, argument in facts.numbers.items():
        if name in given:
            found[name] = _given_numbers(argument, given[name])
        elif argument.fallback is not None:
            found[name] = found[argument.fallback]
        elif argument.default:
            found[name] = argument.default
    return found


def _given_numbers(argument: Numbers, value: Any) -> tuple[float, ...]:
    name = argument.name
    if argument.whole and argument.count == 1:
        values: tuple[float, ...] = (checked.integer(name, value),)
    elif argument.count == 1 and not argument.spread and not isinstance(value, Sequence):
        values = (checked.number(name, value),)
    else:
        values = checked.numbers(name, value, argument.count, argument.spread)
    low = -math.inf if argument.least is None else argument.least
    high = math.inf if argument.most is None else argument.most
    above = -math.inf if argument.above is None else argument.above
    if not all(low <= number <= high and number > above for number in values):
        limits = f"above {above:g}" if argument.above is not None else f"at least {low:g}"
        raise InputError(f"{name!r} must be {limits} and at most {high:g}")
    return values


def _in_pixels(values: Sequence[float | str], sizes: Mapping[str, int]) -> tuple[float, ...]:
    return tuple(float(sizes[v]) if isinstance(v, str) else float(v) for v in values)


def _sizes(
    facts: Facts,
    given: Mapping[str, Any],
    values: Mapping[str, Array],
    pictures: Mapping[str, Sequence[Sequence[Any]]],
) -> Sizes:
    """Return the sizes of a call: as given, else as given arrays have them, else those of the
    call's images, made smaller to what the model can make, else the defaults."""
    program = facts.program
    known = dict(_of_values(facts, values))
    binned = _is_binned(program, given)
    usual, asked = {}, {}
    for place, (name, symbol) in enumerate(facts.symbols.items()):
        spec = program.symbols[symbol]
        if name in given and any(other not in given for other in spec.together):
            raise InputError(
                f"{name!r} alone: diffusers ignores it then, and makes an image of the default "
                f"size; give {' and '.join(spec.together)}, or neither"
            )
        usual[name] = _usual_side(spec, place, pictures)
        default = known[symbol] * spec.unit if symbol in known and not binned else usual[name]
        asked[name] = checked.integer(name, given.get(name, default))
    made, note = dict(asked), ""
    if binned and program.bins is not None:
        height, width = [*asked.values()][:2]
        nearest = nearest_bin(program.bins.sizes, height, width)
        made |= dict(zip(asked, nearest, strict=False))
        note = (
            f"; images of {height} by {width} are made so unless {program.bins.argument}=False is "
            "given"
        )
    for name, symbol in facts.symbols.items():
        made[name] = _checked_side(facts, name, made[name], known.get(symbol), note)
    told = made
    if facts.loop.state.noise in values and not binned:
        told = {name: checked.integer(name, given.get(name, usual[name])) for name in made}
    return Sizes(made, asked, told, resizes=binned and made != asked)


def _usual_side(spec: Symbol, place: int, pictures: Mapping[str, Sequence[Sequence[Any]]]) -> int:
    """Return a side in pixels of a call that does not say it."""
    if spec.of is None or spec.of.image not in pictures:
        return spec.default * spec.unit
    whole = pixels_of(spec.of.image, pictures[spec.of.image][0])[place] * spec.of.times
    step = spec.unit * spec.multiple
    return max(whole // step, 1) * step


def _is_binned(program: Program, given: Mapping[str, Any]) -> bool:
    """Return whether images are made in one of the program's bins, which they are by default."""
    bins = program.bins
    if bins is None:
        return False
    binned = checked.boolean(given, bins.argument, bool(bins.sizes))
    if binned and not bins.sizes:
        raise InputError(
            f"{bins.argument!r}: there is no list of sizes for this model, nor in diffusers; "
            "expected False, or leave it out"
        )
    return binned


def _checked_side(facts: Facts, name: str, pixels: int, known: int | None, note: str) -> int:
    """Return a side as the pipeline makes it.

    Raises:
        InputError: the model cannot make it, or given arrays are for another one; `note` says why
            it is not what the call gave.
    """
    spec = facts.program.symbols[facts.symbols[name]]
    limits = _Limits(spec.unit, spec.multiple, spec.least, spec.most, spec.rounds)
    side = rounded(limits, name, pixels)
    if spec.least == spec.most and side != spec.least * spec.unit:
        raise InputError(
            f"{name} {side}: this bundle was exported for {spec.least * spec.unit} only{note}"
        )
    check_side(limits, name, side)
    if known is not None and side != known * spec.unit:
        raise InputError(
            f"{name} {side} does not fit the given latents, which are for {known * spec.unit}{note}"
        )
    return side


@dataclass(frozen=True)
class _Limits:
    """What sides a program's symbol allows."""

    factor: int
    multiple: int
    minimum: int
    maximum: int | None
    rounds: bool


def _of_values(facts: Facts, values: Mapping[str, Array]) -> list[tuple[str, int]]:
    """Return the symbols that the shapes of given arrays settle."""
    return [
        (each.symbol, (found - each.offset) // each.factor)
        for name, array in values.items()
        for each, found in zip(facts.types[name].shape, array.shape[1:], strict=True)
        if each.symbol is not None
    ]


def _masking(facts: Facts, given: Mapping[str, Any]) -> MaskOptions:
    asked = [name for name in ("mask_blur", "padding_mask_crop") if name in given]
    if asked and not facts.masks:
        raise InputError(f"{' and '.join(map(repr, asked))}: no mask was given")
    blur = checked.number("mask_blur", given.get("mask_blur", 0))
    if not 0 <= blur <= _MOST_BLUR:
        raise InputError(f"'mask_blur' must be at least 0 pixels, and at most {_MOST_BLUR}")
    if "padding_mask_crop" not in given:
        return MaskOptions(blur)
    padding = checked.integer("padding_mask_crop", given["padding_mask_crop"])
    if padding < 0:
        raise InputError(f"'padding_mask_crop' must be at least 0 pixels, not {padding}")
    if given.get("output_type", "pil") != "pil":
        raise InputError("'padding_mask_crop' puts images into others: output_type must be 'pil'")
    return MaskOptions(blur, padding)


def _refuse_unused(
    facts: Facts,
    given: frozenset[str],
    texts: Mapping[str, tuple[str, ...]],
    wanted: Sequence[str],
) -> None:
    """Refuse what no call of these names could need, whatever its numbers are."""
    named = {name for name in given if name not in facts.texts or name in texts}
    could = of_call(facts.program, named, None, wanted)
    for name in sorted(named):
        if not could.needs(name) and name not in facts.symbols:
            raise InputError(f"{name!r} changes nothing in this call: leave it out")


def _refuse_missing(
    facts: Facts,
    demand: Demand,
    given: frozenset[str],
    texts: Mapping[str, tuple[str, ...]],
) -> None:
    for name in sorted(demand.arguments):
        needed = name in facts.images or (name in facts.texts and name not in texts)
        if needed and name not in given:
            raise InputError(f"{name!r} is missing: this call needs it")


def _refuse_two_starts(facts: Facts, given: frozenset[str], numbers: Mapping[str, float]) -> None:
    """Refuse noise beside a clean value that the loop starts from: diffusers' classes mean three
    different things by it. Refuse to go on from latents that are not given."""
    part, state = facts.loop.part, facts.loop.state
    clean = state.clean is not None and holds(state.clean_when, truth_of(given, numbers)) is True
    if clean and state.noise in given:
        raise InputError(f"{state.noise!r} and 'image' are both what to start from: give one")
    if part.start in given and state.clean not in given:
        raise InputError(
            f"{part.start!r} goes on from another run's latents: give them, float32 [images, "
            "channels, height, width] of a call with output_type='latent'"
        )
