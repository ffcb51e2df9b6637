"""The sizes of a call: what images are made in, and what they get in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentc.runtimes.arrays import Array
from latentc.runtimes.bundle.sizes import Limits, check_side, nearest_bin, rounded
from latentc.runtimes.calls import values as checked
from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.calls.given_images import size as pixels_of
from latentc.runtimes.calls.images import Sizes
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.statements import Program, Symbol


def sizes_of(
    facts: Facts,
    given: Mapping[str, Any],
    values: Mapping[str, Array],
    images: Mapping[str, Sequence[Sequence[Any]]],
) -> Sizes:
    """Return the sizes of a call: as given, else as given arrays have them, else those of the
    call's images, made smaller to what the model can make, else the defaults."""
    program = facts.program
    known = _of_values(facts, values)
    binned = _is_binned(program, given)
    usual, asked = {}, {}
    for place, (name, symbol) in enumerate(facts.symbols.items()):
        spec = program.symbols[symbol]
        if name in given and any(other not in given for other in spec.together):
            raise InputError(
                f"{name!r} alone: diffusers ignores it then, and makes an image of the default "
                f"size; give {' and '.join(spec.together)}, or neither"
            )
        usual[name] = _usual_side(spec, place, images)
        of_array = symbol in known and not binned
        default = spec.argument_of(known[symbol][0]) if of_array else usual[name]
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
    noise = facts.loop.state.noise
    others = _of_values(facts, {name: each for name, each in values.items() if name != noise})
    if noise in values and not others and not binned:
        told = {name: checked.integer(name, given.get(name, usual[name])) for name in made}
    return Sizes(made, asked, told, resizes=binned and made != asked)


def _usual_side(spec: Symbol, place: int, images: Mapping[str, Sequence[Sequence[Any]]]) -> int:
    """Return a side in pixels of a call that does not say it."""
    if spec.of is None or spec.of.image not in images:
        return spec.argument_of(spec.default)
    whole = pixels_of(spec.of.image, images[spec.of.image][0])[place] * spec.of.times
    step = spec.unit * spec.multiple
    return max(whole // step, 1) * step


def binning_of(facts: Facts, given: Mapping[str, Any]) -> bool | None:
    """Return what the call says of being made in another size, None where it says nothing."""
    bins = facts.program.bins
    return None if bins is None or bins.argument not in given else bool(given[bins.argument])


def _is_binned(program: Program, given: Mapping[str, Any]) -> bool:
    """Return whether images are made in one of the program's bins, which they are by default."""
    bins = program.bins
    if bins is None:
        return False
    binned = checked.boolean(given, bins.argument, bool(bins.sizes))
    if binned and not bins.sizes:
        raise InputError(
            f"{bins.argument!r}: there is no list of sizes for a model of {_default_size(program)}"
            " pixels, nor in diffusers; expected False, or leave it out"
        )
    return binned


def _default_size(program: Program) -> str:
    sides = [str(each.default * each.unit) for each in program.symbols.values()][:2]
    return " by ".join(sides)


def _checked_side(
    facts: Facts, name: str, pixels: int, known: tuple[int, str] | None, note: str
) -> int:
    """Return a side as the pipeline makes it.

    Raises:
        InputError: the model cannot make it, or given arrays are for another one; `note` says why
            it is not what the call gave.
    """
    spec = facts.program.symbols[facts.symbols[name]]
    limits = Limits.of(spec)
    side = rounded(limits, name, pixels)
    only = spec.argument_of(spec.least)
    if spec.least == spec.most and side != only:
        raise InputError(f"{name} {side}: this bundle was exported for {only} only{note}")
    check_side(limits, name, side)
    of_array = None if known is None else spec.argument_of(known[0])
    if known is not None and side != of_array:
        raise InputError(f"{name} {side} does not fit {known[1]!r}, which are for {of_array}{note}")
    return side


def _of_values(facts: Facts, values: Mapping[str, Array]) -> dict[str, tuple[int, str]]:
    """Return the symbols that the shapes of given arrays settle, and which array it is.

    Raises:
        InputError: an array has a size that there is not, or two are of different sizes.
    """
    found: dict[str, tuple[int, str]] = {}
    for name, array in values.items():
        shape = facts.types[name].shape
        for dimension, size in zip(shape, array.shape[1:], strict=True):
            if dimension.symbol is None:
                continue
            side, rest = divmod(size - dimension.offset, dimension.factor)
            if rest or side < 1:
                raise InputError(f"{name!r} has {size} numbers where {dimension} are expected")
            known, other = found.setdefault(dimension.symbol, (side, name))
            if known != side:
                spec = facts.program.symbols[dimension.symbol]
                raise InputError(
                    f"{name!r} is for a {spec.argument} of {spec.argument_of(side)}, and {other!r} "
                    f"for one of {spec.argument_of(known)}"
                )
    return found
