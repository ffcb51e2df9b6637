"""What the tasks of a manifest must keep to; see docs/bundle-format.md for each rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from runtimes.manifest import Component, Manifest, TensorSpec
from runtimes.tasks import NOISE, START, Feed, Preparation, Task, argument, arguments


def fed(task: Task) -> set[str]:
    """The denoiser inputs that the task's pictures feed."""
    made = {target for run in task.preparations for target in run.gives.values()}
    return (made - {START}) | set(task.inputs)


def problems(manifest: Manifest) -> Iterator[str]:
    """What is inconsistent, one sentence each."""
    if not manifest.tasks:
        yield "expected at least one task"
    pictures = [frozenset(task.pictures) for task in manifest.tasks]
    if len(set(pictures)) != len(pictures):
        yield "two tasks take the same pictures"
    for task in manifest.tasks:
        for problem in _task_problems(manifest, task):
            yield f"task {task.name!r}: {problem}"
    used = {run.component for task in manifest.tasks for run in task.preparations}
    for component in manifest.image_encoders():
        if component.name not in used:
            yield f"no task uses {component.name!r}"


def _task_problems(manifest: Manifest, task: Task) -> Iterator[str]:
    encoders = {each.name: each for each in manifest.image_encoders()}
    denoiser = manifest.component("denoiser")
    yield from _name_problems(task)
    for run in task.preparations:
        if run.component not in encoders:
            yield f"{run.component!r} is no component with the role image_encoder"
        else:
            yield from _run_problems(manifest, task, run, encoders[run.component])
    for name, feed in task.inputs.items():
        if name not in denoiser.inputs:
            yield f"the denoiser has no input {name!r}"
        else:
            yield from _feed_problems(task, feed, denoiser.inputs[name])
    targets = [target for run in task.preparations for target in run.gives.values()]
    for name in sorted({each for each in targets if targets.count(each) > 1} | set(task.inputs)):
        if targets.count(name) + (name in task.inputs) > 1:
            yield f"{name!r} is fed twice"
    yield from _start_problems(task, START in targets)
    sizes = {each.name: len(each.default) for each in manifest.arguments}
    for name, values in task.defaults.items():
        if sizes.get(name) != len(values):
            yield f"the default of {name!r} has {len(values)} numbers, expected {sizes.get(name)}"


def _name_problems(task: Task) -> Iterator[str]:
    for whole in arguments(task.pictures):
        found = [name for name in task.pictures if argument(name) == whole]
        if found != [whole] and found != [f"{whole}[{index}]" for index in range(len(found))]:
            yield f"pictures {found}: expected {whole!r} alone, or {whole}[0], {whole}[1] …"


def _start_problems(task: Task, started: bool) -> Iterator[str]:
    if started != (task.strength is not None):
        yield f"a strength, and what gives {START!r}: expected both or neither"
    if task.strength is not None and not 0 < task.strength <= 1:
        yield "strength must be above 0 and at most 1"
    if task.blend is not None and (not started or task.pictures.get(task.blend) != "mask"):
        yield f"blend must name a mask, and something must give {START!r}"
    if not 1 <= task.enlarges <= 64:
        yield f"enlarges {task.enlarges}: expected 1 to 64"
    if task.size_of is not None and task.size_of not in task.pictures:
        yield f"size_of {task.size_of!r} is none of its pictures"


def _run_problems(
    manifest: Manifest, task: Task, run: Preparation, component: Component
) -> Iterator[str]:
    wanted = set(component.inputs) - {NOISE} - {each.input for each in manifest.vectors}
    if set(run.feeds) != wanted or not wanted:
        yield f"{run.component!r} needs {sorted(wanted)}, not {sorted(run.feeds)}"
        return
    for name, feed in run.feeds.items():
        yield from _feed_problems(task, feed, component.inputs[name])
    noise = component.inputs.get(NOISE)
    if noise is not None and not _sized(noise):
        yield f"{run.component!r}: bad shape {list(noise.shape)} of {NOISE!r}"
    yield from _target_problems(manifest, run, component)
    unknown = set(run.branches) - {branch.name for branch in manifest.guidance.branches}
    if unknown:
        yield f"no guidance branch {sorted(unknown)}"


def _target_problems(manifest: Manifest, run: Preparation, component: Component) -> Iterator[str]:
    latents = manifest.component("decoder").inputs.get("latents")
    known: Mapping[str, TensorSpec | None] = {
        **manifest.component("denoiser").inputs,
        START: latents,
    }
    if not set(run.others.values()) <= set(run.gives.values()) - {START}:
        yield f"{run.component!r}: `others` names what it does not give"
    if run.others and not run.branches:
        yield f"{run.component!r}: `others` is for branches beside those in `branches`"
    if len(set(run.others.values())) != len(run.others):
        yield f"{run.component!r}: `others` feeds an input twice"
    for output, target in (*run.gives.items(), *run.others.items()):
        if output not in component.outputs:
            yield f"{run.component!r} has no output {output!r}"
        elif target not in known or target in ("sample", "timestep"):
            yield f"the denoiser has no input {target!r} to be fed"
        elif component.outputs[output] != known[target]:
            yield f"{run.component!r}: {output!r} has not the form of {target!r}"


def _feed_problems(task: Task, feed: Feed, spec: TensorSpec) -> Iterator[str]:
    channels = {"image": 3, "mask": 1}
    kind = task.pictures.get(feed.picture)
    if kind is None:
        yield f"{feed.picture!r} is none of its pictures"
    elif not _sized(spec) or spec.shape[1] != channels[kind]:
        yield f"{feed.picture!r} does not fit an input {list(spec.shape)}"
    if feed.mask is not None and task.pictures.get(feed.mask) != "mask":
        yield f"{feed.mask!r} is none of its masks"


def _sized(spec: TensorSpec) -> bool:
    """Whether it is float32 [batch, channels, height, width] of known sizes."""
    if spec.dtype != "float32" or len(spec.shape) != 4 or spec.shape[0] != "batch":
        return False
    named = [str(each).rpartition("*")[2] for each in spec.shape[2:] if isinstance(each, str)]
    return isinstance(spec.shape[1], int) and set(named) <= {"height", "width"}
