"""The statements of programs, as they stand in a manifest.

A program turns the arguments of a call into images: symbols, arguments and statements in
single-assignment form. Names that begin with ``_`` are private; all others are those of diffusers,
and a call can give their values or ask for them. docs/programs.md says what each statement means;
`latentc.runtimes.programs.checker` has the rules.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from latentc.runtimes.strict import Strict

Shape: TypeAlias = tuple[int | str, ...]


class Member(Strict, frozen=True, omit_defaults=True, kw_only=True):
    """A member is a part of a program: what is at its default is not written."""


class SizeOf(Member, frozen=True):
    """The size of an image of the call, `times` enlarged: the default of a size."""

    image: str
    times: int = 1


class Symbol(Member, frozen=True):
    """A size in latents: what the call's argument says, less `offset`, divided by `unit`. That of
    a video of 81 frames is 21, where the unit is 4 and the offset -3.

    A size is a multiple of `multiple`, at least `least`, at most `most` (in latents). `rounds`: any
    other is made smaller, with a warning, instead of refused; with `nearest` it is made the nearest
    one, the smaller of two. `of` is where the default comes from in a call that has the image;
    `default` (in latents) is for the others. A call gives all the sizes that are `together`, or
    none of them.
    """

    argument: str
    unit: int
    default: int
    multiple: int = 1
    least: int = 1
    most: int | None = None
    offset: int = 0
    rounds: bool = False
    nearest: bool = False
    of: SizeOf | None = None
    together: tuple[str, ...] = ()

    def argument_of(self, size: int) -> int:
        """Return what the argument is for a size in latents."""
        return self.unit * size + self.offset


class Text(Member, frozen=True, tag="text", tag_field="kind"):
    """A text, or one for each prompt.

    `default` is what it is in a call without it, `fallback` names the text that it is then (an
    empty string counts as none there). Without either it must be given, unless it is `optional`.
    """

    name: str
    default: str | None = None
    fallback: str | None = None
    optional: bool = False


class Numbers(Member, frozen=True, tag="numbers", tag_field="kind"):
    """`count` numbers; one alone is no list in a call.

    A default is a number, or the name of a size, which stands for its pixels; `fallback` names the
    numbers that it is in a call without it. `least` and `most` may be given, `above` may not.
    `spread`: one number stands for all. `whole`: it is an integer. `rows`: it is one number for
    all prompts, or a list with one for each, and says how many prompts there are in a call without
    texts; it must be given where it has no default.
    """

    name: str
    count: int = 1
    default: tuple[float | str, ...] = ()
    fallback: str | None = None
    optional: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    spread: bool = False
    whole: bool = False
    rows: bool = False


class Image(Member, frozen=True, tag="image", tag_field="kind"):
    """An image, or several; with `count` a list of that many, each of which is one or several.

    `latents` names the value that an array [images, channels, height, width] stands for.
    """

    name: str
    count: int | None = None
    latents: str | None = None


class Mask(Member, frozen=True, tag="mask", tag_field="kind"):
    """A mask, or several: white is what is made anew."""

    name: str


Argument: TypeAlias = Text | Numbers | Image | Mask


class Test(Member, frozen=True):
    """A test holds in a call or not.

    It holds where any of the names in `given` is given; or where the number `argument` is `above`,
    `at_least`, `below` or `at_most` a number.
    """

    given: tuple[str, ...] = ()
    argument: str | None = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None


class Window(Member, frozen=True):
    """Evaluations of a loop: numbers, or names of arguments that hold them.

    Of n evaluations, number i (from 0) is in the window where, by `count`,

    - ``within``: start <= i / n and (i + 1) / n <= stop,
    - ``floor``: int(start * n) <= i < int(stop * n),
    - ``steps``: int(start * steps) <= i < int(stop * steps), of the call's step count,
    - ``timestep``: start <= the evaluation's timestep, as the plan gives it, < stop.

    An argument of several numbers has a window for each column of a value.
    """

    count: Literal["within", "floor", "steps", "timestep"]
    start: float | str = 0.0
    stop: float | str = 1.0


class During(Member, frozen=True):
    """A value that is 0 outside of a window."""

    value: str
    during: Window


Feed: TypeAlias = str | During


class Tokens(Member, frozen=True, tag="tokens", tag_field="do"):
    """Token ids of a text: int64 [rows, length of the tokenizer]. `text` is an argument, which is
    read in the place of the ``{}`` of `template`. With `up_to`, rows are as long as the longest
    that this tokenizer makes in the call, so many ids at most."""

    gives: str
    tokenizer: str
    text: str
    template: str = "{}"
    up_to: int | None = None


class Pixels(Member, frozen=True, tag="pixels", tag_field="do"):
    """An image or a mask of the call in a size, float32 [images, channels, height, width], 0 to 1.

    `item` is the place in an argument that is a list. Images are resized by `resample`, to both
    sides (``stretch``), or cut at both ends of the longer one (``crop``). A mask is 0 or 1: resized
    to the call's image and taken at every so many pixels. Where `fill_where` (a mask of the call)
    is white, an image is `fill`. There is a row for each image that the call gives, and those of
    the first and the second stand in turn where more images are made; `for_prompts`: the call gives
    one image for all prompts or one for each of them, and the rows of a prompt are next to each
    other. `reducing_gap`: an image is made smaller in whole steps before it is resized, as Pillow's
    ``resize`` does with this number.
    """

    gives: str
    of: str
    shape: Shape
    item: int | None = None
    for_prompts: bool = False
    resample: Literal["lanczos", "bilinear", "bicubic"] = "lanczos"
    reducing_gap: float | None = None
    fit: Literal["stretch", "crop"] = "stretch"
    fill: float = 0.5
    fill_where: str | None = None


class NumberRow(Member, frozen=True, tag="numbers", tag_field="do"):
    """Numbers of the call, one after the other: float32 [rows, n]. A number in the place of a name
    is itself. There is a row for the call, or for each prompt where an argument has one."""

    gives: str
    of: tuple[str | float, ...]


class Noise(Member, frozen=True, tag="noise", tag_field="do"):
    """A draw from the call's generators, float32 standard normal, of `shape` for each row.

    There is a row for each image that is made, or for each that the call gives as one of the
    arguments `rows`. `each_made`: where every image that is made has a generator of its own, there
    is a row for each of those. `always`: it is drawn although nothing uses it, as diffusers does.
    """

    gives: str
    shape: Shape
    rows: tuple[str, ...] = ()
    each_made: bool = False
    always: bool = False


class Zeros(Member, frozen=True, tag="zeros", tag_field="do"):
    """Zeros in the form of another value, or one row of them of a shape."""

    gives: str
    like: str | None = None
    shape: tuple[int, ...] = ()


class Run(Member, frozen=True, tag="run", tag_field="do"):
    """A component on named values. `gives`: output → name; `group`: of values that are given
    together. `tiles`: the caller may have it run in tiles."""

    component: str
    feeds: dict[str, str]
    gives: dict[str, str]
    group: str | None = None
    tiles: bool = False


class Join(Member, frozen=True, tag="join", tag_field="do"):
    """Values one after the other along an axis; axis 0 has the rows, and is none of these."""

    gives: str
    of: tuple[str, ...]
    axis: int
    group: str | None = None


class Cut(Member, frozen=True, tag="cut", tag_field="do"):
    """Parts of a value along an axis, of these sizes from its beginning; the reverse of `Join`."""

    gives: tuple[str, ...]
    of: str
    axis: int
    sizes: tuple[int, ...]


class Choose(Member, frozen=True, tag="choose", tag_field="do"):
    """One value where all tests hold, else another one of the same form."""

    gives: str
    when: tuple[Test, ...]
    then: str
    otherwise: str
    group: str | None = None


class Plan(Member, frozen=True):
    """A plan names the sampling plan that a loop follows, by the arguments for scheduler and step
    count.

    `fixed` names instead the bundle's schedule that it follows in every call, which calls are not
    offered.
    """

    scheduler: str = "scheduler"
    steps: str = "num_inference_steps"
    fixed: str | None = None


class Part(Member, frozen=True):
    """The part of a plan that is run; all members name arguments.

    `strength`: the last steps, that share of the step count, which is rounded down or up. `start`
    and `stop`: fractions of the schedule in training timesteps; where `start` is given, it counts
    in the place of the strength, and the clean value is taken as noisy as it is.
    """

    strength: str | None = None
    rounds: Literal["down", "up"] = "down"
    start: str | None = None
    stop: str | None = None


class Keep(Member, frozen=True):
    """A `Keep` says what is put back after each evaluation, as noisy as the state is: where `where`
    is 0, `value` with `noise`; after the last evaluation without.
    """

    value: str
    where: str
    noise: str


class State(Member, frozen=True):
    """A state is what a loop changes.

    It begins with `noise`, or with `clean` and the noise of the start where `clean_when` holds. It
    enters the denoiser as `input`; `prediction` is what comes out.

    `variance` is the output that says what the variance of noise is, for plans that leave it open:
    between -1, their smallest one, and 1, their largest. The base's counts.
    """

    name: str
    noise: str
    clean: str | None = None
    clean_when: tuple[Test, ...] = ()
    input: str = "sample"
    prediction: str = "prediction"
    variance: str | None = None
    keep: Keep | None = None


class Push(Member, frozen=True):
    """Guidance away from the branch that this belongs to, own: the prediction gets
    ``(by - less) * (branch - own)`` more, in the evaluations of `during`. `by` names an
    argument."""

    branch: str
    by: str
    less: float = 0.0
    during: Window | None = None


class Branch(Member, frozen=True):
    """One evaluation of the denoiser for each image, where `when` holds in the call and `during` in
    the step. The one branch that pushes nothing is the base, and always runs."""

    name: str
    feeds: dict[str, Feed]
    when: tuple[Test, ...] = ()
    during: Window | None = None
    push: tuple[Push, ...] = ()


class Cache(Member, frozen=True):
    """Step caching: all but one of `every` evaluations run `component` in the denoiser's place,
    with the outputs that it `keeps` of the last whole evaluation."""

    component: str
    keeps: tuple[str, ...]
    every: str


class Views(Member, frozen=True):
    """Parts of the state that the denoiser is given one after the other: squares of `size`, or as
    large as the state where that is smaller, one every `stride` along both sides. Each makes a step
    of its own, with a state of its own; then what they make is put together, where they overlap as
    the mean, and they are cut from it again."""

    size: int
    stride: int


class Switch(Member, frozen=True):
    """A component that runs in the denoiser's place in the evaluations of a window. It takes and
    gives what the denoiser does."""

    component: str
    during: Window


class Combine(Member, frozen=True):
    """A component that makes the prediction where more branches than the base run. Each of its
    inputs is fed what a branch predicts, or `GUIDED`: what pushes and `rescale` make of these. Its
    output has the name of the denoiser's."""

    component: str
    feeds: dict[str, str]


