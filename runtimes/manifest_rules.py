"""What a manifest must keep to beyond its types; see docs/bundle-format.md for each rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from runtimes import task_rules
from runtimes.manifest import Component, Embedding, File, Manifest, Source, TensorSpec, parted

DTYPES = ("float32", "float16", "int64", "int32")
_FLOATS = ("float32", "float16")
_CHANNELS = (1, 3, 4)  # of images: grey, RGB, RGB and alpha
_DIMENSION = re.compile(r"(?:([1-9]\d{0,3})\*)?([a-z][a-z_]{0,31})\Z")
LONGEST_TEXT = 1 << 16  # ids
LONGEST_SAID = 200  # characters of what a source says of itself
MOST_BASE_MODELS = 32
_MOST_WORDS = 1 << 31  # graphs may take ids as int32
_LARGEST_NUMBER = 1 << 20  # of a size, in whatever unit
_LARGEST_FRAME = 1 << 26  # numbers
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_DEVICE = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}\Z")  # names a file while it is written


def problems(manifest: Manifest) -> Iterator[str]:
    """What is inconsistent, one sentence each (used lazily: the first one is reported)."""
    for file in manifest.files():
        yield from _file_problems(file)
    yield from _source_problems(manifest.source)
    yield from _component_problems(manifest)
    yield from _build_problems(manifest)
    yield from _guidance_problems(manifest)
    yield from _conditioning_problems(manifest)
    yield from _embedding_problems(manifest)
    yield from _duplicates("schedule", [schedule.name for schedule in manifest.schedules])
    for schedule in manifest.schedules:
        yield from _name_problems("schedule", schedule.name)
        yield from _key_problems(schedule.key)
    if manifest.probes is not None:
        yield from _key_problems(manifest.probes.key)
    yield from _size_problems(manifest)
    yield from _duplicates("task", [task.name for task in manifest.tasks])
    yield from task_rules.problems(manifest)
    if manifest.defaults.scheduler not in {schedule.name for schedule in manifest.schedules}:
        yield f"defaults.scheduler {manifest.defaults.scheduler!r} is not among the schedules"
    sides = [pixels for _, *sides in manifest.latents.bins or () for pixels in sides]
    if not all(1 <= pixels <= _LARGEST_NUMBER for pixels in sides):
        yield f"latents.bins: heights and widths must be from 1 to {_LARGEST_NUMBER}"
    numbers = (manifest.latents.channels, manifest.latents.factor, manifest.latents.multiple)
    sizes = (manifest.latents.default_height, manifest.latents.default_width)
    if min(*numbers, *sizes, manifest.defaults.num_inference_steps) < 1:
        yield "latents and defaults.num_inference_steps must be positive"
    if max(*numbers, *sizes, manifest.defaults.num_inference_steps) > _LARGEST_NUMBER:
        yield f"latents and defaults.num_inference_steps must be at most {_LARGEST_NUMBER}"


def _source_problems(source: Source) -> Iterator[str]:
    """What a source says of itself comes from strangers, and is shown in a line."""
    said = {"licence": (source.licence,), "author": (source.author,)}
    for name, texts in {**said, "base_model": source.base_model}.items():
        longest = max((len(text or "") for text in texts), default=0)
        if longest > LONGEST_SAID:
            yield f"source.{name} has {longest} characters, more than {LONGEST_SAID}"
    if len(source.base_model) > MOST_BASE_MODELS:
        yield f"source.base_model names {len(source.base_model)}, more than {MOST_BASE_MODELS}"


def _component_problems(manifest: Manifest) -> Iterator[str]:
    yield from _duplicates("component", [component.name for component in manifest.components])
    for role in ("denoiser", "decoder"):
        if sum(component.role == role for component in manifest.components) != 1:
            yield f"expected exactly one component with role {role!r}"
            return
    for component in manifest.components:
        for name, spec in [*component.inputs.items(), *component.outputs.items()]:
            if spec.dtype not in DTYPES:
                yield f"{component.name}.{name}: dtype {spec.dtype!r} is not one of {DTYPES}"
            for dimension in spec.shape:
                if not is_dimension(dimension):
                    yield f"{component.name}.{name}: bad dimension {dimension!r}"
    denoiser = manifest.component("denoiser")
    predictions = len(denoiser.outputs) - len(manifest.cached())
    if not {"sample", "timestep"} <= denoiser.inputs.keys() or predictions != 1:
        yield "the denoiser needs inputs 'sample' and 'timestep' and one output of its own"
    elif len(denoiser.inputs["sample"].shape) != 4:
        yield "the denoiser's sample must have 4 dimensions"
    elif denoiser.inputs["timestep"] != TensorSpec("float32", (1,)):
        yield "the denoiser's timestep must be float32 of shape [1]"
    else:
        yield from _prediction_problems(manifest, denoiser)
    decoder = manifest.component("decoder")
    if set(decoder.inputs) != {"latents"} or set(decoder.outputs) != {"image"}:
        yield "the decoder needs the input 'latents' and the output 'image'"
    elif manifest.latents.factor > 0:  # else that is what is wrong
        yield from _image_problems(decoder, manifest.latents.factor)
    yield from _shallow_problems(manifest, denoiser)


def _prediction_problems(manifest: Manifest, denoiser: Component) -> Iterator[str]:
    """A prediction of another size or type would be spread over the sample, or rounded."""
    cached = manifest.cached()
    (name,) = (name for name in denoiser.outputs if name not in cached)
    made, sample = denoiser.outputs[name], denoiser.inputs["sample"]
    if made.dtype not in _FLOATS or _parted(made.shape) != _parted(sample.shape):
        yield (
            f"the denoiser's {name} is {made.dtype} {list(made.shape)}; expected floats "
            f"{list(sample.shape)}, as its sample"
        )


def _image_problems(decoder: Component, factor: int) -> Iterator[str]:
    """An image of another size than the latents' is none that was asked for."""
    made, latents = decoder.outputs["image"], decoder.inputs["latents"]
    rows, sides = _parted(latents.shape[:1]), _parted(latents.shape[2:])
    enlarged = [(multiple * factor, symbol) for multiple, symbol in sides]
    expected = [[*rows, (channels, ""), *enlarged] for channels in _CHANNELS]
    if made.dtype not in _FLOATS or len(sides) != 2 or _parted(made.shape) not in expected:
        yield (
            f"the decoder's image is {made.dtype} {list(made.shape)} of latents "
            f"{list(latents.shape)}; expected floats of {_CHANNELS} channels, and {factor} times "
            "the height and width"
        )


