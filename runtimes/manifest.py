"""The manifest: the only contract between the exporter and the runtime.

`manifest.json` is decoded into the frozen structures below; msgspec checks every type and
refuses unknown fields, `Manifest.load` checks what types cannot say. The document is
specified for other languages in docs/bundle-format.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from runtimes.errors import BundleError, InputError
from runtimes.files import UnreadableFile, read_regular
from runtimes.parsing import parser
from runtimes.strict import Strict as _Base
from runtimes.tasks import Task

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LARGEST = 16 << 20  # bytes of a manifest; that of a large bundle has some 100,000

# "shallow": the part of the denoiser that is run with the rest's results of an earlier step.
Role = Literal["encoder", "denoiser", "shallow", "decoder", "image_encoder"]


class File(_Base, frozen=True):
    """One file of the bundle: POSIX path relative to the bundle, size in bytes, SHA-256."""

    path: str
    size: int
    sha256: str


class TensorSpec(_Base, frozen=True):
    """dtype (numpy name) and shape; a dimension is a number, ``"name"`` or ``"8*name"``."""

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
        """Whether a shape is as declared; adds to `symbols` as `check_shape` does."""
        return len(shape) == len(self.shape) and all(
            wanted == found or (isinstance(wanted, str) and _fits(found, wanted, symbols))
            for found, wanted in zip(shape, self.shape, strict=True)
        )


class Component(_Base, frozen=True):
    """One graph, the same in every build: its role and its named tensors."""

    name: str
    role: Role
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


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
    (relative L2) and of the picture (largest difference of 255, PSNR in dB)."""

    scheduler: str
    num_inference_steps: int
    latents_relative_l2: float
    image_max_difference: int
    image_psnr: float
    tolerance: float
    passed: bool


class Score(_Base, frozen=True):
    """How many of a build's pictures the bundle's judge found right, of how many; `least` is how
    many it takes to pass."""

    judge: str
    right: int
    pictures: int
    least: int
    passed: bool