class Loop(Member, frozen=True, tag="loop", tag_field="do"):
    """A sampling plan over one state or several: gives the names of the states.

    Branches are evaluated in one batch, in their order. The prediction used is that of the base and
    what the others push it by. `rescale` names the argument that says how much of the prediction's
    standard deviation becomes the base's. `other_states` follow the same plan beside the first one,
    which is what a call knows as its latents; the denoiser takes and predicts each of them.
    """

    denoiser: str
    plan: Plan
    state: State
    branches: tuple[Branch, ...]
    other_states: tuple[State, ...] = ()
    switches: tuple[Switch, ...] = ()
    feeds: dict[str, Feed] = msgspec.field(default_factory=dict)
    part: Part = Part()
    combine: Combine | None = None
    rescale: str | None = None
    cache: Cache | None = None
    views: Views | None = None

    @property
    def states(self) -> tuple[State, ...]:
        """Return all states, the first one first."""
        return (self.state, *self.other_states)

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Return the components of which each evaluation runs one."""
        return (self.denoiser, *(switch.component for switch in self.switches))

    def given_side(self, side: int) -> int:
        """Return the side of what the denoiser is given of a state with this side, in latents."""
        return side if self.views is None else min(side, self.views.size)


class Emit(Member, frozen=True, tag="emit", tag_field="do"):
    """An `Emit` gives the caller a result.

    It gives images in the size of the call, [channels, height, width] for each row; or the frames
    of a video, [frames, channels, height, width], `rate` of them in a second where that is known;
    or arrays, a public value as it is, which the caller gets by its name, and which no call gives.
    """

    kind: Literal["images", "frames", "arrays"]
    of: str
    rate: float | None = None


GUIDED = "guided"  # in `Combine.feeds`: no branch has this name


Statement: TypeAlias = (
    Tokens | Pixels | NumberRow | Noise | Zeros | Run | Join | Cut | Choose | Loop | Emit
)


class Bins(Member, frozen=True):
    """The sizes that images are made in: of a call's height and width the one whose ratio of height
    to width is nearest, the first of two alike. Images are resized and cropped to what the call
    asked for afterwards.

    `sizes`: ratio, height and width in pixels; without any there is no such list, and calls may
    only say so. A call turns it off by `argument`.
    """

    argument: str
    sizes: tuple[tuple[float, int, int], ...]


class Program(Member, frozen=True):
    """One kind of call. `stands_for` is the diffusers class that it does the same as.

    The first two symbols are the height and the width of images.
    """

    name: str
    stands_for: str
    symbols: dict[str, Symbol]
    arguments: tuple[Argument, ...]
    steps: tuple[Statement, ...]
    bins: Bins | None = None


def loops_of(program: Program) -> tuple[Loop, ...]:
    """Return the loops of a program."""
    return tuple(step for step in program.steps if isinstance(step, Loop))


def loop_of(program: Program) -> Loop:
    """Return the main loop of a checked program: the last one, which makes what is decoded."""
    return loops_of(program)[-1]


def emit_of(program: Program) -> Emit:
    """Return which images or frames a checked program gives its caller."""
    steps = (step for step in program.steps if isinstance(step, Emit))
    return next(step for step in steps if step.kind != "arrays")


def emitted(program: Program, kind: str) -> tuple[str, ...]:
    """Return the names of the values that a program emits as one kind of result."""
    steps = (step for step in program.steps if isinstance(step, Emit))
    return tuple(step.of for step in steps if step.kind == kind)


def decoding_of(program: Program) -> tuple[Run, ...]:
    """Return the runs that make the images of a checked program of what its loop gives, one after
    the other: each is fed one value, which the one before it gave."""
    makers = {
        name: step
        for step in program.steps
        if isinstance(step, Run) and len(step.feeds) == 1
        for name in step.gives.values()
    }
    name = emit_of(program).of
    runs: list[Run] = []
    while name in makers:
        runs.insert(0, makers.pop(name))
        (name,) = runs[0].feeds.values()
    return tuple(runs)


def names_given(statement: Statement) -> tuple[str, ...]:
    """Return the names of the values that a statement makes."""
    if isinstance(statement, Loop):
        return tuple(state.name for state in statement.states)
    if isinstance(statement, Emit):
        return ()
    if isinstance(statement, Run):
        return tuple(statement.gives.values())
    return statement.gives if isinstance(statement, Cut) else (statement.gives,)


def arguments_of_row(row: NumberRow) -> tuple[str, ...]:
    """Return the names of the arguments whose numbers are in a row."""
    return tuple(each for each in row.of if isinstance(each, str))


def value_of(feed: Feed) -> str:
    """Return the name of the value that feeds an input."""
    return feed if isinstance(feed, str) else feed.value


_DECODER = msgspec.json.Decoder(Program)


def decode(data: bytes | msgspec.Raw) -> Program:
    """Return a program from JSON. Raises msgspec's errors; the checker knows what types cannot."""
    return _DECODER.decode(data)
