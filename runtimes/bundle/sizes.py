"""Sizes in the user's terms → values of the graphs' symbolic dimensions.

A denoiser call has one row per guidance branch and image, a decoder call one per image; an
encoder gets each distinct text once, an image encoder each image by itself. Heights and widths
are in pixels outside, in latents inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from msgspec.structs import replace

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.checker import types_of
from latentc.runtimes.programs.dimensions import symbolic
from latentc.runtimes.programs.guidance import guidance_of_loop
from latentc.runtimes.programs.latents import Latents, other_sizes
from latentc.runtimes.programs.statements import Program, Run, Symbol, Tokens, loop_of, loops_of
from latentc.runtimes.programs.values import Rows
from latentc.runtimes.unknown_names import suggestion


class Sides(Protocol):
    """A `Sides` says which sizes may be asked for.

    `factor` pixels or frames more are one latent more, and `offset` are there besides; the rest
    counts latents.
    """

    @property
    def factor(self) -> int: ...

    @property
    def multiple(self) -> int: ...

    @property
    def minimum(self) -> int: ...

    @property
    def maximum(self) -> int | None: ...

    @property
    def rounds(self) -> bool: ...

    @property
    def offset(self) -> int: ...

    @property
    def nearest(self) -> bool: ...


@dataclass(frozen=True)
class Limits:
    """Limits say which sizes a program's symbol allows."""

    factor: int
    multiple: int
    minimum: int
    maximum: int | None
    rounds: bool
    offset: int
    nearest: bool

    @classmethod
    def of(cls, symbol: Symbol) -> Limits:
        """Return the limits of a symbol."""
        return cls(
            *(symbol.unit, symbol.multiple, symbol.least, symbol.most),
            *(symbol.rounds, symbol.offset, symbol.nearest),
        )


class Evaluations(Protocol):
    """An `Evaluations` tells how often the denoiser looks at each image in a step: usually, and at
    most.
    """

    @property
    def most(self) -> int: ...

    def evaluations(self, scale: float | None = None) -> int: ...


Span = tuple[int, int, int]  # smallest, usual, largest
Lengths = Mapping[str, Mapping[str, int]]  # of texts in ids, by component and symbol

_LARGEST_SIDE = 1 << 16  # pixels; a bound for memory, where the model has none of its own
_USUAL = 4  # times shorter than the longest texts are usual ones
_LOOPED = ("denoiser", "shallow")  # run in the loop, on the same rows

# What `static` may hold, beside the argument that turns the bundle's guidance on.
STATIC = ("height", "width", "images", "guidance_scale")
BINNING = "use_resolution_binning"  # of calls of a bundle that has bins, and of `static` then


