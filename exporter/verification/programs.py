"""Every program of a bundle against the diffusers class that it stands for, in PyTorch: before
anything is lowered, and small.

What the engines make of the graphs is for the probes; this is for what is done with them: the
arguments' defaults, the draws of noise and their order, the images' sizes, the branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from latentc.exporter.classes import class_of, of_class
from latentc.exporter.components.description import Description
from latentc.exporter.programs.defaults import takes
from latentc.exporter.progress import Progress
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.verification.eager import pipeline_over
from latentc.exporter.verification.miniature import numbers_of, same_but_for_widths
from latentc.exporter.verification.probe_calls import (
    GUIDANCE,
    images_of,
    lengths_of,
    negatives_of,
    rows_of,
    size_of,
    takes_images,
    texts_of,
)
from latentc.exporter.verification.reference import LARGEST, loop_size, watched
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.rules import LONGEST_REFUSAL
from latentc.runtimes.bundle.structures import ProgramCall, ProgramCheck
from latentc.runtimes.calls.facts import SEVERAL
from latentc.runtimes.errors import ExportError, LatentcError, VerificationError, first_line
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.programs.statements import Numbers, Program, Text, decoding_of, emit_of
from latentc.runtimes.verification.verify import relative_l2

_STEPS = 2
_SEEDS = (20, 21, 22, 23)
_PROMPTS = ("a large red circle", "two small blue squares beside a tree")
_NEGATIVES = ("blurred", "a house with a green roof")
# Numbers: four images of such a model take as long as its export, and are left to a miniature.
_LARGE = 4_000_000_000
# Relative L2. The largest is 2.5e-4, of T2I-Adapters for grey images, whose colours diffusers
# rounds to grey ones of 8 bits; the others are below 2e-5.
LIMIT = 3e-4


@dataclass(frozen=True)
class Shape:
    """A call makes `images` images of each of `prompts` prompts, with a seed for each image or one
    for all, and is given `given` images where it takes any."""

    prompts: int
    images: int
    seeds: tuple[int, ...]
    given: int = 1


SHAPES = (Shape(1, 1, _SEEDS[:1]), Shape(2, 2, _SEEDS))


@dataclass(frozen=True)
class Subject:
    """A pipeline of diffusers, its description, and a manifest with the programs and components of
    that; `miniature`: it stands for a larger one."""

    pipe: Any
    description: Description
    manifest: Manifest
    miniature: bool = False


@dataclass(frozen=True)
class Comparison:
    """One call of a program and of the diffusers class.

    Attributes:
        against: the name of that class.
        latents: relative L2 of what the decoder is given; what it makes of that, probes hold. Of
            the images too where the program does more with them, the larger of the two.
        refused: what diffusers says where it cannot run the call; nothing is compared then.
        miniature: whether it was done on one, not with the source's weights.
    """

    program: Program
    against: str
    shape: Shape
    latents: float = 0.0
    refused: str | None = None
    miniature: bool = False

    def record(self) -> ProgramCall:
        """Return what the manifest says of this call."""
        return ProgramCall(
            prompts=self.shape.prompts,
            images=self.shape.images,
            seeds=self.shape.seeds,
            given=self.shape.given if takes_images(self.program) else 0,
            tolerance=LIMIT,
            relative_l2=None if self.refused is not None else self.latents,
            refused=None if self.refused is None else self.refused[:LONGEST_REFUSAL],
            miniature=self.miniature,
        )


def recorded(comparisons: Sequence[Comparison]) -> tuple[ProgramCheck, ...]:
    """Return what the manifest says of comparisons, by program, in their order."""
    calls: dict[tuple[str, str], list[ProgramCall]] = {}
    for comparison in comparisons:
        calls.setdefault((comparison.program.name, comparison.against), []).append(
            comparison.record()
        )
    return tuple(ProgramCheck(*key, tuple(records)) for key, records in calls.items())


def check_programs(
    pipe: Any,
    description: Description,
    manifest: Manifest,
    root: Path,
    progress: Progress,
    fixed: tuple[int, int] | None = None,
    small: Callable[[], Subject] | None = None,
) -> tuple[Comparison, ...]:
    """Compare every program with its class, in calls of the two shapes. Large images of an export
    with a fixed size are compared in calls of the first; so are large models, and miniatures of
    those in calls of both.

    Args:
        root: where the tokenizers and plans of the manifest stand.
        fixed: height and width in pixels of an export with a fixed size.
        small: makes the miniature of a large model; raises a LatentcError where there is none.

    Warns of calls that the class does not take, and of a miniature that cannot be had.

    Raises:
        VerificationError: one gives something else.
    """
    modules = (graph.module for graph in description.graphs)
    size = fixed or loop_size(description)
    large = numbers_of(modules) > _LARGE
    shapes = SHAPES[:1] if large or max(size) > LARGEST else SHAPES
    source = Subject(pipe, description, manifest)
    comparisons = []
    for comparison in _comparisons(source, root, size, shapes, progress):
        _judge(comparison)
        comparisons.append(comparison)
    if large and small is not None:
        comparisons += _on_miniature(small, comparisons, manifest, root, size, progress)
    return tuple(comparisons)


def _comparisons(
    subject: Subject,
    root: Path,
    size: tuple[int, int],
    shapes: Sequence[Shape],
    progress: Progress,
) -> Iterator[Comparison]:
    """Yield the comparison of every program in calls of every shape, of images of `size`, height
    and width in pixels."""
    several = subject.description.makes_several
    shapes = [shape for shape in shapes if several or len(shape.seeds) == 1]
    modules = {graph.component.name: graph.module for graph in subject.description.graphs}
    what = "a miniature in PyTorch" if subject.miniature else "PyTorch"
    with pipeline_over(root, subject.manifest, modules) as ours:
        for program in subject.manifest.programs:
            for shape in shapes:
                with progress.stage(program.name, f"verify {len(shape.seeds)} images in {what}"):
                    comparison = _compared(subject, ours, program, shape, size)
                yield comparison


def _on_miniature(
    small: Callable[[], Subject],
    done: Sequence[Comparison],
    manifest: Manifest,
    root: Path,
    size: tuple[int, int],
    progress: Progress,
) -> list[Comparison]:
    """Return the comparisons of a miniature's programs, in calls of both shapes; none, and a
    warning, where it is no stand-in for the pipeline of `manifest`.

    Raises:
        VerificationError: one gives something else.
    """
    try:
        subject = small()
        _refuse_other_programs(subject.manifest.programs, manifest.programs)
        comparisons = list(_comparisons(subject, root, size, SHAPES, progress))
        _refuse_broken(comparisons, done)
    except VerificationError:
        raise
    except LatentcError as error:
        warnings.warn(
            f"the programs are held against diffusers in calls of one image only: the model is "
            f"large, and there is no miniature of it: {error}",
            UserWarning,
            stacklevel=3,
        )
        return []
    for comparison in comparisons:
        _judge(comparison)
    return comparisons


def _refuse_other_programs(found: Sequence[Program], wanted: Sequence[Program]) -> None:
    """Refuse a miniature that does something else. Raises ExportError."""
    for one, other in zip_longest(found, wanted):
        if one is None or other is None or not same_but_for_widths(one, other):
            raise ExportError(f"its program {(one or other).name!r} is another one")


def _refuse_broken(comparisons: Sequence[Comparison], done: Sequence[Comparison]) -> None:
    """Refuse a miniature with which diffusers cannot do what it does with the pipeline itself.

    Raises:
        ExportError: naming the call.
    """
    taken = {(each.program.name, each.shape) for each in done if each.refused is None}
    for comparison in comparisons:
        if comparison.refused is not None and (comparison.program.name, comparison.shape) in taken:
            raise ExportError(
                f"diffusers cannot run its {comparison.program.name}: {comparison.refused}"
            )


def _judge(comparison: Comparison) -> None:
    """Warn of a call that the class does not take. Raises VerificationError for another result."""
    program, shape = comparison.program, comparison.shape
    if comparison.refused is not None:
        warnings.warn(
            f"the program {program.name!r} is not held against diffusers in a call of "
            f"{shape.prompts * shape.images} images, which {program.stands_for} does not take: "
            f"{comparison.refused}",
            UserWarning,
            stacklevel=3,
        )
    if comparison.latents > LIMIT:
        where = ", on a miniature of the model" if comparison.miniature else ""
        raise VerificationError(
            f"the program {program.name!r} does not do what {program.stands_for} does in "
            f"diffusers: {shape.prompts} prompts by {shape.images} images{where}, latents "
            f"{comparison.latents:.1e} off, allowed {LIMIT:g}; no bundle was written"
        )


def _compared(
    subject: Subject, ours: Pipeline, program: Program, shape: Shape, size: tuple[int, int]
) -> Comparison:
    pipe, description = subject.pipe, subject.description
    own = program.name == description.program.name
    against = (type(pipe) if own else class_of(pipe, program.name)).__name__
    refused = ""
    for way in _ways(shape):
        arguments = {**_arguments(subject, program, way, size), **_several(program, shape)}
        arguments |= _steps(ours, program)
        try:
            latents = _theirs(pipe, description, program, way, arguments)
        except Exception as error:  # a call that diffusers' class does not take
            refused = refused or first_line(error)
            continue
        if subject.miniature and not np.isfinite(latents).all():
            raise ExportError(f"its random weights give no finite latents in {program.name}")
        shows = len(decoding_of(program)) > 1  # it does more with images than to decode latents
        output_type: Literal["np", "latent"] = "np" if shows else "latent"
        try:
            result = ours(**arguments, seed=_one_or_all(way.seeds), output_type=output_type)
        except LatentcError as error:
            raise VerificationError(
                f"the program {program.name!r} refuses a call that {program.stands_for} takes in "
                f"diffusers: {error}; no bundle was written"
            ) from error
        off = relative_l2(result.latents, latents)
        if shows:
            images = _images_of_theirs(pipe, description, program, way, arguments)
            off = max(off, relative_l2(result.images, images))
        return Comparison(program, against, way, off, None, subject.miniature)
    return Comparison(program, against, shape, 0.0, refused, subject.miniature)


def _ways(shape: Shape) -> Iterator[Shape]:
    """Yield a shape, and what is tried in its place where the diffusers class does not take it:
    one image that all prompts share, one seed for all images."""
    for seeds in dict.fromkeys((shape.seeds, shape.seeds[:1])):
        for given in dict.fromkeys((shape.prompts, 1)):
            yield replace(shape, seeds=seeds, given=given)


def _steps(ours: Pipeline, program: Program) -> dict[str, Any]:
    """Return a step count of which `_STEPS` or more are run at the program's own strength, else the
    largest that there is; and the whole strength, where its own one leaves none of those."""
    numbers = {
        argument.name: argument for argument in program.arguments if isinstance(argument, Numbers)
    }
    strength = float(numbers["strength"].default[0]) if "strength" in numbers else 1.0
    counts = ours.manifest.schedule(ours.scheduler).steps
    enough = [count for count in counts if int(count * strength) >= _STEPS]
    steps = min(enough) if enough else max(counts)
    whole = {} if int(steps * strength) else {"strength": 1.0}
    return {"num_inference_steps": steps, **whole}


def _several(program: Program, shape: Shape) -> dict[str, Any]:
    """Return the arguments that say how many images are made."""
    rows = rows_of(program, shape.prompts * shape.images)
    if rows:
        return rows
    if any(isinstance(argument, Text) for argument in program.arguments):
        return {SEVERAL[emit_of(program).kind]: shape.images}
    return {"batch_size": shape.prompts * shape.images}


def _one_or_all(values: Sequence[Any]) -> Any:
    """Return the one of several seeds or generators that stands for all, or a list of them."""
    return list(values) if len(values) > 1 else values[0]


def _caller(pipe: Any, description: Description, program: Program) -> tuple[Any, Any]:
    """Return the pipeline of the diffusers class that a program stands for, and what runs it."""
    if program.name == description.program.name:
        return pipe, description.call
    other = of_class(pipe, program.name)
    return other, description.calling(other)


def _generated(shape: Shape) -> dict[str, Any]:
    """Return the generators of a call of diffusers'."""
    return {"generator": _one_or_all([torch.Generator().manual_seed(s) for s in shape.seeds])}


