"""A program with all that is known of it before any call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.checker import types_of
from latentc.runtimes.programs.demand import Demand, of_call
from latentc.runtimes.programs.graphs import Graph
from latentc.runtimes.programs.guidance import scale_arguments
from latentc.runtimes.programs.lengths import stretchable
from latentc.runtimes.programs.statements import Emit, Image, Loop, Mask, Numbers, Program, Text
from latentc.runtimes.programs.uses import components_of, feeds_of, windows_of_feeds
from latentc.runtimes.programs.values import Rows, Type

# diffusers' names of the argument that says how many are made of each prompt, by what is emitted.
SEVERAL: Mapping[str, str] = {
    "images": "num_images_per_prompt",
    "frames": "num_videos_per_prompt",
}
# Of a component's output: which of its last axis' numbers say something of which input's ids.
Positions = Mapping[str, Mapping[str, Mapping[str, int]]]


@dataclass(frozen=True)
class Facts:
    """A checked program.

    Attributes:
        types: of its values, by name.
        graphs: the bundle's components.
        positions: component → output → ids input → how many of the numbers at each position are
            made of that input, one after the other.
    """

    program: Program
    types: Mapping[str, Type]
    graphs: Mapping[str, Graph]
    positions: Positions

    @classmethod
    def of(cls, program: Program, graphs: Mapping[str, Graph], positions: Positions) -> Facts:
        """Check a program and return what follows from it. Raises BundleError."""
        return cls(program, types_of(program, graphs), graphs, positions)

    @cached_property
    def loop(self) -> Loop:
        """The program's main loop."""
        return form.loop_of(self.program)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops of the program, the main one last."""
        return form.loops_of(self.program)

    @cached_property
    def emit(self) -> Emit:
        """Return what the program gives its caller."""
        return form.emit_of(self.program)

    @cached_property
    def several(self) -> str:
        """The name of the argument that says how many are made of each prompt."""
        return SEVERAL[self.emit.kind]

    @cached_property
    def texts(self) -> Mapping[str, Text]:
        """The arguments that are texts, by name."""
        return {each.name: each for each in self.program.arguments if isinstance(each, Text)}

    @cached_property
    def numbers(self) -> Mapping[str, Numbers]:
        """The arguments that are numbers, by name."""
        return {each.name: each for each in self.program.arguments if isinstance(each, Numbers)}

    @cached_property
    def row_numbers(self) -> Mapping[str, Numbers]:
        """The arguments that are one number for each prompt, by name."""
        return {name: each for name, each in self.numbers.items() if each.rows}

    @cached_property
    def images(self) -> Mapping[str, Image | Mask]:
        """The arguments that are images or masks, by name."""
        arguments = self.program.arguments
        return {each.name: each for each in arguments if isinstance(each, Image | Mask)}

    @cached_property
    def masks(self) -> tuple[str, ...]:
        """The names of the masks."""
        return tuple(name for name, each in self.images.items() if isinstance(each, Mask))

    @cached_property
    def symbols(self) -> Mapping[str, str]:
        """The symbol of each size, by the name of the argument."""
        return {each.argument: name for name, each in self.program.symbols.items()}

    @cached_property
    def results(self) -> frozenset[str]:
        """The values that a call gives back by their names, which it cannot be given."""
        return frozenset(form.emitted(self.program, "arrays"))

    @cached_property
    def public(self) -> frozenset[str]:
        """The values that a call can give or ask for."""
        return frozenset(name for name in self.types if not name.startswith("_"))

    @cached_property
    def loop_place(self) -> int:
        """The place of the program's main loop among its statements."""
        return self.place_of(self.loop)

    def place_of(self, loop: Loop) -> int:
        """Return the place of a loop among the program's statements."""
        return next(place for place, step in enumerate(self.program.steps) if step is loop)

    @cached_property
    def stretchable(self) -> frozenset[str]:
        """The encoded texts that may be of several chunks."""
        return stretchable(self.program, self.graphs)

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The names of values that a call gives together or not at all, by group."""
        found: dict[str, tuple[str, ...]] = {}
        for step in self.program.steps:
            group = getattr(step, "group", None)
            if group is not None:
                public = tuple(n for n in form.names_given(step) if n in self.public)
                found[group] = (*found.get(group, ()), *public)
        return found

    @cached_property
    def of_base(self) -> frozenset[str]:
        """The values that the base branch needs, whatever else runs."""
        return self.demand_of_base(()).values

    def demand_of_base(self, given: Collection[str]) -> Demand:
        """Return what the base branch needs of a call that gives these arguments. Every number
        counts as minus infinity, for which no guidance scale turns another branch on."""
        return of_call(self.program, given, dict.fromkeys(self.numbers, float("-inf")))

    @cached_property
    def usual_components(self) -> frozenset[str]:
        """The components that may run in a call of what it must give and nothing besides."""
        given = (*self.required, *self.images, *self.row_numbers)
        steps = [self.program.steps[at] for at in of_call(self.program, given, None).live]
        return frozenset(name for step in steps for name in components_of(step))

    @cached_property
    def encoded(self) -> frozenset[str]:
        """The values with a row for each image that stand for all texts that a call must give: what
        a loop before the main one made of them, say."""
        made = (n for n in self.public & self.of_base if self.types[n].rows == Rows.IMAGES)
        texts = {*self.required}
        return frozenset(
            name
            for name in made
            if texts and not texts & self.demand_of_base(self._together(name)).arguments
        )

    def _together(self, name: str) -> tuple[str, ...]:
        """Return a value and those that are given with it."""
        return next((names for names in self.groups.values() if name in names), (name,))

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The texts that a call must give, unless it gives what is made of them."""
        texts = self.texts.values()
        return tuple(
            each.name
            for each in texts
            if each.default is None and each.fallback is None and not each.optional
        )

    @cached_property
    def tokens(self) -> Mapping[str, form.Tokens]:
        """The statements that make token ids, by the name of what they give."""
        steps = self.program.steps
        return {step.gives: step for step in steps if isinstance(step, form.Tokens)}

    @cached_property
    def encoders(self) -> tuple[form.Run, ...]:
        """The runs on token ids alone."""
        return tuple(
            step
            for step in self.program.steps
            if isinstance(step, form.Run)
            and step.feeds
            and self.tokens.keys() >= {*step.feeds.values()}
        )

    @cached_property
    def chunked(self) -> frozenset[str]:
        """The encoders that may read a text in chunks."""
        return frozenset(run.component for run in self.encoders if self.sequences(run))

    def sequences(self, run: form.Run) -> tuple[str, ...]:
        """Return the outputs of a run on token ids that can be joined of several chunks: what has
        a position for each id, where what takes it takes any number of them."""
        graph = self.graphs[run.component]
        if any(self.tokens[value].up_to is not None for value in run.feeds.values()):
            return ()  # a text is as long as it is
        lengths = {graph.inputs[name].shape[1] for name in run.feeds}
        outputs = tuple(name for name, value in run.gives.items() if value in self.stretchable)
        return outputs if {graph.outputs[name].shape[1] for name in outputs} == lengths else ()

    @cached_property
    def shortened(self) -> Mapping[str, tuple[form.Tokens, int]]:
        """The encoded texts that are as long as the longest text of a call: what makes their ids,
        and how many ids more than positions they have."""
        found: dict[str, tuple[form.Tokens, int]] = {}
        for run in self.encoders:
            outputs = self.graphs[run.component].outputs
            for value in run.feeds.values():
                tokens = self.tokens[value]
                for output, name in run.gives.items():
                    shape = outputs[output].shape
                    if tokens.up_to is not None and len(shape) > 1 and isinstance(shape[1], str):
                        found[name] = tokens, tokens.up_to - self.types[name].shape[0].offset
        return found

    @cached_property
    def scales(self) -> tuple[str, ...]:
        """The arguments that branches push by, and those that rescale what comes of it."""
        used = {name for loop in self.loops for name in scale_arguments(loop)}
        return tuple(name for name in self.numbers if name in used)

    @cached_property
    def told_numbers(self) -> tuple[str, ...]:
        """The arguments whose numbers graphs are told, and those of windows of such numbers."""
        found: list[str] = []
        for step in self.program.steps:
            if isinstance(step, form.NumberRow):
                found += form.arguments_of_row(step)
            if isinstance(step, Loop):
                found += windows_of_feeds(feed for _, feed in feeds_of(step))
        return tuple(dict.fromkeys(found))

    def root(self, argument: str) -> str:
        """Return the text, or the numbers, that one falls back to in the end."""
        own: Text | Numbers = self.texts.get(argument) or self.numbers[argument]
        fallback = own.fallback
        return argument if fallback is None else self.root(fallback)
