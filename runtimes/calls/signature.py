"""The names of arguments that calls of a bundle take, over all its programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from latentc.runtimes.calls.choices import MASK_OPTIONS, READING
from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.programs.values import Rows


@dataclass(frozen=True)
class Signature:
    """A signature says what calls take; it is made from the programs of a bundle."""

    facts: tuple[Facts, ...]

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The texts that a call must give, and those that fall back to them."""
        return self._texts(required=True)

    @cached_property
    def branch_texts(self) -> tuple[str, ...]:
        """The texts that a call may leave out, such as the negative prompt."""
        return self._texts(required=False)

    def _texts(self, required: bool) -> tuple[str, ...]:
        return _distinct(
            name
            for facts in self.facts
            for name in facts.texts
            if (facts.root(name) in facts.required) == required
        )

    @cached_property
    def embeddings(self) -> tuple[str, ...]:
        """The encoded texts that a call may give in the place of texts."""
        names = [
            (name not in facts.of_base, name)
            for facts in self.facts
            for group in facts.groups.values()
            for name in group
            if facts.types[name].rows == Rows.PROMPTS
        ]
        return _distinct(name for _, name in sorted(names, key=lambda each: each[0]))

    @cached_property
    def scales(self) -> Mapping[str, float]:
        """The guidance scales, and what they are in a call that gives none."""
        found: dict[str, float] = {}
        for facts in self.facts:
            for name in facts.scales:
                default = facts.numbers[facts.root(name)].default
                found.setdefault(name, float(default[0]))
        return found

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Return how many numbers each argument takes that graphs are told of, or that say when."""
        return {
            name: facts.numbers[name].count for facts in self.facts for name in facts.told_numbers
        }

    @cached_property
    def number_names(self) -> tuple[str, ...]:
        """All arguments that are numbers."""
        return _distinct(name for facts in self.facts for name in facts.numbers)

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The arguments that are one number for each prompt."""
        return _distinct(name for facts in self.facts for name in facts.row_numbers)

    @cached_property
    def needed_rows(self) -> Mapping[str, int]:
        """A number in the middle of its limits for each argument that a call must give, one for
        each prompt: any will do for a call whose images nobody looks at."""
        return {
            name: int(((each.least or 0) + (each.most or 0)) / 2)
            for facts in self.facts
            for name, each in facts.row_numbers.items()
            if not each.default
        }

    @cached_property
    def images(self) -> tuple[str, ...]:
        """The images and masks."""
        return _distinct(name for facts in self.facts for name in facts.images)

    @cached_property
    def values(self) -> tuple[str, ...]:
        """The values that a call may ask for, in the order in which programs make them."""
        return _distinct(
            name for facts in self.facts for name in facts.types if name in facts.public
        )

    @cached_property
    def several(self) -> str:
        """The argument that says how many the first program makes of each prompt."""
        return self.facts[0].several

    @cached_property
    def makes_videos(self) -> bool:
        """Return whether the first program gives frames of videos."""
        return self.facts[0].emit.kind == "frames"

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The arguments that are sizes, and what they are in a call that gives none."""
        return {
            symbol.argument: symbol.argument_of(symbol.default)
            for facts in reversed(self.facts)
            for symbol in facts.program.symbols.values()
        }

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every name that a call may use."""
        texts = (*self.texts, *self.branch_texts)
        counted = any(facts.row_numbers for facts in self.facts)  # they say how many images
        reading = (*READING, *self.embeddings) if self.texts else ("batch_size",) * (not counted)
        masks = MASK_OPTIONS if any(facts.masks for facts in self.facts) else ()
        sizes = _distinct(name for facts in self.facts for name in facts.symbols)
        bins = _distinct(f.program.bins.argument for f in self.facts if f.program.bins is not None)
        several = _distinct(facts.several for facts in self.facts)
        starts = _distinct(facts.loop.state.noise for facts in self.facts)
        loops = [loop for facts in self.facts for loop in facts.loops]
        steps = _distinct(loop.plan.steps for loop in loops)
        stops = _distinct(loop.part.stop for loop in loops if loop.part.stop is not None)
        common = (*steps, "scheduler", "seed", "generator", *sizes, *bins, *several, *starts)
        last = (*common, "output_type", *stops)
        own = (*texts, *self.number_names, *self.images, *masks, *reading)
        results = frozenset[str]().union(*(facts.results for facts in self.facts))
        given = (name for name in self.values if name not in results)
        return _distinct((*(name for name in own if name not in last), *last, *given))


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
