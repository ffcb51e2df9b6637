"""This module holds what a manifest must keep to beyond its types (docs/bundle-format.md).

What programs must keep to, `latentc.runtimes.programs.checker` says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import PurePosixPath

from latentc.runtimes.bundle.structures import (
    Component,
    Document,
    File,
    ProgramCall,
    Source,
    TensorSpec,
    Tokenizer,
)
from latentc.runtimes.programs import checker
from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.checker import MOST_AXES
from latentc.runtimes.programs.uses import components_run

DTYPES = ("float32", "float16", "int64", "int32")
_DIMENSION = re.compile(r"(?:([1-9]\d{0,3})\*)?([a-z][a-z_]{0,31})(?:[+-][1-9]\d{0,5})?\Z")
LONGEST_TEXT = 1 << 16  # ids
LONGEST_SAID = 200  # characters of what a source says of itself
MOST_BASE_MODELS = 32
_MOST_WORDS = 1 << 31  # graphs may take ids as int32
_LARGEST_NUMBER = 1 << 20  # of a size, in whatever unit
_MOST_PROGRAMS = 16
_MOST_NEEDS = 64
_MOST_CALLS = 16  # of a program beside diffusers …
_MOST_OF_A_CALL = 64  # … and prompts, images of each, and images given
LONGEST_REFUSAL = 300  # characters of what diffusers says
_LARGEST_INTEGER = 1 << 53  # in magnitude: what every reader of JSON holds exactly
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_DEVICE = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}\Z")  # names a file while it is written


def problems(manifest: Document) -> Iterator[str]:
    """Yield what is inconsistent, one sentence each (used lazily: the first one is reported)."""
    for file in manifest.files():
        yield from _file_problems(file)
    yield from _source_problems(manifest.source)
    yield from _component_problems(manifest)
    yield from _build_problems(manifest)
    yield from _tokenizer_problems(manifest)
    yield from _program_problems(manifest)
    yield from _record_problems(manifest)
    yield from _duplicates("schedule", [schedule.name for schedule in manifest.schedules])
    for schedule in manifest.schedules:
        yield from _name_problems("schedule", schedule.name)
        yield from _key_problems(schedule.key)
    if manifest.probes is not None:
        yield from _key_problems(manifest.probes.key)
    yield from _plan_problems(manifest)
    if manifest.defaults.scheduler not in {schedule.name for schedule in manifest.offered}:
        yield f"defaults.scheduler {manifest.defaults.scheduler!r} is not among the schedules"
    if not 1 <= manifest.defaults.num_inference_steps <= _LARGEST_NUMBER:
        yield f"defaults.num_inference_steps must be from 1 to {_LARGEST_NUMBER}"


def _source_problems(source: Source) -> Iterator[str]:
    """Yield what is too long: what a source says of itself comes from strangers, and is shown in a
    line.
    """
    said = {"licence": (source.licence,), "author": (source.author,)}
    for name, texts in {**said, "base_model": source.base_model}.items():
        longest = max((len(text or "") for text in texts), default=0)
        if longest > LONGEST_SAID:
            yield f"source.{name} has {longest} characters, more than {LONGEST_SAID}"
    if len(source.base_model) > MOST_BASE_MODELS:
        yield f"source.base_model names {len(source.base_model)}, more than {MOST_BASE_MODELS}"


def _component_problems(manifest: Document) -> Iterator[str]:
    yield from _duplicates("component", [component.name for component in manifest.components])
    for component in manifest.components:
        for name, spec in [*component.inputs.items(), *component.outputs.items()]:
            if spec.dtype not in DTYPES:
                yield f"{component.name}.{name}: dtype {spec.dtype!r} is not one of {DTYPES}"
            if len(spec.shape) > MOST_AXES:
                yield f"{component.name}.{name}: {len(spec.shape)} axes, at most {MOST_AXES}"
            for dimension in spec.shape:
                if not is_dimension(dimension):
                    yield f"{component.name}.{name}: bad dimension {dimension!r}"
        for output, columns in component.positions.items():
            yield from _position_problems(component, output, columns)


def _position_problems(
    component: Component, output: str, columns: Mapping[str, int]
) -> Iterator[str]:
    """Check that an output has, for each id of an input, the numbers that are said to be of it."""
    made = component.outputs.get(output)
    inputs = [component.inputs.get(name) for name in columns]
    total = sum(columns.values())
    if made is None or not columns or min(columns.values()) < 1 or None in inputs:
        yield f"{component.name}: bad positions of {output!r}"
    elif {(*feed.shape[1:], total) for feed in inputs if feed} != {made.shape[1:]}:
        yield f"{component.name}: the positions of {output!r} do not make {list(made.shape)}"


def _tokenizer_problems(manifest: Document) -> Iterator[str]:
    yield from _duplicates("tokenizer", [tokenizer.name for tokenizer in manifest.tokenizers])
    for each in manifest.tokenizers:
        most = _MOST_WORDS if each.vocabulary is None else each.vocabulary
        ids = (*each.before, *each.after, each.pad)
        if not 1 <= each.max_length <= LONGEST_TEXT:
            yield f"tokenizer {each.name!r}: expected a length from 1 to {LONGEST_TEXT}"
        elif not 1 <= most <= _MOST_WORDS:
            yield f"tokenizer {each.name!r}: vocabulary must be from 1 to {_MOST_WORDS}"
        elif len(ids) - 1 > each.max_length or not all(0 <= number < most for number in ids):
            yield (
                f"tokenizer {each.name!r}: expected at most {each.max_length} ids before and "
                f"after, and all below {most}"
            )


def _program_problems(manifest: Document) -> Iterator[str]:
    programs = manifest.programs
    if not 1 <= len(programs) <= _MOST_PROGRAMS or len(manifest.needs) > _MOST_NEEDS:
        yield f"{len(programs)} programs and {len(manifest.needs)} needs: expected 1 to " + (
            f"{_MOST_PROGRAMS} programs, and at most {_MOST_NEEDS} needs"
        )
        return
    yield from _duplicates("program", [program.name for program in programs])
    graphs = {component.name: component for component in manifest.components}
    tokenizers = {tokenizer.name: tokenizer for tokenizer in manifest.tokenizers}
    for program in programs:
        own = chain(checker.problems(program, graphs), _id_problems(program, graphs, tokenizers))
        for problem in own:
            yield f"program {program.name!r}: {problem}"
            return  # what follows may only follow from it
    images = Counter(frozenset(_images(program)) for program in programs)
    if max(images.values()) > 1:
        yield "two programs take the same images"
    used = {name for program in programs for name in components_run(program)}
    for name in graphs:
        if name not in used:
            yield f"no program uses {name!r}"


def _plan_problems(manifest: Document) -> Iterator[str]:
    """Check that a schedule which loops always follow is there."""
    names = {schedule.name for schedule in manifest.schedules}
    for name in manifest.fixed_schedules - names:
        yield f"a loop follows the schedule {name!r}, which is not among the schedules"


def _record_problems(manifest: Document) -> Iterator[str]:
    """Check what is said of the programs that were held against diffusers."""
    yield from _duplicates("checked program", [each.program for each in manifest.programs_checked])
    names = {program.name for program in manifest.programs}
    for record in manifest.programs_checked:
        where = f"programs_checked of {record.program[:80]!r}"
        if record.program not in names:
            yield f"{where}: no program has this name"
        if not 1 <= len(record.calls) <= _MOST_CALLS:
            yield f"{where}: {len(record.calls)} calls, expected 1 to {_MOST_CALLS}"
        for call in record.calls:
            yield from (f"{where}: {problem}" for problem in _call_problems(call))


def _call_problems(call: ProgramCall) -> Iterator[str]:
    least, most = min(call.prompts, call.images, call.given + 1), _MOST_OF_A_CALL
    if least < 1 or max(call.prompts, call.images, call.given) > most:
        yield f"expected 1 to {most} prompts and images of each, and 0 to {most} given"
    elif len(call.seeds) not in (1, call.prompts * call.images):
        yield f"{len(call.seeds)} seeds for {call.prompts} prompts by {call.images} images"
    if any(abs(seed) > _LARGEST_INTEGER for seed in call.seeds):
        yield "a seed is beyond 2^53"
    if call.tolerance < 0 or (call.relative_l2 is not None and call.relative_l2 < 0):
        yield "a negative error or limit"
    if (call.relative_l2 is None) == (call.refused is None):
        yield "expected one of relative_l2 and refused"
    if call.refused == "":
        yield "refused says nothing"
    if call.refused is not None and len(call.refused) > LONGEST_REFUSAL:
        yield f"refused has {len(call.refused)} characters, more than {LONGEST_REFUSAL}"


def _images(program: form.Program) -> Iterator[str]:
    for argument in program.arguments:
        if isinstance(argument, form.Image | form.Mask):
            yield argument.name


def _id_problems(
    program: form.Program,
    graphs: Mapping[str, Component],
    tokenizers: Mapping[str, Tokenizer],
) -> Iterator[str]:
    """Check that what takes token ids takes as many as its tokenizer gives."""
    lengths: dict[str, int] = {}
    shorter: set[str] = set()  # names of ids whose rows may be
    for step in program.steps:
        if isinstance(step, form.Tokens):
            if step.tokenizer not in tokenizers:
                yield f"no tokenizer {step.tokenizer!r}"
                return
            lengths[step.gives] = tokenizers[step.tokenizer].max_length
            if step.up_to is not None:
                shorter.add(step.gives)
                if step.up_to != lengths[step.gives]:
                    yield f"ids up to {step.up_to}, of a tokenizer for {lengths[step.gives]}"
        elif isinstance(step, form.Run):
            for input, value in step.feeds.items():
                spec: TensorSpec = graphs[step.component].inputs[input]
                if value in shorter:
                    if not isinstance(spec.shape[-1], str):
                        yield f"{step.component}.{input} is {list(spec.shape)}: of one length only"
                elif value in lengths and spec.shape[1:] != (lengths[value],):
                    yield (
                        f"{step.component}.{input} is {list(spec.shape)}, and its tokenizer gives "
                        f"{lengths[value]} ids"
                    )


def _build_problems(manifest: Document) -> Iterator[str]:
    yield from _duplicates("build", [build.name for build in manifest.builds])
    names = {component.name for component in manifest.components}
    for build in manifest.builds:
        yield from _name_problems("build", build.name)
        if build.artifacts.keys() != names:
            yield f"build {build.name!r} holds {sorted(build.artifacts)}, not {sorted(names)}"
        for name, artifact in build.artifacts.items():
            yield from _key_problems(artifact.key)
            if artifact.entry not in {file.path for file in artifact.files}:
                yield f"build {build.name!r}, {name}: entry {artifact.entry!r} is not listed"


def is_inside(path: str) -> bool:
    """Return whether `path` is a plain relative POSIX path that stays inside its folder."""
    pure = PurePosixPath(path)
    plain = path == pure.as_posix() and "\\" not in path and ":" not in path and "\0" not in path
    inside = plain and not pure.is_absolute() and path != "." and ".." not in pure.parts
    return inside and not any(_means_another(part) for part in pure.parts)


def _means_another(part: str) -> bool:
    """Return whether Windows takes a name for another one, or for a device."""
    return part[-1] in ". " or _DEVICE.match(part) is not None


def is_dimension(value: int | str) -> bool:
    if isinstance(value, int):
        return 1 <= value <= _LARGEST_NUMBER
    return _DIMENSION.match(value) is not None


def _key_problems(key: str) -> Iterator[str]:
    if not _KEY.match(key):
        yield f"key {key[:80]!r} is no plain word of letters, digits and _ . + -"


def _name_problems(kind: str, name: str) -> Iterator[str]:
    """Yield why a name is refused: files, such as plans, are named after builds and schedulers."""
    if not is_inside(name) or "/" in name:
        yield f"the {kind}'s name {name!r} cannot be a file's name"


def _file_problems(file: File) -> Iterator[str]:
    if not is_inside(file.path):
        yield f"path {file.path!r} leaves the bundle or is not a plain relative path"
    if file.size < 0:
        yield f"{file.path}: negative size"
    if not _DIGEST.match(file.sha256):
        yield f"{file.path}: sha256 must be 64 hexadecimal digits"


def _duplicates(what: str, names: Sequence[str]) -> Iterator[str]:
    for name in sorted(name for name, times in Counter(names).items() if times > 1):
        yield f"two {what}s are named {name!r}"
