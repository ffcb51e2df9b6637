"""Holds what a call gives, checked, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentc.runtimes.arrays import Array
from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.calls.images import Images, MaskOptions, Sizes
from latentc.runtimes.programs.demand import Demand, continues, holds, truth_of
from latentc.runtimes.programs.statements import Emit, Loop, Noise, Pixels, Test
from latentc.runtimes.programs.uses import windows_of_loop
from latentc.runtimes.sampling.torch_generators import TorchGenerator


@dataclass(frozen=True)
class Request:
    """A request holds what a call gives, and what it needs.

    Attributes:
        texts: one for each prompt, by argument; those that the call gives and defaults.
        numbers: by argument, defaults included; `row_numbers`: one for each prompt.
        images: what the call's images became.
        values: arrays that the call gives in the place of what the program would make.
        given: the names of all that the call gives.
        prompts, images_per_prompt: how many.
        seeds: one for the whole batch, or one for each image.
        generators: what noise is drawn from, as many as seeds; none draws from the seeds.
        sizes: in pixels; `symbols`: in latents, by symbol.
        demand: what of the program is needed.
    """

    facts: Facts
    texts: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[float, ...]]
    row_numbers: Mapping[str, tuple[float, ...]]
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
    binning: bool | None = None
    generators: tuple[TorchGenerator, ...] = ()

    @property
    def num_inference_steps(self) -> int:
        """The step count."""
        return self.steps_of(self.facts.loop)

    def steps_of(self, loop: Loop) -> int:
        """Return the step count of a loop."""
        return int(self.number(loop.plan.steps))

    @property
    def scales(self) -> dict[str, float]:
        """The guidance scales."""
        return {name: self.number(name) for name in self.facts.scales}

    def given_texts(self) -> dict[str, tuple[str, ...]]:
        """Return the texts that the call gives, one for each prompt."""
        return {name: texts for name, texts in self.texts.items() if name in self.given}

    def given_numbers(self) -> dict[str, tuple[float, ...]]:
        """Return the numbers that the call gives and graphs are told."""
        told = self.facts.told_numbers
        every = {**self.numbers, **self.row_numbers}
        return {n: v for n, v in every.items() if n in told and n in self.given}

    def image_sizes(self) -> set[tuple[int, int]]:
        """Return width and height of the images that are made: where they are put into others,
        theirs."""
        overlay = self.images.overlay
        if overlay is not None:
            return {image.size for image in overlay.images}
        height, width = self.sizes.image
        return {(width, height)}

    def latents_shape(self) -> tuple[int, ...]:
        """Return the shape of what is denoised: images, then channels, height and width, or what
        else the noise of each has."""
        shape = self.facts.types[self.facts.loop.state.noise].shape
        return (self.made, *(each.value(self.symbols) for each in shape))

    def sample_shape(self) -> tuple[int, ...]:
        """Return the shape of what the denoiser is given of an image: the latents, or a view."""
        channels, *sides = self.latents_shape()[1:]
        return (channels, *(self.facts.loop.given_side(side) for side in sides))

    def settings(self) -> dict[str, Any]:
        """Return what made the images, as JSON-compatible values with the call's names."""
        return {
            **(self._denoising() if self.denoises else {}),
            **self._size_settings(),
            self.facts.several: self.images_per_prompt,
            **self._seed(),
        }

    def _seed(self) -> dict[str, Any]:
        """Return the seed, or one for each image; nothing where a seed does not make the same."""
        if not all(generator.fresh for generator in self.generators):
            return {}
        return {"seed": self.seeds[0] if len(self.seeds) == 1 else [*self.seeds]}

    def _denoising(self) -> dict[str, Any]:
        """Return what made the latents, the seeds aside."""
        numbers = self.given_numbers()
        return {
            **{name: self._setting(name, each) for name, each in self.given_texts().items()},
            **self.scales,
            **self._reading(),
            **self._parts(),
            **self._masking(),
            **{name: v[0] if len(v) == 1 else [*v] for name, v in numbers.items()},
            "num_inference_steps": self.num_inference_steps,
            "scheduler": self.scheduler,
        }

    def _setting(self, name: str, texts: tuple[str, ...]) -> str | list[str]:
        """Return one text alone, unless it is an empty one that counts as given in a list only."""
        alone = len(texts) == 1 and (texts[0] or self.facts.texts[name].fallback is None)
        return texts[0] if alone else [*texts]

    def _reading(self) -> dict[str, Any]:
        reading = {
            "prompt_weighting": (self.prompt_weighting, False),
            "max_embeddings_multiples": (self.max_embeddings_multiples, 1),
        }
        return {name: value for name, (value, usual) in reading.items() if value != usual}

    def _parts(self) -> dict[str, float]:
        """Return what says which evaluations run, and how, where it is not the usual."""
        found = dict[str, float]()
        for loop in self.facts.loops:
            if self.runs(loop):
                found |= self._parts_of(loop)
        return found

    def _parts_of(self, loop: Loop) -> dict[str, float]:
        """Return what says which evaluations of one loop run; the step count of the main one stands
        elsewhere."""
        found: dict[str, float] = {}
        if loop.plan.steps != self.facts.loop.plan.steps:
            found[loop.plan.steps] = self.steps_of(loop)
        bounds = [*windows_of_loop(loop)]
        if any((self.number(name),) != self.facts.numbers[name].default for name in bounds):
            found |= {name: self.number(name) for name in bounds}
        part = loop.part
        if part.start is not None and self.continues(loop):
            found[part.start] = self.number(part.start)
        if part.stop is not None and self.number(part.stop) < 1:
            found[part.stop] = self.number(part.stop)
        if loop.cache is not None and self.number(loop.cache.every) > 1:
            found[loop.cache.every] = int(self.number(loop.cache.every))
        if part.strength is not None:
            found[part.strength] = self.number(part.strength)
        return found

    def _masking(self) -> dict[str, float]:
        made: dict[str, float] = {"mask_blur": self.masking.blur} if self.masking.blur else {}
        if self.masking.padding is not None:
            made["padding_mask_crop"] = self.masking.padding
        return made

    def _size_settings(self) -> dict[str, int | bool]:
        """Return what makes an image of this size again."""
        sides = self.sizes.asked if self.sizes.resizes else self.sizes.made
        bins = self.facts.program.bins
        said = {} if self.binning is None or bins is None else {bins.argument: self.binning}
        return {**sides, **said}

    @property
    def made(self) -> int:
        """Return how many images are made."""
        return self.prompts * self.images_per_prompt

    @property
    def denoises(self) -> bool:
        """Return whether the loop runs: it does unless its result is given, or not needed."""
        return self.runs(self.facts.loop)

    def runs(self, loop: Loop) -> bool:
        """Return whether a loop runs in this call."""
        return self.facts.place_of(loop) in self.demand.live

    @property
    def sized(self) -> bool:
        """Return whether the sizes of images matter to what runs."""
        steps = (self.facts.program.steps[place] for place in self.demand.live)
        return any(isinstance(step, Loop | Pixels | Noise | Emit) for step in steps)

    def number(self, name: str) -> float:
        """Return the value of an argument that is one number."""
        return self.numbers[name][0]

    def continues(self, loop: Loop) -> bool:
        """Return whether a loop goes on from another one's latents in this call."""
        return continues(loop, self.given)

    def holds(self, tests: Sequence[Test]) -> bool:
        """Return whether all tests hold in this call."""
        return holds(tests, truth_of(self.given, singles(self.numbers))) is True


def singles(numbers: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Return the numbers of arguments that are one."""
    return {name: value[0] for name, value in numbers.items() if len(value) == 1}
