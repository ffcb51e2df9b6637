"""A program being written.

A family and its adapters each add what is theirs, in any order: a `Draft` keeps statements in the
order of their `Phase`, gives values names that nothing has, and knows which branches of the
guidance a value feeds. `Draft.program` is what a manifest holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from typing import Any, Literal

from msgspec import structs

from latentc.exporter.programs.defaults import defaults_of, fitted
from latentc.runtimes.bundle.sizes import BINNING
from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.programs.loops import MOST_STEPS
from latentc.runtimes.programs.statements import Feed, Program, Shape, Statement, Test

STEPS, STRENGTH = "num_inference_steps", "strength"
LATENTS, IMAGE_LATENTS, DENOISED = "latents", "image_latents", "denoised"
DENOISER, DECODER = "denoiser", "vae_decoder"
FRAMES = "frames"
_START, _END = "denoising_start", "denoising_end"
_GUIDANCE_START, _GUIDANCE_STOP = "guidance_start", "guidance_stop"
SIDES = ("height", "width")


class Phase(IntEnum):
    """A phase says where in a program a statement stands."""

    TEXTS = 0  # token ids and encoders
    EMBEDDINGS = 1  # what encoders give, as users know it, and as the denoiser takes it
    NUMBERS = 2
    IMAGES = 3  # images that the denoiser takes as they are
    BEFORE_NOISE = 4  # what is drawn before the latents
    NOISE = 5
    AFTER_NOISE = 6
    BEFORE_LOOP = 7


@dataclass
class Branch:
    """One evaluation of the denoiser for each image. The arguments and values of its `side` have
    that prefix; "" is the side of the prompt. The branch that pushes nothing is the base."""

    name: str
    side: str = ""
    when: tuple[Test, ...] = ()
    pushes: tuple[form.Push, ...] = ()
    feeds: dict[str, Feed] = field(default_factory=dict)


@dataclass
class Start:
    """A start says what a loop begins with besides noise.

    Attributes:
        clean: the value that the noise is added to.
        below_full_strength: it begins with noise alone at strength 1.
        rounds: which way, where the strength is no whole number of steps.
        alone: the image that it is made of has no other use, so that a call can give it, and begin
            anywhere in the schedule.
    """

    clean: str
    below_full_strength: bool = False
    rounds: Literal["down", "up"] = "down"
    alone: bool = False


class Draft:
    """A program being written.

    Attributes:
        name: the task.
        stands_for: the diffusers class that does the same, whose defaults the arguments have.
        latents: what is denoised; may be changed until the program is done.
        size_of: the image whose size a call has that asks for none.
        together: whether a call gives height and width, or none of them.
        rescale: the argument that gives predictions the base's deviation back.
        keep: what is put back after each step.
        variance: the denoiser's output that says what the variance of the noise is.
        views: the parts of the latents that the denoiser is given one after the other.
        other_states: what is denoised beside the latents, of noise that the draft draws.
        switches: components that run in the denoiser's place, and when.
        combine: what makes the prediction of what guided branches predict.
        decoder: the component that makes images of the denoised latents.
        frames: the symbol of the number of latent frames, of videos.
        rate: how many frames are shown in a second, where that is known.
    """

    def __init__(self, name: str, stands_for: type, latents: Latents) -> None:
        self.name = name
        self.stands_for = stands_for
        self.latents = latents
        self.size_of: form.SizeOf | None = None
        self.together = False
        self.rescale: str | None = None
        self.keep: form.Keep | None = None
        self.variance: str | None = None
        self.views: form.Views | None = None
        self.other_states: tuple[form.State, ...] = ()
        self.switches: tuple[form.Switch, ...] = ()
        self.combine: form.Combine | None = None
        self.start: Start | None = None
        self.decoder = DECODER
        self.frames: form.Symbol | None = None
        self.rate: float | None = None
        self.branches: dict[str, Branch] = {}
        self._defaults = defaults_of(stands_for)
        self._texts: dict[str, form.Argument] = {}
        self._images: dict[str, form.Argument] = {}
        self._scales: dict[str, form.Argument] = {}
        self._numbers: dict[str, form.Argument] = {}
        self._statements: list[tuple[int, int, Statement]] = []
        self._names: set[str] = set()
        self._pixels: dict[form.Pixels, str] = {}
        self._zeros: dict[str, str] = {}

    # Names and arguments.

    def named(self, name: str) -> str:
        """Return a name that nothing has yet, and keep it: this one, or with a number."""
        arguments = {*self._texts, *self._images, *self._scales, *self._numbers}
        numbered = (f"{name}_{number}" for number in count(2))
        free = name
        while free in self._names or free in arguments:
            free = next(numbered)
        self._names.add(free)
        return free

    def text(self, text: form.Text) -> None:
        """Declare a text of the call."""
        self._texts.setdefault(text.name, text)

    def image(self, name: str, count: int | None = None, latents: str | None = None) -> str:
        """Declare an image, or a list of `count`; `latents` names the value that an array stands
        for."""
        self._images.setdefault(name, form.Image(name=name, count=count, latents=latents))
        return name

    def mask(self, name: str) -> str:
        """Declare a mask."""
        self._images.setdefault(name, form.Mask(name=name))
        return name

    def images(self) -> tuple[str, ...]:
        """Return the images and masks that a call gives."""
        return tuple(self._images)

    def scale(
        self,
        name: str,
        off: float,
        least: float | None = None,
        most: float | None = None,
        fallback: str | None = None,
    ) -> str:
        """Declare a number that guides; `off` where the class has no default, unless it has a
        `fallback`."""
        default = () if fallback else self._defaults.get(name, (off,))
        number = form.Numbers(name=name, default=default, fallback=fallback, least=least, most=most)
        self._scales.setdefault(name, number)
        return name

    def number(
        self,
        name: str,
        off: Sequence[float | str] = (),
        fallback: str | None = None,
        least: float | None = None,
        most: float | None = None,
        spread: bool = False,
        count: int = 0,
    ) -> str:
        """Declare numbers: as many as `off`, which they are where the class has no default for
        them, or `count` with a `fallback`."""
        default = tuple(off)
        if not fallback:
            own = self._defaults.get(name)
            default = (own and fitted(own, len(off), least, most)) or default
        argument = form.Numbers(
            name=name,
            count=count or len(off),
            default=default,
            fallback=fallback,
            least=least,
            most=most,
            spread=spread,
        )
        self._numbers.setdefault(name, argument)
        return name

    def steps(self, name: str) -> str:
        """Declare the step count of a loop before the main one."""
        default = self._defaults[name]
        steps = form.Numbers(name=name, default=default, least=1, most=MOST_STEPS, whole=True)
        self._numbers.setdefault(name, steps)
        return name

    def row_number(self, name: str, least: float, most: float) -> str:
        """Declare a whole number for each prompt, which a call must give."""
        argument = form.Numbers(name=name, least=least, most=most, whole=True, rows=True)
        self._numbers.setdefault(name, argument)
        return name

    # Branches, and what feeds them.

    def branch(
        self,
        name: str,
        side: str = "",
        when: Sequence[Test] = (),
        *pushes: form.Push,
    ) -> None:
        """Add a branch of the guidance, in the order of a batch."""
        self.branches[name] = Branch(name, side, tuple(when), pushes)

    def sides(self) -> tuple[str, ...]:
        """Return the sides of the branches in their order."""
        return tuple(dict.fromkeys(branch.side for branch in self.branches.values()))

    def feed(self, input: str, value: Feed, to: Callable[[Branch], bool] | None = None) -> None:
        """Feed the denoiser: all branches, or those that `to` says."""
        for branch in self.branches.values():
            if to is None or to(branch):
                branch.feeds[input] = value

    # Statements.

    def add(self, statement: Statement, phase: Phase, rank: int = 0) -> None:
        """Add a statement behind those of its phase and rank."""
        self._statements.append((phase, rank, statement))

    def row(self, name: str, of: Sequence[str | float]) -> str:
        """Add the row of these arguments and numbers, unless it is there, and return its name."""
        for _, _, statement in self._statements:
            if isinstance(statement, form.NumberRow) and statement.of == tuple(of):
                return statement.gives
        row = form.NumberRow(gives=self.named(name), of=tuple(of))
        self.add(row, Phase.NUMBERS)
        return row.gives

    def pixels(self, name: str, of: str, shape: Shape, phase: Phase, **how: Any) -> str:
        """Add an image in a size, unless it is there, and return what it is called.

        Args:
            shape: without the rows.
            how: other members of `Pixels`.
        """
        pixels = form.Pixels(gives="", of=of, shape=tuple(shape), **how)
        if pixels not in self._pixels:
            self._pixels[pixels] = self.named(name)
            self.add(structs.replace(pixels, gives=self._pixels[pixels]), phase)
        return self._pixels[pixels]

    def noise(self, name: str, shape: Shape, phase: Phase, **how: Any) -> str:
        """Add a draw, and return what it is called. `how`: other members of `Noise`."""
        noise = form.Noise(gives=self.named(name), shape=tuple(shape), **how)
        self.add(noise, phase)
        return noise.gives

    def run(
        self,
        component: str,
        feeds: Mapping[str, str],
        gives: Mapping[str, str],
        phase: Phase,
        group: str | None = None,
    ) -> dict[str, str]:
        """Add a run of a component, and return the values by output. `gives`: names by output;
        `group`: of values that are given together."""
        names = {output: self.named(name) for output, name in gives.items()}
        run = form.Run(component=component, feeds=dict(feeds), gives=names, group=group)
        self.add(run, phase)
        return dict(names)

    def zeros_like(self, value: str, phase: Phase) -> str:
        """Add zeros in the form of a value, unless they are there, and return their name."""
        if value not in self._zeros:
            name = self._zeros[value] = self.named(f"_no_{value.lstrip('_')}")
            self.add(form.Zeros(gives=name, like=value), phase)
        return self._zeros[value]

    # The whole.

    def program(self) -> Program:
        """Return the program."""
        axes = SIDES if self.frames is None else (FRAMES, *SIDES)
        self.noise(LATENTS, (self.latents.channels, *axes), Phase.NOISE)
        ordered = sorted(self._statements, key=lambda placed: placed[:2])
        bins = self.latents.bins
        output = "image" if self.frames is None else FRAMES
        made = self.named(f"_{output}")
        decode = form.Run(
            component=self.decoder, feeds={"latents": DENOISED}, gives={output: made}, tiles=True
        )
        kind: Literal["images", "frames"] = "images" if self.frames is None else "frames"
        return Program(
            name=self.name,
            stands_for=self.stands_for.__name__,
            symbols=self._symbols(),
            arguments=tuple(self._arguments()),
            steps=(
                *(statement for _, _, statement in ordered),
                self._loop(),
                decode,
                form.Emit(kind=kind, of=made, rate=self.rate),
            ),
            bins=None if bins is None else form.Bins(argument=BINNING, sizes=bins),
        )

    def _arguments(self) -> Iterator[form.Argument]:
        yield from self._texts.values()
        yield from self._images.values()
        yield from self._scales.values()
        if self._scales:
            yield form.Numbers(name=_GUIDANCE_START, default=(0.0,), least=0.0, most=1.0)
            yield form.Numbers(name=_GUIDANCE_STOP, default=(1.0,), least=0.0, most=1.0)
        steps = self._defaults[STEPS]
        yield form.Numbers(name=STEPS, default=steps, least=1, most=MOST_STEPS, whole=True)
        if self.start is not None:
            strength = self._defaults.get(STRENGTH, (1.0,))
            yield form.Numbers(name=STRENGTH, default=strength, above=0, most=1)
            if self.start.alone:
                yield form.Numbers(name=_START, optional=True, above=0, most=1)
        yield form.Numbers(name=_END, default=(1.0,), above=0, most=1)
        yield from self._numbers.values()

    def _symbols(self) -> dict[str, form.Symbol]:
        latents = self.latents
        defaults = {"height": latents.default_height, "width": latents.default_width}
        sides = {
            name: form.Symbol(
                argument=name,
                unit=latents.factor,
                default=default // latents.factor,
                multiple=latents.multiple,
                least=latents.minimum,
                most=latents.maximum,
                rounds=latents.rounds,
                of=self.size_of,
                together=SIDES if self.together else (),
            )
            for name, default in defaults.items()
        }
        return sides if self.frames is None else {**sides, FRAMES: self.frames}

    def _loop(self) -> form.Loop:
        start, shared = self.start, self._shared()
        below = start is not None and start.below_full_strength
        return form.Loop(
            denoiser=DENOISER,
            plan=form.Plan(),
            state=form.State(
                name=DENOISED,
                noise=LATENTS,
                clean=start.clean if start else None,
                clean_when=(Test(argument=STRENGTH, below=1.0),) if below else (),
                variance=self.variance,
                keep=self.keep,
            ),
            branches=tuple(self._branches(shared)),
            feeds=shared,
            part=form.Part(
                strength=STRENGTH if start else None,
                rounds=start.rounds if start else "down",
                start=_START if start and start.alone else None,
                stop=_END,
            ),
            other_states=self.other_states,
            switches=self.switches,
            combine=self.combine,
            rescale=self.rescale,
            views=self.views,
        )

    def _shared(self) -> dict[str, Feed]:
        """Return the feeds that are the same in all branches."""
        first, *others = [branch.feeds for branch in self.branches.values()]
        return {
            name: value
            for name, value in first.items()
            if others and all(other.get(name) == value for other in others)
        }

    def _branches(self, shared: Mapping[str, Feed]) -> Iterator[form.Branch]:
        during = form.Window(count="floor", start=_GUIDANCE_START, stop=_GUIDANCE_STOP)
        for branch in self.branches.values():
            yield form.Branch(
                name=branch.name,
                feeds={name: v for name, v in branch.feeds.items() if name not in shared},
                when=branch.when,
                during=during if branch.pushes else None,
                push=branch.pushes,
            )