class Verification(_Base, frozen=True):
    """What was measured on one build, and with which backend, version and device. `score` is
    None where no judge was asked."""

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
    left in a higher precision to hold the picture's fidelity.
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
    the denoiser's passes as in ``fp32+downsampled-attention`` (see `runtimes.precision`).
    """

    name: str
    target: str
    precision: str
    artifacts: dict[str, Artifact]
    verification: Verification | None = None


class Latents(_Base, frozen=True):
    """The tensor that is denoised.

    `factor` is pixels per latent along a side; latent height and width must be multiples of
    `multiple`, at least `minimum`, and at most `maximum` where the model has a limit; default sizes
    are in pixels. `rounds`: other sizes are made smaller to a multiple, with a warning.
    `bins`: (ratio of height to width, height, width) of the sizes that images are made in unless a
    call says otherwise, in pixels; they are resized to the size that was asked for afterwards.
    Empty: calls take the argument, and there are none for this model. None: they do not take it.
    """

    channels: int
    factor: int
    multiple: int
    default_height: int
    default_width: int
    maximum: int | None = None
    minimum: int = 1
    rounds: bool = False
    bins: tuple[tuple[float, int, int], ...] | None = None


class Tokenizer(_Base, frozen=True):
    """A tokenizer.json and the encoder input that it feeds.

    `texts` names the call arguments that hold the text: the first one given is used. Padding
    and truncation to `max_length` ids are settings of the file itself. `expansions`: words that
    stand for several, which are written out before a text is tokenized. `vocabulary`: how many
    rows the encoder's table of embeddings has; ids are below it.
    """

    file: File
    input: str
    max_length: int
    texts: tuple[str, ...]
    expansions: dict[str, str] = msgspec.field(default_factory=dict)
    vocabulary: int | None = None


class Argument(_Base, frozen=True):
    """A call argument made of numbers; a default is a number, ``"height"`` or ``"width"``.
    `limits`: the smallest and the largest that may be given. `spread`: one number stands for all
    values."""

    name: str
    default: tuple[float | str, ...]
    limits: tuple[float, float] | None = None
    spread: bool = False


class VectorInput(_Base, frozen=True):
    """An input [batch, n] float32 of the denoiser, or of image encoders that have one of its name:
    the listed arguments, one after the other.

    `window`: two arguments of as many values, fractions of the evaluations: in those that are not
    wholly between them the vector's value is 0. `until`: an argument of one value, which makes
    the vector 0 from that fraction of the step count on, rounded down.
    """

    input: str
    arguments: tuple[str, ...]
    window: tuple[str, str] | None = None
    until: str | None = None


class Embedding(_Base, frozen=True):
    """A call argument that takes what encoders make of a text, in the text's place.

    `name` is the argument's, with a branch's prefix before it; `inputs` the encoder outputs, and
    denoiser inputs, that it stands for. With each stand its columns, where position i of it says
    something of token i: the encoder inputs that the tokens are of, and how many numbers each has,
    one after the other.

    The argument's array is its inputs joined along the last axis; with `frame`, an array of so many
    positions and columns that has them one below the other, in its first columns, and zeros
    elsewhere.
    """

    name: str
    inputs: dict[str, dict[str, int]]
    frame: tuple[int, int] | None = None


class Branch(_Base, frozen=True):
    """One pass through the denoiser.

    Its texts and arguments are looked up with `prefix` before their names; where no text is
    given, `missing` says whether the empty string is encoded, all conditioning is zero, or guidance
    is off. Its weight is ``constant + sum(scales[name] * value of the argument name)``.
    """

    name: str
    prefix: str
    missing: Literal["empty", "zeros", "off"]
    constant: float
    scales: dict[str, float] = msgspec.field(default_factory=dict)


class Guidance(_Base, frozen=True):
    """Prediction = sum of branch weights times branch predictions.

    With `scale` set, guidance is on where that argument is above 1, each of `least` at least the
    number given there, and all branches have texts that need them; otherwise the branch `single`
    runs alone with weight 1. `defaults` holds the scale arguments. `rescale` names the one among
    them that says how much of the standard deviation is taken from the branch `single`.
    """

    branches: tuple[Branch, ...]
    single: str
    scale: str | None = None
    defaults: dict[str, float] = msgspec.field(default_factory=dict)
    rescale: str | None = None
    least: dict[str, float] = msgspec.field(default_factory=dict)

    def is_on(self, scales: Mapping[str, float]) -> bool:
        """Whether all branches run, for these values of the scale arguments."""
        if self.scale is None or scales[self.scale] <= 1:
            return False
        return all(scales[name] >= least for name, least in self.least.items())


class Shift(_Base, frozen=True):
    """How the plans of a scheduler depend on the picture's size: its latents of height h and width
    w have the shift ``intercept + slope * h * w``."""

    intercept: float
    slope: float

    def of(self, height: int, width: int) -> float:
        """The shift of latents of this size."""
        return self.intercept + self.slope * height * width


class Schedule(_Base, frozen=True):
    """One scheduler's sampling plans: a PlanTable file and the step counts in it. `shift` is there
    where the table has plans for several. Timesteps count down from `num_train_timesteps`."""

    name: str
    class_name: str
    file: File
    steps: tuple[int, ...]
    key: str
    shift: Shift | None = None
    num_train_timesteps: int = 1000


class Defaults(_Base, frozen=True):
    """What a call without arguments uses."""

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
    """Pictures for a judge (`runtimes.judges`): the settings of their runs, and the prompts;
    picture i has the seed `seed` + i. `right` is how many of the diffusers pipeline's pictures it
    found right."""

    judge: str
    prompts: tuple[str, ...]
    right: int


class Probes(_Base, frozen=True):
    """Inputs and PyTorch outputs kept for `latentc verify`: one .npz per component and loop."""

    files: dict[str, File]
    loop: LoopProbe | None
    key: str
    judged: JudgeProbe | None = None


class Ingredient(_Base, frozen=True):
    """What went in beside the source: its kind (``lora``, ``vae``, ``textual-inversion``), Hub id
    or file name, a digest of its content, how strongly it was mixed in, the word that it added."""

    kind: str
    id: str
    sha256: str
    scale: float | None = None
    token: str | None = None


class Source(_Base, frozen=True):
    """What was exported: Hub id or folder name, revision, and a digest of its content, that of
    `ingredients` included.

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


