"""The structures of a manifest: every member, its type and its default."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import msgspec

from latentc.runtimes.errors import InputError
from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.dimensions import symbolic
from latentc.runtimes.programs.guidance import Guidance, guidance_of
from latentc.runtimes.programs.latents import Latents, latents_of, noise_of
from latentc.runtimes.strict import Strict as _Base

# "shallow": the part of the denoiser that is run with the rest's results of an earlier step.
# "combiner": it makes one prediction of those of several branches.
# "postprocessor": what is run on the images that the decoder made.
Role = Literal[
    "encoder", "denoiser", "shallow", "decoder", "image_encoder", "combiner", "postprocessor"
]


class File(_Base, frozen=True):
    """One file of the bundle: POSIX path relative to the bundle, size in bytes, SHA-256."""

    path: str
    size: int
    sha256: str


class TensorSpec(_Base, frozen=True):
    """dtype (numpy name) and shape; a dimension is a number, ``"name"``, ``"8*name"`` or
    ``"4*name-3"``."""

    dtype: str
    shape: tuple[int | str, ...]

    def check_shape(self, name: str, shape: Sequence[int], symbols: dict[str, int]) -> None:
        """Check `shape`, adding to `symbols` the value of each symbol met for the first time.

        Raises:
            InputError: another rank, another fixed dimension, or a symbol with two values.
        """
        if self.fits(shape, symbols):
            return
        known = f" where {symbols}" if symbols else ""
        raise InputError(
            f"input {name!r}: expected shape {list(self.shape)}{known}, found {list(shape)}"
        )

    def fits(self, shape: Sequence[int], symbols: dict[str, int]) -> bool:
        """Return whether a shape is as declared; this adds to `symbols` as `check_shape` does."""
        return len(shape) == len(self.shape) and all(
            wanted == size or (isinstance(wanted, str) and _fits(size, wanted, symbols))
            for size, wanted in zip(shape, self.shape, strict=True)
        )


class Component(_Base, frozen=True):
    """One graph, the same in every build: its named tensors, and the `role` by which precisions,
    budgets and reports name it; what is run on what, the programs say.

    `positions`: of an output that has a position for each token id of an input, how many of the
    numbers at each position are made of that input, one after the other; by output and input.
    `precision`: what it has unless it is named, where that is not the build's, as what decides by
    thresholds. `jumps`: single values of what it makes may jump where what it is given is a hair
    off, as what is rounded to steps of tens of levels does; the image as a whole may not.
    """

    name: str
    role: Role
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    positions: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    precision: str = ""
    jumps: bool = False


class Check(_Base, frozen=True):
    """One comparison with PyTorch: what was fed, the largest error over the outputs, the limit."""

    subject: str
    probe: str
    relative_l2: float
    max_abs: float
    tolerance: float
    passed: bool


class Loop(_Base, frozen=True):
    """The whole loop against the diffusers pipeline, same seed: error of the final latents
    (relative L2) and of the image (largest difference of 255, PSNR in dB)."""

    scheduler: str
    num_inference_steps: int
    latents_relative_l2: float
    image_max_difference: int
    image_psnr: float
    tolerance: float
    passed: bool


class Score(_Base, frozen=True):
    """A score counts the images of a build that the bundle's judge found right.

    `least` right ones make it pass.
    """

    judge: str
    right: int
    images: int = msgspec.field(name="pictures")  # as format 1 called it
    least: int
    passed: bool


class Verification(_Base, frozen=True):
    """A verification holds what was measured on one build, with which backend, version and device.

    `score` is None where no judge was asked.
    """

    backend: str
    version: str
    device: str
    checks: tuple[Check, ...]
    loop: Loop | None
    score: Score | None = None

    @property
    def passed(self) -> bool:
        whole = [each for each in (self.loop, self.score) if each is not None]
        return all(check.passed for check in (*self.checks, *whole))


class Artifact(_Base, frozen=True):
    """One component lowered to one target. `key` is a digest of all that it depends on.

    `precision` is the component's own, `compute` what the engine is to calculate in where the
    graph does not say it itself ("" leaves it to the graph). `kept` names the weights that were
    left in a higher precision to hold the image's fidelity.
    """

    key: str
    entry: str
    files: tuple[File, ...]
    precision: str
    compute: str = ""
    kept: tuple[str, ...] = ()


class Build(_Base, frozen=True):
    """One target at one precision: an artifact for every component.

    `precision` is what was asked for: one for all, or ``fp32,denoiser=int8`` and the like, with
    the denoiser's passes as in ``fp32+downsampled-attention`` (see
    `latentc.runtimes.bundle.precision`).
    """

    name: str
    target: str
    precision: str
    artifacts: dict[str, Artifact]
    verification: Verification | None = None


class Tokenizer(_Base, frozen=True):
    """A tokenizer.json, and how its texts become rows of `max_length` ids.

    A row is the ids `before`, those of the text, the ids `after`, and `pad` up to its length; of a
    text that is too long the first ids are taken. `expansions`: words that stand for several, which
    are written out before a text is tokenized. `vocabulary`: how many rows the encoder's table of
    embeddings has; ids are below it. `unescape`: before all that, character references of HTML are
    written out, twice.
    """

    name: str
    file: File
    max_length: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int
    expansions: dict[str, str] = msgspec.field(default_factory=dict)
    vocabulary: int | None = None
    unescape: bool = False


class Shift(_Base, frozen=True):
    """A shift says how a scheduler's plans depend on an image's size: latents of height h and width
    w have the shift ``intercept + slope * h * w``.
    """

    intercept: float
    slope: float

    def of(self, height: int, width: int) -> float:
        """Return the shift of latents of this size."""
        return self.intercept + self.slope * height * width


class Schedule(_Base, frozen=True):
    """One scheduler's sampling plans: a file with a PlanTable, or a ZIP file with one for each step
    count where `archive` says so, and the step counts.

    `shift` is there where the table has plans for several. Timesteps count down from
    `num_train_timesteps`. `config` is that of a scheduler which is not made of the pipeline's own,
    in diffusers' terms, as that of `Source` is.
    """

    name: str
    class_name: str
    file: File
    steps: tuple[int, ...]
    key: str
    shift: Shift | None = None
    num_train_timesteps: int = 1000
    archive: bool = False
    config: dict[str, Any] | None = None


class Defaults(_Base, frozen=True):
    """The defaults are what a call without arguments uses."""

    scheduler: str
    num_inference_steps: int


class LoopProbe(_Base, frozen=True):
    """Settings of the reference run whose result is stored among the probes."""

    arguments: dict[str, bool | str | int | float]
    scheduler: str
    num_inference_steps: int
    seed: int
    height: int
    width: int


class JudgeProbe(LoopProbe, frozen=True):
    """Images for a judge (`latentc.runtimes.verification.judges`): the settings of their runs,
    and the prompts; image i has the seed `seed` + i. `right` is how many of the diffusers
    pipeline's images it found right."""

    judge: str
    prompts: tuple[str, ...]
    right: int