def _parted(shape: Sequence[int | str]) -> list[tuple[int, str]]:
    """Return each dimension as a factor and a symbol, which is empty for a number."""
    return [(each, "") if isinstance(each, int) else parted(each) for each in shape]


def _shallow_problems(manifest: Manifest, denoiser: Component) -> Iterator[str]:
    shallow = manifest.shallow()
    if shallow is None:
        return
    if sum(component.role == "shallow" for component in manifest.components) > 1:
        yield "expected at most one component with role 'shallow'"
    cached = manifest.cached()
    if not cached or set(cached) & set(denoiser.inputs):
        yield f"{shallow.name!r} takes no output of the denoiser that is none of its inputs"
    known = {**denoiser.outputs, **denoiser.inputs}
    if any(known.get(name) != spec for name, spec in shallow.inputs.items()):
        yield f"{shallow.name!r} takes what the denoiser neither takes nor gives"
    if not {"sample", "timestep"} <= shallow.inputs.keys():
        yield f"{shallow.name!r} needs the inputs 'sample' and 'timestep'"
    if shallow.outputs != {n: s for n, s in denoiser.outputs.items() if n not in cached}:
        yield f"{shallow.name!r} must give the denoiser's prediction"


def _build_problems(manifest: Manifest) -> Iterator[str]:
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


def _guidance_problems(manifest: Manifest) -> Iterator[str]:
    branches = manifest.guidance.branches
    yield from _duplicates("guidance branch", [branch.name for branch in branches])
    if manifest.guidance.single not in {branch.name for branch in branches}:
        yield f"guidance.single {manifest.guidance.single!r} is not a branch"
    if any(each.missing == "off" and not each.prefix for each in branches):
        yield "a branch without a prefix cannot be off where its texts are missing"
    scales = set(manifest.guidance.defaults)
    for branch in branches:
        if not set(branch.scales) <= scales:
            yield f"branch {branch.name!r} uses a scale without a default"
    for field in ("scale", "rescale"):
        name = getattr(manifest.guidance, field)
        if name is not None and name not in scales:
            yield f"guidance.{field} {name!r} has no default"
    if not set(manifest.guidance.least) <= scales:
        yield f"guidance.least: {sorted(set(manifest.guidance.least) - scales)} has no default"