class Manifest(_Base, frozen=True):
    """The whole document."""

    format_version: int
    tasks: tuple[Task, ...]
    source: Source
    created_by: CreatedBy
    latents: Latents
    tokenizers: tuple[Tokenizer, ...]
    arguments: tuple[Argument, ...]
    vectors: tuple[VectorInput, ...]
    guidance: Guidance
    components: tuple[Component, ...]
    builds: tuple[Build, ...]
    schedules: tuple[Schedule, ...]
    defaults: Defaults
    probes: Probes | None = None
    embeddings: tuple[Embedding, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def load(cls, bundle: Path) -> Manifest:
        """Read and check `bundle`/manifest.json (not the files that it names).

        Raises:
            BundleError: missing, not JSON, an unknown version, or anything inconsistent.
        """
        path = bundle / MANIFEST
        try:
            data = read_regular(path, LARGEST, root=bundle)
        except OSError as error:
            raise BundleError(_not_a_bundle(bundle, error)) from error
        return cls.decode(data, str(path))

    @classmethod
    @parser(BundleError, "origin", "a manifest")
    def decode(cls, data: bytes, origin: str = MANIFEST) -> Manifest:
        """Decode and check the document. Raises BundleError."""
        from runtimes.manifest_rules import problems  # it knows these structures

        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{origin}: format_version {version}, but this latentc reads "
                f"{FORMAT_VERSION}; upgrade latentc or export the bundle again"
            )
        manifest = msgspec.json.decode(data, type=cls)
        problem = next(problems(manifest), None)
        if problem:
            raise BundleError(f"{origin}: {problem}")
        return manifest

    def encode(self) -> bytes:
        """The document as indented UTF-8 JSON with a final newline."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def checked(self) -> bytes:
        """The document, which its own reader takes: for writers.

        Raises:
            BundleError: the reader would refuse it.
        """
        data = self.encode()
        type(self).decode(data, "the manifest that was to be written")
        return data

    def files(self) -> Iterator[File]:
        """Every file that the manifest vouches for."""
        yield from (tokenizer.file for tokenizer in self.tokenizers)
        yield from (schedule.file for schedule in self.schedules)
        for build in self.builds:
            for artifact in build.artifacts.values():
                yield from artifact.files
        if self.probes:
            yield from self.probes.files.values()

    def component(self, role: Role) -> Component:
        """The denoiser or the decoder (there is one of each)."""
        return next(component for component in self.components if component.role == role)

    def schedule(self, name: str) -> Schedule:
        """The sampling plans of this name."""
        return next(each for each in self.schedules if each.name == name)

    def shallow(self) -> Component | None:
        """The denoiser's shallow part, where the bundle has one."""
        return next((each for each in self.components if each.role == "shallow"), None)

    def image_encoders(self) -> list[Component]:
        """What is run on pictures before the first step."""
        return [component for component in self.components if component.role == "image_encoder"]

    def cached(self) -> tuple[str, ...]:
        """The outputs of the denoiser that its shallow part takes in later steps."""
        shallow = self.shallow()
        own = self.component("denoiser").outputs
        return tuple(name for name in own if shallow is not None and name in shallow.inputs)

    def encoders(self) -> list[Component]:
        return [component for component in self.components if component.role == "encoder"]


class _Version(msgspec.Struct):
    format_version: int


def schema() -> dict[str, Any]:
    """The JSON Schema of manifest.json, made from the structures above."""
    return msgspec.json.schema(Manifest)


def parted(dimension: str) -> tuple[int, str]:
    """``"8*height"`` → (8, "height"); of a plain symbol the factor is 1."""
    factor, _, name = dimension.rpartition("*")
    return int(factor or 1), name


def _fits(found: int, wanted: str, symbols: dict[str, int]) -> bool:
    multiple, name = parted(wanted)
    value, rest = divmod(found, multiple)
    return rest == 0 and value > 0 and symbols.setdefault(name, value) == value


def _not_a_bundle(bundle: Path, error: OSError) -> str:
    if isinstance(error, UnreadableFile):
        return f"{bundle / MANIFEST}: {error.strerror}"
    if not os.path.exists(bundle):  # Path.exists raises where no file can have the name
        return f"no bundle at {bundle}: no such folder"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{bundle} is not a bundle: it has no {MANIFEST}"
    return f"{bundle / MANIFEST}: {error.strerror}"
