"""This module checks what a program must keep to.

The one that writes a bundle and all that read it use this checker.

Its work grows as the program does: every statement is looked at once, and every name is looked up
in a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from math import prod
from typing import TypeAlias

from latentc.runtimes.errors import BundleError
from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.dimensions import LARGEST, Dimension, parse
from latentc.runtimes.programs.graphs import Graph
from latentc.runtimes.programs.loops import is_number, loop_problems, loop_types
from latentc.runtimes.programs.statements import Image, Mask, Numbers, Program, Statement, Text
from latentc.runtimes.programs.uses import arguments_used, tests_of, values_used
from latentc.runtimes.programs.values import Rows, Type, fits, met, type_of

MOST_STATEMENTS = 256
MOST_ARGUMENTS = 64
MOST_SYMBOLS = 16
MOST_LOOPS = 8
MOST_BINS = 1024
MOST_AXES = 8  # of a tensor
_LARGEST = 1 << 20
_MOST_NUMBERS = 1 << 28  # in a row of a value, at the default size
_NAME = re.compile(r"_?[a-z][a-z0-9_]{0,63}\Z")
_WIDEST_GAP = 16
_CHANNELS = (1, 3, 4)  # of images: grey, RGB, RGB and alpha
_AXES = {
    "images": ("channels", "height", "width"),
    "frames": ("frames", "channels", "height", "width"),
}
_FASTEST = 1000  # frames in a second
_LARGEST_NUMBER = 1e9
_LONGEST_TEMPLATE = 1 << 12  # characters around a text
CALL_WIDE = ("scheduler",)  # arguments of every program, which none declares

Graphs: TypeAlias = Mapping[str, Graph]


def problems(program: Program, graphs: Graphs) -> Iterator[str]:
    """Yield what is wrong with a program, one sentence each; what comes after the first may follow
    from it.

    Args:
        graphs: the bundle's components by name.
    """
    yield from _too_many(program)
    yield from _Checker(program, graphs).problems()


def types_of(program: Program, graphs: Graphs) -> Mapping[str, Type]:
    """Return the types of a program's values.

    Raises:
        BundleError: the program does not keep to the rules; the message says where.
    """
    checker = _Checker(program, graphs)
    problem = next(chain(_too_many(program), checker.problems()), None)
    if problem is not None:
        raise BundleError(f"program {program.name!r}: {problem}")
    return checker.types


def _too_many(program: Program) -> Iterator[str]:
    counts = {
        "statements": (len(program.steps), MOST_STATEMENTS),
        "arguments": (len(program.arguments), MOST_ARGUMENTS),
        "symbols": (len(program.symbols), MOST_SYMBOLS),
    }
    for what, (count, most) in counts.items():
        if count > most:
            yield f"{count} {what}: expected at most {most}"


class _Checker:
    """One check of one program."""

    def __init__(self, program: Program, graphs: Graphs) -> None:
        self.program = program
        self.graphs = graphs
        self.arguments = {argument.name: argument for argument in program.arguments}
        self.sizes = {each.argument: name for name, each in program.symbols.items()}
        self.types: dict[str, Type] = {}
        self.used: set[str] = set()
        self.drawn: set[str] = set()

    def problems(self) -> Iterator[str]:
        """Yield what is wrong."""
        yield from self._whole_problems()
        yield from self._name_problems()
        yield from self._symbol_problems()
        yield from self._argument_problems()
        for place, statement in enumerate(self.program.steps):
            found = list(chain(self._statement_problems(statement), self._size_problems(statement)))
            for problem in found:
                yield f"statement {place + 1} ({statement.__struct_config__.tag}): {problem}"
            if found:
                return  # what follows would only say that its values have no type
        yield from self._latents_problems()
        yield from self._unused()

    def _name_problems(self) -> Iterator[str]:
        names = [argument.name for argument in self.program.arguments]
        names += [symbol.argument for symbol in self.program.symbols.values()]
        names += [name for step in self.program.steps for name in form.names_given(step)]
        known: set[str] = set(CALL_WIDE)
        for name in names:
            if not _NAME.match(name):
                yield f"bad name {name!r}"
            if name in known:
                yield f"two things are named {name!r}"
            known.add(name)
        if self.program.bins is not None:
            yield from self._bin_problems(self.program.bins)
        for name in (*self.arguments, *self.sizes):
            if name.startswith("_"):
                yield f"the argument {name!r} is private"

    def _bin_problems(self, bins: form.Bins) -> Iterator[str]:
        if not _NAME.match(bins.argument) or bins.argument in (*self.arguments, *self.sizes):
            yield f"bins: bad name {bins.argument!r}"
        if len(bins.sizes) > MOST_BINS or len(self.sizes) < 2:
            yield f"{len(bins.sizes)} bins for {len(self.sizes)} sizes: expected two, {MOST_BINS}"
        if not all(1 <= side <= _LARGEST for _, *sides in bins.sizes for side in sides):
            yield f"bins: expected sides from 1 to {_LARGEST}"

    def _symbol_problems(self) -> Iterator[str]:
        for name, symbol in self.program.symbols.items():
            if parse(name) != Dimension(0, 1, name):
                yield f"bad symbol {name!r}"
            numbers = (symbol.unit, symbol.default, symbol.multiple, symbol.least)
            most = _LARGEST if symbol.most is None else symbol.most
            if not all(1 <= number <= most <= _LARGEST for number in numbers[1:]):
                yield f"symbol {name!r}: expected default, multiple and least from 1 to {most}"
            elif not 1 <= symbol.unit <= _LARGEST or symbol.default < symbol.least:
                yield f"symbol {name!r}: bad unit, or a default below the least"
            elif symbol.argument_of(symbol.least) < 1 or abs(symbol.offset) > _LARGEST:
                yield f"symbol {name!r}: an offset of {symbol.offset}, of which nothing is left"
            elif symbol.nearest and not symbol.rounds:
                yield f"symbol {name!r}: the nearest size, and none is rounded"
            elif symbol.default % symbol.multiple or (symbol.most or 0) % symbol.multiple:
                yield f"symbol {name!r}: expected multiples of {symbol.multiple}"
            if symbol.of is not None:
                if not isinstance(self.arguments.get(symbol.of.image), Image | Mask):
                    yield f"symbol {name!r}: {symbol.of.image!r} is no image of the call"
                if not 1 <= symbol.of.times <= 64:
                    yield f"symbol {name!r}: {symbol.of.times} times an image, expected 1 to 64"
            if not set(symbol.together) <= self.sizes.keys():
                yield f"symbol {name!r}: together with {sorted(symbol.together)}, no sizes"

    def _argument_problems(self) -> Iterator[str]:
        earlier: dict[str, form.Argument] = {}
        for argument in self.program.arguments:
            if isinstance(argument, Text):
                yield from self._text_problems(argument, earlier)
            elif isinstance(argument, Numbers):
                yield from self._number_problems(argument, earlier)
            elif isinstance(argument, Image) and not _is_list(argument.count):
                yield f"image {argument.name!r}: a list of {argument.count}"
            earlier[argument.name] = argument
        texts = [each for each in self.program.arguments if isinstance(each, Text)]
        left_out = (e.optional or e.default is not None or e.fallback is not None for e in texts)
        if texts and all(left_out):
            yield "no text that a call must give: how many images it makes, that text says"

    def _text_problems(self, text: Text, earlier: Mapping[str, form.Argument]) -> Iterator[str]:
        ways = (text.default is not None, text.fallback is not None, text.optional)
        if sum(ways) > 1:
            yield f"text {text.name!r}: a default, a fallback or optional, not several of them"
        if text.fallback is not None and not isinstance(earlier.get(text.fallback), Text):
            yield f"text {text.name!r}: its fallback {text.fallback!r} is no text before it"

    def _number_problems(
        self, numbers: Numbers, earlier: Mapping[str, form.Argument]
    ) -> Iterator[str]:
        ways = (bool(numbers.default), numbers.fallback is not None, numbers.optional)
        if numbers.rows:
            yield from _row_problems(numbers)
        elif sum(ways) != 1:
            yield f"numbers {numbers.name!r}: expected a default, a fallback or optional"
        if numbers.default and len(numbers.default) != numbers.count:
            yield f"numbers {numbers.name!r}: {len(numbers.default)} defaults for {numbers.count}"
        if not 1 <= numbers.count <= MOST_ARGUMENTS:
            yield f"numbers {numbers.name!r}: {numbers.count} of them"
        for value in numbers.default:
            if isinstance(value, str) and value not in self.sizes:
                yield f"numbers {numbers.name!r}: the default {value!r} is no size"
        yield from _limit_problems(numbers)
        fallback = earlier.get(numbers.fallback or "")
        if numbers.fallback is not None and (
            not isinstance(fallback, Numbers)
            or fallback.count != numbers.count
            or fallback.optional
            or fallback.rows
        ):
            yield f"numbers {numbers.name!r}: its fallback {numbers.fallback!r} is none before it"

    def _statement_problems(self, statement: Statement) -> Iterator[str]:
        for name in arguments_used(statement):
            if name not in self.arguments and name not in CALL_WIDE:
                yield f"no argument {name!r}"
                return
        for name in values_used(statement):
            if name not in self.types:
                yield f"no value {name!r} before it"
                return
        for test in tests_of(statement):
            yield from self._test_problems(test)
        self.used.update(arguments_used(statement), values_used(statement))
        yield from self._own_problems(statement)

    def _size_problems(self, statement: Statement) -> Iterator[str]:
        """Check that what a statement gives has a size in every call, and fits into a memory in one
        that asks for none."""
        least = {name: each.least for name, each in self.program.symbols.items()}
        usual = {name: each.default for name, each in self.program.symbols.items()}
        for name in form.names_given(statement):
            if name not in self.types:
                return  # what is wrong with it has been said
            shape = self.types[name].shape
            if any(each.value(least) < 1 for each in shape):
                yield f"{name!r} is {self.types[name]}: nothing at the least size"
            elif prod(each.value(usual) for each in shape) > _MOST_NUMBERS:
                yield f"{name!r} is {self.types[name]}: more than {_MOST_NUMBERS} numbers"

    def _own_problems(self, statement: Statement) -> Iterator[str]:
        """Check what a statement does, and note the types of what it gives."""
        match statement:
            case form.Tokens():
                yield from self._tokens(statement)
            case form.Pixels():
                yield from self._pixels(statement)
            case form.NumberRow():
                yield from self._number_row(statement)
            case form.Noise():
                yield from self._noise(statement)
            case form.Zeros():
                yield from self._zeros(statement)
            case form.Run():
                yield from self._run(statement)
            case form.Join():
                yield from self._join(statement)
            case form.Cut():
                yield from self._cut(statement)
            case form.Choose():
                yield from self._choose(statement)
            case form.Loop():
                for state in statement.states:
                    if state.noise not in self.drawn:
                        yield f"{state.noise!r} is not drawn: no noise to begin with"
                yield from loop_problems(
                    statement, self.graphs, self.types, self.arguments, self.program.symbols
                )
                self.types |= loop_types(statement, self.types)
            case form.Emit():
                yield from self._emit(statement)

    def _test_problems(self, test: form.Test) -> Iterator[str]:
        limits = (test.above, test.at_least, test.below, test.at_most)
        compares = test.argument is not None and sum(limit is not None for limit in limits) == 1
        if bool(test.given) == compares or (test.given and any(e is not None for e in limits)):
            yield "a test must say `given`, or an argument and one limit"
            return
        for name in test.given:
            if name not in self.arguments and name not in self.types and name not in self.sizes:
                yield f"a test of {name!r}, which nothing is named"
            elif name.startswith("_"):
                yield f"a test whether {name!r} is given, which is private"
        self.used.update(test.given)
        if test.argument is not None:
            argument = self.arguments.get(test.argument)
            if not is_number(argument) or not isinstance(argument, Numbers) or not argument.default:
                yield f"a test of {test.argument!r}, which is no number, or has no default"

    def _shape(self, shape: form.Shape) -> tuple[Dimension, ...] | None:
        if len(shape) >= MOST_AXES:
            return None
        parsed = [parse(each) for each in shape]
        known = [
            each
            for each in parsed
            if each is not None and (each.symbol is None or each.symbol in self.program.symbols)
        ]
        return tuple(known) if len(known) == len(shape) else None

    def _tokens(self, tokens: form.Tokens) -> Iterator[str]:
        if not isinstance(self.arguments[tokens.text], Text):
            yield f"{tokens.text!r} is no text"
        if tokens.template.count("{}") != 1 or len(tokens.template) > _LONGEST_TEMPLATE:
            yield (
                f"a template of {len(tokens.template)} characters: expected one '{{}}', and at "
                f"most {_LONGEST_TEMPLATE}"
            )
        if tokens.up_to is not None and not 1 <= tokens.up_to <= _LARGEST:
            yield f"texts of up to {tokens.up_to} ids"
        # How long a text is, the tokenizer says: the graph that takes it has the number, where
        # there is but one.
        most = () if tokens.up_to is None else (Dimension(tokens.up_to),)
        self.types[tokens.gives] = Type(True, most, Rows.PROMPTS)

    def _pixels(self, pixels: form.Pixels) -> Iterator[str]:
        argument, shape = self.arguments[pixels.of], self._shape(pixels.shape)
        if not isinstance(argument, Image | Mask):
            yield f"{pixels.of!r} is no image and no mask"
            return
        channels = 3 if isinstance(argument, Image) else 1
        if shape is None or len(shape) != 3 or shape[0] != Dimension(channels):
            yield f"expected a shape [{channels}, height, width], found {list(pixels.shape)}"
            return
        count = argument.count if isinstance(argument, Image) else None
        if (pixels.item is None) != (count is None) or not 0 <= (pixels.item or 0) < (count or 1):
            yield f"item {pixels.item} of {pixels.of!r}, which holds {count or 'no list'}"
        gap = pixels.reducing_gap
        if gap is not None and (not 1 <= gap <= _WIDEST_GAP or pixels.fit == "crop"):
            yield f"a reducing gap of {gap:g}: expected 1 to {_WIDEST_GAP}, and no crop"
        if pixels.fill_where is not None:
            if not isinstance(self.arguments[pixels.fill_where], Mask):
                yield f"{pixels.fill_where!r} is no mask"
            if not 0 <= pixels.fill <= 1 or isinstance(argument, Mask):
                yield "expected an image, and a fill from 0 to 1"
        rows = Rows.PROMPTS if pixels.for_prompts else Rows.GIVEN
        self.types[pixels.gives] = Type(False, shape, rows)

    def _number_row(self, row: form.NumberRow) -> Iterator[str]:
        count, rows = 0, Rows.CALL
        for name in row.of:
            if not isinstance(name, str):
                count += 1
                if abs(name) > _LARGEST_NUMBER:
                    yield f"the number {name:g}: expected up to {_LARGEST_NUMBER:g}"
                continue
            argument = self.arguments[name]
            if not isinstance(argument, Numbers):
                yield f"{name!r} holds no numbers"
                return
            if argument.optional:
                yield f"{name!r} holds no numbers in calls without it"
            count += argument.count
            rows = Rows.PROMPTS if argument.rows else rows
        if not row.of:
            yield "no numbers"
        self.types[row.gives] = Type(False, (Dimension(count),), rows)

    def _noise(self, noise: form.Noise) -> Iterator[str]:
        shape = self._shape(noise.shape)
        if not shape:
            yield f"bad shape {list(noise.shape)}"
            return
        for name in noise.rows:
            if not isinstance(self.arguments[name], Image | Mask):
                yield f"rows of {name!r}, which is no image of the call"
        if noise.always:
            self.used.add(noise.gives)
        self.drawn.add(noise.gives)
        rows = Rows.GIVEN if noise.rows else Rows.IMAGES
        self.types[noise.gives] = Type(False, shape, rows)

    def _zeros(self, zeros: form.Zeros) -> Iterator[str]:
        right = len(zeros.shape) < MOST_AXES and all(1 <= each <= LARGEST for each in zeros.shape)
        if (zeros.like is None) != bool(zeros.shape) or not right:
            yield f"expected another value, or a shape: 1 to {MOST_AXES - 1} sizes up to {LARGEST}"
            return
        if zeros.like is not None:
            self.types[zeros.gives] = self.types[zeros.like]
        else:
            shape = tuple(Dimension(each) for each in zeros.shape)
            self.types[zeros.gives] = Type(False, shape, Rows.CALL)

    def _run(self, run: form.Run) -> Iterator[str]:
        graph = self.graphs.get(run.component)
        if graph is None:
            yield f"no component {run.component!r}"
            return
        if run.feeds.keys() != graph.inputs.keys():
            yield f"{run.component!r} takes {sorted(graph.inputs)}, not {sorted(run.feeds)}"
            return
        unknown = run.gives.keys() - graph.outputs.keys()
        if unknown or not run.gives:
            yield f"{run.component!r} gives {sorted(graph.outputs)}, not {sorted(unknown)}"
            return
        symbols: dict[str, Dimension] = {}
        for name, value in run.feeds.items():
            yield from self._feed(run.component, name, value, symbols)
        if run.tiles and (len(run.feeds), len(run.gives)) != (1, 1):
            yield f"{run.component!r} in tiles: expected one input and one output"
        rows = met(self.types[value].rows for value in run.feeds.values())
        for output, name in run.gives.items():
            made = type_of(graph.outputs[output], symbols, rows)
            if made is None:
                yield f"the shape of {run.component!r}'s {output!r} does not follow from its inputs"
                made = Type(False, (), rows)
            self.types[name] = made

    def _feed(
        self, component: str, name: str, value: str, symbols: dict[str, Dimension]
    ) -> Iterator[str]:
        wanted, own = self.graphs[component].inputs[name], self.types[value]
        if own.integers and not own.shape and len(wanted.shape) == 2:
            dimension = parse(wanted.shape[1])  # token ids: the tokenizer pads to this length
            if dimension is not None and dimension.symbol is None:
                own = Type(True, (dimension,), own.rows)
        if not fits(own, wanted, symbols):
            yield (
                f"{component!r} takes {wanted.dtype} {list(wanted.shape)} as {name!r}, not {own} "
                f"({value})"
            )

    def _join(self, join: form.Join) -> Iterator[str]:
        types, place = [self.types[name] for name in join.of], join.axis - 1
        ranks = {len(each.shape) for each in types}
        if not types or len(ranks) > 1 or not 0 <= place < len(types[0].shape):
            yield f"values of {sorted(ranks)} axes beside the rows, along axis {join.axis}"
            return
        rest = {each.shape[:place] + each.shape[place + 1 :] for each in types}
        if len(rest) > 1 or len({each.integers for each in types}) > 1:
            yield f"{', '.join(join.of)} differ in more than axis {join.axis}"
            return
        along = [each.shape[place] for each in types]
        if any(each.symbol is not None for each in along):
            yield f"the sizes along axis {join.axis} must be numbers"
        total = Dimension(sum(each.offset for each in along))
        first = types[0].shape
        shape = (*first[:place], total, *first[place + 1 :])
        self.types[join.gives] = Type(types[0].integers, shape, met(kind.rows for kind in types))

    def _cut(self, cut: form.Cut) -> Iterator[str]:
        whole, place = self.types[cut.of], cut.axis - 1
        if len(cut.gives) != len(cut.sizes) or not cut.sizes:
            yield f"{len(cut.sizes)} sizes for {len(cut.gives)} values"
            return
        if not 0 <= place < len(whole.shape) or whole.shape[place].symbol is not None:
            yield f"{cut.of!r} cannot be cut along axis {cut.axis}"
            return
        if min(cut.sizes) < 1 or sum(cut.sizes) > whole.shape[place].offset:
            yield f"the sizes {list(cut.sizes)} of {whole.shape[place]}"
        for name, size in zip(cut.gives, cut.sizes, strict=True):
            shape = (*whole.shape[:place], Dimension(size), *whole.shape[place + 1 :])
            self.types[name] = Type(whole.integers, shape, whole.rows)

    def _choose(self, choose: form.Choose) -> Iterator[str]:
        then, otherwise = self.types[choose.then], self.types[choose.otherwise]
        if not choose.when:
            yield "no test"
        if not then.same_form(otherwise):
            yield f"{choose.then!r} is {then}, and {choose.otherwise!r} {otherwise}"
        self.types[choose.gives] = Type(then.integers, then.shape, met((then.rows, otherwise.rows)))

    def _emit(self, emit: form.Emit) -> Iterator[str]:
        """Check what is emitted."""
        if emit.rate is not None and not (emit.kind == "frames" and 0 < emit.rate <= _FASTEST):
            yield f"{emit.rate:g} in a second: expected frames, and up to {_FASTEST} of them"
        if emit.kind in _AXES:
            yield from self._emitted_images(emit)
        elif emit.of.startswith("_"):
            yield f"{emit.of!r} is private: the caller could not ask for it by its name"
        elif not any(
            isinstance(step, form.Run) and not step.group and emit.of in step.gives.values()
            for step in self.program.steps
        ):
            yield f"{emit.of!r} is not what a component gives by itself, in no group"

    def _emitted_images(self, emit: form.Emit) -> Iterator[str]:
        """Check that what is emitted are images or frames of the size that the call asks for, since
        those of another size would be none that were asked for; and that they are made of what the
        loop gives by one component after the other, which decode latents by themselves."""
        value = self.types[emit.of]
        sides = [*self.program.symbols.items()][:2]
        wanted = [str(_pixels_of(name, symbol)) for name, symbol in sides]
        axes = len(_AXES[emit.kind])
        right = (
            value.rows == Rows.IMAGES
            and not value.integers
            and len(value.shape) == axes
            and value.shape[-3] in map(Dimension, _CHANNELS)
            and all(
                _is_side(own, name, symbol)
                for own, (name, symbol) in zip(value.shape[-2:], sides, strict=True)
            )
        )
        if not right:
            yield (
                f"{emit.of!r} is {value} for {value.rows}: no {emit.kind}; expected floats "
                f"[{', '.join(_AXES[emit.kind])}] of {_CHANNELS} channels, and "
                f"{' by '.join(wanted)}"
            )
        if emit.kind == "frames" and self.program.bins is not None:
            yield "frames, and bins, which are for images"
        if not self._is_decoded(emit.of):
            yield f"{emit.of!r} is not what components of one input make of what the loop gives"

    def _is_decoded(self, name: str) -> bool:
        """Return whether a value is what components of one input each make, one after the other, of
        what the loop gives."""
        loops = form.loops_of(self.program)[-1:]
        denoised = {made for loop in loops for made in form.names_given(loop)}
        feeds = {
            made: tuple(step.feeds.values())
            for step in self.program.steps
            if isinstance(step, form.Run)
            for made in step.gives.values()
        }
        places = len(self.program.steps)
        while name in feeds and len(feeds[name]) == 1 and places:
            (name,), places = feeds[name], places - 1
            if name in denoised:
                return True
        return False

    def _whole_problems(self) -> Iterator[str]:
        """Check what a program must have, whatever it does."""
        if len(self.program.symbols) < 2:
            yield "expected two symbols or more, first those of the height and the width"
        loops = len(form.loops_of(self.program))
        if not 1 <= loops <= MOST_LOOPS:
            yield f"{loops} statements 'loop': expected 1 to {MOST_LOOPS}"
        shown = [name for kind in _AXES for name in form.emitted(self.program, kind)]
        if len(shown) != 1:
            yield f"{len(shown)} statements 'emit images' or 'emit frames': expected one"
        arrays = form.emitted(self.program, "arrays")
        if len({*arrays}) < len(arrays):
            yield "an array is emitted twice"

    def _latents_problems(self) -> Iterator[str]:
        """Yield what is wrong with the values that arrays in the place of images stand for."""
        for argument in self.program.arguments:
            if not isinstance(argument, Image) or argument.latents is None:
                continue
            kind = self.types.get(argument.latents)
            named = f"image {argument.name!r}: {argument.latents!r}"
            if kind is None or argument.latents.startswith("_"):
                yield f"{named} is no value that a call can give"
            elif kind.integers or len(kind.shape) != 3 or kind.shape[0].symbol is not None:
                yield f"{named} is {kind}: no latents"

    def _unused(self) -> Iterator[str]:
        """Yield values and arguments that nothing uses."""
        falls_back = {
            argument.fallback
            for argument in self.program.arguments
            if isinstance(argument, Text | Numbers) and argument.fallback is not None
        }
        of_sizes = {
            symbol.of.image for symbol in self.program.symbols.values() if symbol.of is not None
        }
        used = self.used | falls_back | of_sizes
        for step in self.program.steps:
            names = form.names_given(step)
            # A public value may be asked for.
            if names and all(each.startswith("_") and each not in used for each in names):
                yield f"nothing uses {names[0]!r}"
        for name in self.arguments:
            if name not in used:
                yield f"nothing uses the argument {name!r}"


def _is_side(own: Dimension, name: str, symbol: form.Symbol) -> bool:
    """Return whether a dimension is a side in pixels: in symbols, or a number where there is only
    one size."""
    only = symbol.default if symbol.least == symbol.most else None
    return own == _pixels_of(name, symbol) or (
        own.symbol is None and only is not None and own.offset == symbol.argument_of(only)
    )


def _pixels_of(name: str, symbol: form.Symbol) -> Dimension:
    """Return what the argument of a symbol is, as a dimension."""
    return Dimension(symbol.offset, symbol.unit, name)


def _is_list(count: int | None) -> bool:
    """Return whether an image may be a list of so many; None is no list, and may be."""
    return count is None or 1 <= count <= MOST_ARGUMENTS


def _row_problems(numbers: Numbers) -> Iterator[str]:
    """Yield what is wrong with an argument of one number for each prompt."""
    if numbers.count != 1 or numbers.fallback is not None or numbers.optional or numbers.spread:
        yield (
            f"numbers {numbers.name!r} for each prompt: expected one, with a default or none; not "
            "spread, optional or with a fallback"
        )
    if any(isinstance(value, str) for value in numbers.default):
        yield f"numbers {numbers.name!r} for each prompt: a default that is a size"


def _limit_problems(numbers: Numbers) -> Iterator[str]:
    """Yield what is wrong with the limits of an argument, and with defaults that are not within
    them: a call that gives the same number would be refused."""
    bounds = [each for each in (numbers.least, numbers.above, numbers.most) if each is not None]
    defaults = [each for each in numbers.default if not isinstance(each, str)]
    if any(abs(each) > _LARGEST_NUMBER for each in (*bounds, *defaults)):
        yield f"numbers {numbers.name!r}: expected numbers from -{_LARGEST_NUMBER:g} to as much"
    least = max((each for each in (numbers.least, numbers.above) if each is not None), default=None)
    if least is not None and numbers.most is not None and least > numbers.most:
        yield f"numbers {numbers.name!r}: no number from {least:g} to {numbers.most:g}"
    for value in defaults:
        inside = (
            (numbers.least is None or value >= numbers.least)
            and (numbers.above is None or value > numbers.above)
            and (numbers.most is None or value <= numbers.most)
        )
        if not inside or (numbers.whole and value != int(value)):
            yield f"numbers {numbers.name!r}: the default {value:g} may not be given"