def _conditioning_problems(manifest: Manifest) -> Iterator[str]:
    fed = {"sample", "timestep"} | {vector.input for vector in manifest.vectors}
    yield from _duplicates("tokenizer input", [each.input for each in manifest.tokenizers])
    tokens = {tokenizer.input for tokenizer in manifest.tokenizers}
    yield from _duplicates("argument", [argument.name for argument in manifest.arguments])
    yield from _duplicates("vector input", [vector.input for vector in manifest.vectors])
    outputs = [name for encoder in manifest.encoders() for name in encoder.outputs]
    yield from _duplicates("encoder output", outputs)
    yield from _vector_problems(manifest)
    for encoder in manifest.encoders():
        fed |= set(encoder.outputs)
        yield from _encoder_problems(encoder, tokens)
    wanted = set(manifest.component("denoiser").inputs) - fed
    for task in manifest.tasks:
        # Looks at no more than the task has: a subset cannot be larger.
        if not wanted <= task_rules.fed(task):
            missing = wanted - task_rules.fed(task)
            yield f"nothing feeds the denoiser's {sorted(missing)} in the task {task.name!r}"
    known = {argument.name for argument in manifest.arguments}
    for vector in manifest.vectors:
        if not set(vector.arguments) <= known:
            yield f"vector {vector.input!r} uses an unknown argument"
    for argument in manifest.arguments:
        for value in argument.default:
            if isinstance(value, str) and value not in ("height", "width"):
                yield f"argument {argument.name!r}: bad default {value!r}"
    for tokenizer in manifest.tokenizers:
        if not 1 <= tokenizer.max_length <= LONGEST_TEXT or not tokenizer.texts:
            yield (
                f"tokenizer for {tokenizer.input!r}: needs texts and a length from 1 to "
                f"{LONGEST_TEXT}"
            )
        if tokenizer.vocabulary is not None and not 1 <= tokenizer.vocabulary <= _MOST_WORDS:
            yield f"tokenizer for {tokenizer.input!r}: vocabulary must be from 1 to {_MOST_WORDS}"


def _embedding_problems(manifest: Manifest) -> Iterator[str]:
    taken, tokenizers = manifest.component("denoiser").inputs, manifest.tokenizers
    lengths = {each.input: each.max_length for each in tokenizers}
    made = {name: each for each in manifest.encoders() for name in each.outputs if name in taken}
    names = [each.name for each in manifest.embeddings]
    others = [name for each in tokenizers for name in each.texts]
    others += [each.name for each in manifest.arguments]
    inputs = [name for each in manifest.embeddings for name in each.inputs]
    yield from _duplicates("encoded text input", inputs)
    yield from _duplicates("encoded text", [*names, *{*names}.intersection(others)])
    if names and (set(inputs) != made.keys() or not all(e.inputs for e in manifest.embeddings)):
        yield f"the encoded texts must be what encoders give the denoiser: {sorted(made)}"
        return
    for each in manifest.embeddings:
        given = [made[name].outputs[name] for name in each.inputs]
        wanted = [taken[name] for name in each.inputs]
        problem = _frame_problem if each.frame else _join_problem
        if said := problem(each, given, wanted):
            yield f"encoded text {each.name!r}: {said}"
        for name, columns in each.inputs.items():
            yield from _column_problems(each.name, made[name], name, columns, lengths)


def _join_problem(
    _: Embedding, given: Sequence[TensorSpec], wanted: Sequence[TensorSpec]
) -> str | None:
    ranks = {len(spec.shape) for spec in (*given, *wanted)}
    if len(ranks) > 1 or min(ranks) < 2:
        return "needs the same two dimensions or more on both sides"
    if not all(isinstance(own.shape[-1], int) for own in wanted):
        return "its last dimension must be a number"
    if any(len({(s.dtype, s.shape[:-1]) for s in side}) > 1 for side in (given, wanted)):
        return "what it joins has different dimensions"
    return None


def _frame_problem(
    of: Embedding, given: Sequence[TensorSpec], wanted: Sequence[TensorSpec]
) -> str | None:
    sizes = [spec.shape[1:] for spec in wanted]
    if sizes != [spec.shape[1:] for spec in given] or len({spec.dtype for spec in given}) > 1:
        return "what its frame holds must be the same on both sides, and of one type"
    numbers = [[n for n in size if isinstance(n, int)] for size in sizes]
    if any(len(size) != 2 or len(own) != 2 for size, own in zip(sizes, numbers, strict=True)):
        return "what its frame holds must have numbers of positions and columns"
    positions, columns = of.frame or (0, 0)
    if sum(own[0] for own in numbers) > positions or max(own[1] for own in numbers) > columns:
        return f"its frame of {positions} by {columns} is too small"
    if positions * columns > _LARGEST_FRAME:
        return f"its frame of {positions} by {columns} is too large"
    return None