def fixed(manifest: Manifest, static: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """Return for each component the values of its symbols, where every call will have the same
    size.

    Args:
        static: any of `STATIC`, other sizes such as ``num_frames``, and `BINNING` where the bundle
            has bins; what is left out is the bundle's default, one image.

    Encoders get one text at a time: how many of them are distinct is known only in a call.

    Raises:
        InputError: an unknown name, or a size that the model cannot make.
    """
    latents = manifest.latents
    scale = manifest.guidance.scale or STATIC[-1]
    binning = () if latents.bins is None else (BINNING,)
    others = other_sizes(manifest.programs[0])
    arguments = [symbol.argument for symbol in others.values()]
    allowed = tuple(dict.fromkeys((*STATIC, scale, *arguments, *binning)))
    for name in sorted(set(static) - set(allowed)):
        hint = suggestion(name, allowed, "it takes")
        raise InputError(f"'static' has no size {name!r}; {hint}")
    images = int(static.get("images", 1))
    if images < 1:
        raise InputError(f"images must be at least 1, not {images}")
    pixels = (
        int(static.get("height", latents.default_height)),
        int(static.get("width", latents.default_width)),
    )
    if is_binned(latents, static):
        pixels = binned(latents, *pixels)
    sides = {n: side(latents, n, v) for n, v in zip(("height", "width"), pixels, strict=True)}
    for name, symbol in others.items():
        size = static.get(symbol.argument, symbol.argument_of(symbol.default))
        if size != int(size):
            raise InputError(f"'static': {symbol.argument} must be a whole number, not {size:g}")
        sides[name] = side(Limits.of(symbol), symbol.argument, int(size))
    program = manifest.programs[0]
    viewed = {name: loop_of(program).given_side(side) for name, side in sides.items()}
    lengths = text_lengths(manifest.programs, manifest.components)
    inner = {**conditioning_symbols(manifest.components, lengths), **viewed}
    rows: dict[str, int] = {}
    for loop in loops_of(program):
        guidance = guidance_of_loop(program, loop)
        asked_scale = static.get(scale) if guidance.scale == scale else None
        names = (*loop.denoisers, *([loop.cache.component] if loop.cache is not None else []))
        rows |= dict.fromkeys(names, images * guidance.evaluations(asked_scale))
    rows |= dict.fromkeys(_run_on_images(manifest), images)
    values = {
        "encoder": {"batch": 1},
        "denoiser": inner,
        "shallow": inner,
        "decoder": sides | {"batch": images},
        "combiner": sides | {"batch": images},
        "postprocessor": sides | {"batch": images},
        "image_encoder": sides | {"batch": 1},
    }
    return {
        component.name: values[component.role]
        | ({"batch": rows[component.name]} if component.name in rows else {})
        | dict(lengths.get(component.name, {}))
        for component in manifest.components
    }


def _run_on_images(manifest: Manifest) -> set[str]:
    """Return the components that the first program runs on a row for each image that is made,
    outside of its loops."""
    program = manifest.programs[0]
    types = types_of(program, {component.name: component for component in manifest.components})
    runs = (step for step in program.steps if isinstance(step, Run))
    kinds = {run.component: {types[value].rows for value in run.feeds.values()} for run in runs}
    # What looks at images of the call gets one of them at a time.
    return {name for name, own in kinds.items() if Rows.IMAGES in own and Rows.GIVEN not in own}


def ranges(
    components: Iterable[Component],
    latents: Latents,
    guidance: Evaluations,
    spans: Mapping[str, Span],
    lengths: Lengths = MappingProxyType({}),
    others: Mapping[str, Symbol] = MappingProxyType({}),
) -> dict[str, dict[str, Span]]:
    """Return for each component the range of each of its symbols: smallest, usual, largest.

    Args:
        spans: of ``images`` (images in one call), ``height`` and ``width`` (in pixels), and the
            arguments of `others`.
        lengths: see `text_lengths`.
        others: the sizes that are no sides, such as the number of frames, by symbol.

    Raises:
        InputError: a side that the model cannot make.
    """
    everything = list(components)
    inner: dict[str, Span] = {
        name: _triple(side(latents, name, pixels) for pixels in spans[name])
        for name in ("height", "width")
        if name in spans
    }
    for name, symbol in others.items():
        if symbol.argument in spans:
            values = spans[symbol.argument]
            limits = Limits.of(symbol)
            inner[name] = _triple(side(limits, symbol.argument, value) for value in values)
    conditioning = {n: (v, v, 2 * v) for n, v in conditioning_symbols(everything).items()}
    texts = _spans_of_texts(everything, lengths)
    made_of_texts = [conditioning_symbols(everything, text) for text in texts]
    conditioning |= {
        name: _triple((*(each[name] for each in made_of_texts[:2]), 2 * made_of_texts[2][name]))
        for name in made_of_texts[0].keys() - conditioning.keys()
    }
    usually, most = guidance.evaluations(), guidance.most
    range_by_component = {}
    for each in everything:
        common = dict(inner)
        if "images" in spans:
            low, usual, high = spans["images"]
            guided = (low, usually * usual, most * high)
            common["batch"] = guided if each.role in _LOOPED else (low, usual, high)
        of_texts = {n: _triple(e[each.name][n] for e in texts) for n in lengths.get(each.name, {})}
        range_by_component[each.name] = (
            {**conditioning, **common} if each.role in _LOOPED else {**common, **of_texts}
        )
    return range_by_component


def side(latents: Sides, name: str, pixels: int) -> int:
    """Return a size in latents, rounded where the pipeline does that.

    Raises:
        InputError: the model cannot make it.
    """
    pixels = rounded(latents, name, pixels)
    check_side(latents, name, pixels)
    return (pixels - latents.offset) // latents.factor


def rounded(latents: Sides, name: str, pixels: int) -> int:
    """Return a size in pixels or frames as the pipeline makes it: some make it smaller to a
    multiple of what the model needs, or take the nearest one, with a warning, where others refuse
    it."""
    unit = latents.factor * latents.multiple
    beyond = (pixels - latents.offset) % unit
    if not latents.rounds or pixels < unit + latents.offset or not beyond:
        return pixels
    larger = latents.nearest and 2 * beyond > unit
    made = pixels - beyond + (unit if larger else 0)
    warnings.warn(
        f"{name} {pixels} is not {form_of(latents)}: {made} is taken in its place, as diffusers "
        "does",
        UserWarning,
        stacklevel=2,
    )
    return made


def form_of(latents: Sides) -> str:
    """Return what sizes are, in words."""
    unit = latents.factor * latents.multiple
    more = latents.offset % unit
    return f"{more} more than a multiple of {unit}" if more else f"a multiple of {unit}"


def is_binned(latents: Latents, given: Mapping[str, Any]) -> bool:
    """Return whether a call is made in one of the bundle's bins, which it is by default.

    Raises:
        InputError: it is to be, and the bundle has none.
    """
    asked = bool(given.get(BINNING, latents.bins))
    if asked and not latents.bins:
        raise InputError(
            f"{BINNING!r}: there is no list of sizes for a model of {latents.default_height} by "
            f"{latents.default_width} pixels, nor in diffusers; expected False, or leave it out"
        )
    return asked


def binned(latents: Latents, height: int, width: int) -> tuple[int, int]:
    """Return the size of the bin whose ratio is nearest to that of a size in pixels; of two alike
    the first, as ``VaeImageProcessor.classify_height_width_bin`` of diffusers.

    Raises:
        InputError: a side that no image can have.
    """
    return nearest_bin(latents.bins or (), height, width)


def nearest_bin(bins: Sequence[tuple[float, int, int]], height: int, width: int) -> tuple[int, int]:
    """Do what `binned` does, with (ratio of height to width, height, width) of each bin."""
    for name, pixels in (("height", height), ("width", width)):
        if not 1 <= pixels <= _LARGEST_SIDE:
            raise InputError(f"{name} {pixels}: expected 1 to {_LARGEST_SIDE} pixels")
    ratio = height / width
    _, *nearest = min(bins or ((ratio, height, width),), key=lambda each: abs(each[0] - ratio))
    return nearest[0], nearest[1]


def smallest_side(latents: Sides) -> int:
    """Return the smallest size that the model can make, in pixels or frames."""
    least = -(-latents.minimum // latents.multiple) * latents.multiple
    return least * latents.factor + latents.offset


def check_side(latents: Sides, name: str, pixels: int) -> None:
    """Refuse a size, in pixels or frames, that the model cannot make.

    Raises:
        InputError: too large or too small for it, or not a multiple of what it needs.
    """
    unit = latents.factor * latents.multiple
    most = latents.factor * (latents.maximum or _LARGEST_SIDE) + latents.offset
    largest, smallest = min(most, _LARGEST_SIDE), smallest_side(latents)
    if smallest <= pixels <= largest and (pixels - latents.offset) % unit == 0:
        return
    if pixels > largest:
        raise InputError(f"{name} {pixels}: this model makes at most {largest}")
    if latents.minimum > 1 and pixels < smallest:
        raise InputError(f"{name} {pixels}: this model makes at least {smallest}")
    lower = (max(pixels, 0) - latents.offset) // unit * unit + latents.offset
    nearest = [str(each) for each in (lower, lower + unit) if smallest <= each <= largest]
    raise InputError(f"{name} {pixels} is not {form_of(latents)}; nearest: {' or '.join(nearest)}")


def _triple(values: Iterable[int]) -> Span:
    low, usual, high = values
    return low, usual, high


def text_lengths(programs: Iterable[Program], components: Iterable[Component]) -> Lengths:
    """Return how many ids texts become at most, by component and symbol, where rows are as long as
    the longest text of a call."""
    inputs = {component.name: component.inputs for component in components}
    lengths: dict[str, dict[str, int]] = {}
    for program in programs:
        most = {s.gives: s.up_to for s in program.steps if isinstance(s, Tokens) and s.up_to}
        for step in program.steps:
            if not isinstance(step, Run) or step.component not in inputs:
                continue
            for input, value in step.feeds.items():
                dim = inputs[step.component][input].shape[-1]
                if value in most and isinstance(dim, str):
                    found = symbolic(dim)
                    own = lengths.setdefault(step.component, {})
                    own[found.symbol] = (most[value] - found.offset) // found.factor
    return lengths


def of_longest_texts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Return the values of symbols, by component, where every text is as long as any can be."""
    lengths = text_lengths(manifest.programs, manifest.components)
    settled = conditioning_symbols(manifest.components)
    made = conditioning_symbols(manifest.components, lengths)
    looped = {name: value for name, value in made.items() if name not in settled}
    return {
        component.name: {
            **lengths.get(component.name, {}),
            **(looped if component.role in _LOOPED else {}),
        }
        for component in manifest.components
    }


def least_lengths(component: Component) -> dict[str, int]:
    """Return the symbols of a component's token ids, and the least values of which no output has
    an axis of 1 or less."""
    ids = [
        s.shape[1] for s in component.inputs.values() if (s.dtype[:3], len(s.shape)) == ("int", 2)
    ]
    least = {symbolic(dim).symbol: 1 for dim in ids if isinstance(dim, str)}
    for spec in component.outputs.values():
        for factor, name, offset in (symbolic(d) for d in spec.shape if isinstance(d, str)):
            if name in least:
                least[name] = max(least[name], -((offset - 2) // factor))
    return least


def _spans_of_texts(components: Iterable[Component], lengths: Lengths) -> list[Lengths]:
    """Return the lengths of the shortest texts, usual ones and the longest."""
    least = {component.name: least_lengths(component) for component in components}
    usual = {
        name: {symbol: max(least[name][symbol], most // _USUAL) for symbol, most in own.items()}
        for name, own in lengths.items()
    }
    return [{name: least[name] for name in lengths}, usual, lengths]


def conditioning_symbols(
    components: Iterable[Component], lengths: Lengths = MappingProxyType({})
) -> dict[str, int]:
    """Return the symbols of the denoiser's conditioning that an encoder's output settles (its
    length).

    Args:
        lengths: values of the encoders' symbols, see `text_lengths`.
    """
    everything = list(components)
    outputs: dict[str, TensorSpec] = {}
    for component in everything:
        if component.role == "encoder":
            outputs |= fix(component, lengths.get(component.name, {})).outputs
    return {
        wanted: settled
        for component in everything
        if component.role == "denoiser"
        for name, spec in component.inputs.items()
        for wanted, settled in zip(spec.shape, outputs.get(name, spec).shape, strict=False)
        if isinstance(wanted, str) and isinstance(settled, int)
    }


def fix(component: Component, symbols: Mapping[str, int]) -> Component:
    """Return a copy of a component in which some symbols are replaced by numbers."""

    def fixed_spec(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.dtype, tuple(dimension(dim, symbols) for dim in spec.shape))

    return replace(
        component,
        inputs={name: fixed_spec(spec) for name, spec in component.inputs.items()},
        outputs={name: fixed_spec(spec) for name, spec in component.outputs.items()},
    )


def dimension(value: int | str, symbols: Mapping[str, Any]) -> int | str:
    """Return the size that a dimension such as ``"8*height"`` has; itself if its symbol is open."""
    if isinstance(value, int):
        return value
    affine = symbolic(value)
    return affine.value(int(symbols[affine.symbol])) if affine.symbol in symbols else value