class Probes(_Base, frozen=True):
    """Inputs and PyTorch outputs kept for `latentc verify`: one .npz per component and loop."""

    files: dict[str, File]
    loop: LoopProbe | None
    key: str
    judged: JudgeProbe | None = None


class ProgramCall(_Base, frozen=True):
    """One call of a program beside the diffusers class: how many prompts, images of each, seeds
    (one for each image, or one for all), and images that each argument for images was given.

    `relative_l2` is the error of the latents, or `refused` what diffusers says why it does not take
    such a call. `miniature`: the weights were not the source's, but random ones of a pipeline of
    the same classes with fewer and narrower layers.
    """

    prompts: int
    images: int
    seeds: tuple[int, ...]
    given: int
    tolerance: float
    relative_l2: float | None = None
    refused: str | None = None
    miniature: bool = False

    @property
    def passed(self) -> bool:
        """Return whether the latents are within the limit, or there is nothing to compare with."""
        return self.relative_l2 is None or self.relative_l2 <= self.tolerance


class ProgramCheck(_Base, frozen=True):
    """A check says how a program's calls compared with those of a diffusers class, in PyTorch."""

    program: str
    pipeline_class: str
    calls: tuple[ProgramCall, ...]

    @property
    def passed(self) -> bool:
        """Return whether no call was off by more than its limit."""
        return all(call.passed for call in self.calls)


class Ingredient(_Base, frozen=True):
    """An ingredient says what went in beside the source.

    Attributes:
        kind: ``lora``, ``vae``, ``textual-inversion``, ….
        id: Hub id or file name.
        sha256: digest of its content.
        scale: how strongly it was mixed in; None where that does not apply.
        token: the word that it added to the tokenizer; None where it added none.
    """

    kind: str
    id: str
    sha256: str
    scale: float | None = None
    token: str | None = None