def _images_of_theirs(
    pipe: Any,
    description: Description,
    program: Program,
    shape: Shape,
    arguments: Mapping[str, Any],
) -> np.ndarray[Any, Any]:
    """Return the images that diffusers makes."""
    with quiet_loading(), torch.no_grad():
        _, call = _caller(pipe, description, program)
        images: np.ndarray[Any, Any] = call(**arguments, **_generated(shape))
    return images


def _theirs(
    pipe: Any,
    description: Description,
    program: Program,
    shape: Shape,
    arguments: Mapping[str, Any],
) -> np.ndarray[Any, Any]:
    """Return the latents that diffusers makes."""
    given = {**arguments, **_generated(shape)}
    with quiet_loading():
        other, call = _caller(pipe, description, program)
        with watched(other, description.denoiser, description) as seen, torch.no_grad():
            if description.gives_latents:
                held: torch.Tensor = call(output_type="latent", **given)
                return seen.read(held).numpy()
            call(**given)
    assert seen.latents is not None
    return seen.latents.numpy()


def _arguments(
    subject: Subject, program: Program, shape: Shape, size: tuple[int, int]
) -> dict[str, Any]:
    """Return what both are given, but for seeds and counts."""
    description, (height, width) = subject.description, size
    arguments: dict[str, Any] = images_of(program, height, width, shape.given)
    arguments |= lengths_of(program)
    if description.resizable and size_of(program) is None:
        arguments |= {"height": height, "width": width}
    for name, text in texts_of(program).items():
        texts = [text, *_PROMPTS]
        arguments[name] = texts[: shape.prompts] if shape.prompts > 1 else text
    if shape.prompts > 1:  # one of the calls is guided away from a text
        theirs, negatives = class_of(subject.pipe, program.name), [*_NEGATIVES[: shape.prompts]]
        names = (name for name in negatives_of(program) if takes(theirs, name))
        arguments |= dict.fromkeys(names, negatives)
    numbers = {argument.name for argument in program.arguments if isinstance(argument, Numbers)}
    return arguments | {name: value for name, value in GUIDANCE.items() if name in numbers}