def _column_problems(
    argument: str,
    encoder: Component,
    output: str,
    columns: Mapping[str, int],
    lengths: Mapping[str, int],
) -> Iterator[str]:
    if not columns:
        return
    shape = encoder.outputs[output].shape
    if not columns.keys() <= encoder.inputs.keys() or min(columns.values()) < 1:
        yield f"encoded text {argument!r}: bad columns"
    elif {(lengths[name], sum(columns.values())) for name in columns} != {shape[1:]}:
        yield f"encoded text {argument!r}: the columns do not make {list(shape)}"


def _encoder_problems(encoder: Component, tokens: set[str]) -> Iterator[str]:
    if not encoder.inputs:
        yield f"encoder {encoder.name!r} has no input"
    if not set(encoder.inputs) <= tokens:
        yield f"encoder {encoder.name!r} has an input that no tokenizer feeds"
    for name, spec in encoder.inputs.items():
        if len(spec.shape) != 2:
            yield f"{encoder.name}.{name}: token ids must have 2 dimensions"


def _size_problems(manifest: Manifest) -> Iterator[str]:
    sample, latents = manifest.component("denoiser").inputs["sample"], manifest.latents
    if sample.dtype != "float32" or sample.shape[1] != latents.channels:
        yield f"the denoiser's sample must be float32 with {latents.channels} channels"
    unit = latents.factor * latents.multiple
    if unit > 0 and (latents.default_height % unit or latents.default_width % unit):
        yield f"the default height and width must be multiples of {unit}"
    if latents.minimum < 1:
        yield "latents.minimum must be positive"
    if min(latents.default_height, latents.default_width) < latents.minimum * latents.factor:
        yield "the default height and width are below latents.minimum"
    if latents.maximum is not None:
        largest = latents.maximum * latents.factor
        if max(latents.default_height, latents.default_width) > largest:
            yield f"the default height and width are above the maximum, {largest}"
        if latents.multiple > 0 and (latents.maximum < 1 or latents.maximum % latents.multiple):
            yield "latents.maximum must be a positive multiple of latents.multiple"


def _vector_problems(manifest: Manifest) -> Iterator[str]:
    sizes = {argument.name: len(argument.default) for argument in manifest.arguments}
    takers: dict[str, list[TensorSpec]] = {}
    for component in (manifest.component("denoiser"), *manifest.image_encoders()):
        for name, spec in component.inputs.items():
            takers.setdefault(name, []).append(spec)
    for vector in manifest.vectors:
        values = sum(sizes.get(name, 0) for name in vector.arguments)
        if any(sizes.get(name) != values for name in vector.window or ()):
            yield f"vector {vector.input!r}: its window needs two arguments of {values} values"
        if vector.until is not None and sizes.get(vector.until) != 1:
            yield f"vector {vector.input!r}: it needs one argument of 1 value for `until`"
        for spec in takers.get(vector.input, ()):
            if len(spec.shape) != 2 or spec.shape[1] != values:
                yield f"vector {vector.input!r} has {values} values, its input {list(spec.shape)}"


def is_inside(path: str) -> bool:
    """Whether `path` is a plain relative POSIX path that stays inside its folder."""
    pure = PurePosixPath(path)
    plain = path == pure.as_posix() and "\\" not in path and ":" not in path and "\0" not in path
    inside = plain and not pure.is_absolute() and path != "." and ".." not in pure.parts
    return inside and not any(_means_another(part) for part in pure.parts)


def _means_another(part: str) -> bool:
    """Whether Windows takes a name for another one, or for a device."""
    return part[-1] in ". " or _DEVICE.match(part) is not None


def is_dimension(value: int | str) -> bool:
    if isinstance(value, int):
        return 1 <= value <= _LARGEST_NUMBER
    return _DIMENSION.match(value) is not None


def _key_problems(key: str) -> Iterator[str]:
    if not _KEY.match(key):
        yield f"key {key[:80]!r} is no plain word of letters, digits and _ . + -"


def _name_problems(kind: str, name: str) -> Iterator[str]:
    """Files are named after builds and schedulers: plans, pictures of a benchmark."""
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