class Source(_Base, frozen=True):
    """A source says what was exported: Hub id or folder name, revision, and a digest of its
    content, that of `ingredients` included.

    `scheduler_class` and `scheduler_config` are the pipeline's own scheduler in diffusers'
    terms: more sampling plans can be traced from them without the pipeline. `without` names what
    was left out of it. `licence`, `author` and `base_model` are what the source says of itself, of
    which `fingerprint` knows nothing.
    """

    id: str
    pipeline_class: str
    fingerprint: str
    scheduler_class: str
    scheduler_config: dict[str, Any]
    revision: str | None = None
    ingredients: tuple[Ingredient, ...] = ()
    without: tuple[str, ...] = ()
    licence: str | None = None
    author: str | None = None
    base_model: tuple[str, ...] = ()


class LeftOut(_Base, frozen=True):
    """A part that the pipeline has and the bundle does not: what follows from that, and whether it
    was asked for."""

    name: str
    why: str
    chosen: bool = False


class CreatedBy(_Base, frozen=True):
    """The versions that wrote the bundle."""

    latentc: str
    python: str
    platform: str
    libraries: dict[str, str]


def files_of(
    schedules: Iterable[Schedule], builds: Iterable[Build], probes: Probes | None
) -> Iterator[File]:
    """Yield the files of these parts of a manifest."""
    yield from (schedule.file for schedule in schedules)
    for build in builds:
        for artifact in build.artifacts.values():
            yield from artifact.files
    if probes is not None:
        yield from probes.files.values()


def _fits(found: int, wanted: str, symbols: dict[str, int]) -> bool:
    factor, name, offset = symbolic(wanted)
    value, rest = divmod(found - offset, factor)
    return rest == 0 and value > 0 and symbols.setdefault(name, value) == value


class Document(_Base, frozen=True, dict=True):
    """The whole document.

    `needs` names what a reader must know beyond format 2 of the first day to make the right images
    from it; one that does not know all of them refuses the bundle. `optional` holds sections that
    readers may leave alone, by name; whoever writes the document again keeps them.
    `programs_checked` is empty where an export was told not to verify.
    """

    format_version: int
    programs: tuple[form.Program, ...]
    source: Source
    created_by: CreatedBy
    components: tuple[Component, ...]
    tokenizers: tuple[Tokenizer, ...]
    builds: tuple[Build, ...]
    schedules: tuple[Schedule, ...]
    defaults: Defaults
    probes: Probes | None = None
    programs_checked: tuple[ProgramCheck, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    needs: tuple[str, ...] = ()
    optional: dict[str, Any] = msgspec.field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the document as indented UTF-8 JSON with a final newline."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def files(self) -> Iterator[File]:
        """Yield every file that the manifest vouches for."""
        yield from (tokenizer.file for tokenizer in self.tokenizers)
        yield from files_of(self.schedules, self.builds, self.probes)

    def component(self, role: Role) -> Component:
        """Return the first component of a role."""
        return self.of_role(role)[0]

    def schedule(self, name: str) -> Schedule:
        """Return the schedule of this name; raise StopIteration where there is none."""
        return next(each for each in self.schedules if each.name == name)

    @cached_property
    def fixed_schedules(self) -> frozenset[str]:
        """Return the names of schedules that loops follow in every call."""
        plans = (loop.plan.fixed for program in self.programs for loop in form.loops_of(program))
        return frozenset(name for name in plans if name is not None)

    @property
    def offered(self) -> tuple[Schedule, ...]:
        """Return the schedules that a call may ask for."""
        return tuple(
            schedule for schedule in self.schedules if schedule.name not in self.fixed_schedules
        )

    def of_role(self, role: Role) -> list[Component]:
        """Return the components of a role."""
        return [component for component in self.components if component.role == role]

    @cached_property
    def latents(self) -> Latents:
        """Return the latents and sizes of the first program."""
        return latents_of(self.programs[0])

    @cached_property
    def noise_shape(self) -> form.Shape:
        """Return the shape of what the first program denoises, of one image."""
        return noise_of(self.programs[0]).shape

    @cached_property
    def guidance(self) -> Guidance:
        """Return the branches of the first program, and the scales that they are pushed by."""
        return guidance_of(self.programs[0])

    @property
    def decoding(self) -> tuple[form.Run, ...]:
        """Return the first program's runs that make images of what its loop gives, in order."""
        return form.decoding_of(self.programs[0])

    def sample(self) -> TensorSpec:
        """Return the form of what the denoiser of the first program is given."""
        loop = form.loop_of(self.programs[0])
        (denoiser,) = (
            component for component in self.components if component.name == loop.denoiser
        )
        return denoiser.inputs[loop.state.input]
