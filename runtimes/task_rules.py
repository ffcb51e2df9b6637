"""What the tasks of a manifest must keep to; see docs/bundle-format.md for each rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtimes.manifest import Component, Manifest, TensorSpec
from runtimes.tasks import NOISE, START, STEPS, Feed, Preparation, Task, argument


def fed(task: Task) -> set[str]:
    """The denoiser inputs that the task's pictures feed."""
    made = {target for run in task.preparations for target in run.gives.values()}
    return (made - {START}) | set(task.inputs)


@dataclass(frozen=True)
class _Known:
    """What the rules look up, made once for all tasks: their work must not grow faster than the
    manifest."""

    encoders: Mapping[str, Component]
    wanted: Mapping[str, frozenset[str]]  # by encoder, the inputs that pictures feed
    inputs: Mapping[str, TensorSpec]  # of the denoiser
    targets: Mapping[str, TensorSpec | None]
    branches: frozenset[str]
    sizes: Mapping[str, int]  # of numbers that a task may have a default of its own for
    of_branches: frozenset[str]  # arguments that branches may have of their own

    @classmethod
    def of(cls, manifest: Manifest) -> _Known:
        """Return it for a manifest."""
        inputs = manifest.component("denoiser").inputs
        encoders = {each.name: each for each in manifest.image_encoders()}
        others = {NOISE, *(each.input for each in manifest.vectors)}
        return cls(
            encoders=encoders,
            wanted={
                name: frozenset(each.inputs.keys() - others) for name, each in encoders.items()
            },
            inputs=inputs,
            targets={**inputs, START: manifest.component("decoder").inputs.get("latents")},
            branches=frozenset(each.name for each in manifest.guidance.branches),
            sizes={
                **{each.name: len(each.default) for each in manifest.arguments},
                **dict.fromkeys((*manifest.guidance.defaults, STEPS), 1),
            },
            of_branches=frozenset(
                each.prefix + name
                for each in manifest.guidance.branches
                if each.prefix
                for vector in manifest.vectors
                for name in vector.arguments
            ),
        )


def problems(manifest: Manifest) -> Iterator[str]:
    """What is inconsistent, one sentence each."""
    if not manifest.tasks:
        yield "expected at least one task"
    pictures = [frozenset(task.pictures) for task in manifest.tasks]
    if len(set(pictures)) != len(pictures):
        yield "two tasks take the same pictures"
    known = _Known.of(manifest)
    for task in manifest.tasks:
        for problem in _task_problems(known, task):
            yield f"task {task.name!r}: {problem}"
    used = {run.component for task in manifest.tasks for run in task.preparations}
    for name in known.encoders:
        if name not in used:
            yield f"no task uses {name!r}"


def _task_problems(known: _Known, task: Task) -> Iterator[str]:
    yield from _name_problems(task)
    for run in task.preparations:
        if run.component not in known.encoders:
            yield f"{run.component!r} is no component with the role image_encoder"
        else:
            yield from _run_problems(known, task, run, known.encoders[run.component])
    for name, feed in task.inputs.items():
        if name not in known.inputs:
            yield f"the denoiser has no input {name!r}"
        else:
            yield from _feed_problems(task, feed, known.inputs[name])
    targets = [target for run in task.preparations for target in run.gives.values()]
    for name, times in sorted(Counter([*targets, *task.inputs]).items()):
        if times > 1:
            yield f"{name!r} is fed twice"
    yield from _start_problems(task, START in targets)
    yield from _default_problems(known, task)
    yield from _branch_problems(known, task)


def _default_problems(known: _Known, task: Task) -> Iterator[str]:
    for name, values in task.defaults.items():
        expected = known.sizes.get(name)
        if expected != len(values):
            yield f"the default of {name!r} has {len(values)} numbers, expected {expected}"
    if not all(each >= 1 and each == int(each) for each in task.defaults.get(STEPS, ())):
        yield f"the default of {STEPS!r} must be an integer of at least 1"


def _branch_problems(known: _Known, task: Task) -> Iterator[str]:
    """What is wrong with `branch_arguments`."""
    for name, others in (task.branch_arguments or {}).items():
        unknown = {name, *others} - known.of_branches
        if unknown:
            yield f"branch_arguments: no branch has {sorted(unknown)}"


def _name_problems(task: Task) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name in task.pictures:
        names.setdefault(argument(name), []).append(name)
    for whole, found in names.items():
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
    known: _Known, task: Task, run: Preparation, component: Component
) -> Iterator[str]:
    wanted = known.wanted[run.component]
    if run.feeds.keys() != wanted or not wanted:
        yield f"{run.component!r} needs {sorted(wanted)}, not {sorted(run.feeds)}"
        return
    for name, feed in run.feeds.items():
        yield from _feed_problems(task, feed, component.inputs[name])
    noise = component.inputs.get(NOISE)
    if noise is not None and not _sized(noise):
        yield f"{run.component!r}: bad shape {list(noise.shape)} of {NOISE!r}"
    yield from _target_problems(known, run, component)
    unknown = set(run.branches) - known.branches
    if unknown:
        yield f"no guidance branch {sorted(unknown)}"


def _target_problems(known: _Known, run: Preparation, component: Component) -> Iterator[str]:
    if not set(run.others.values()) <= set(run.gives.values()) - {START}:
        yield f"{run.component!r}: `others` names what it does not give"
    if run.others and not run.branches:
        yield f"{run.component!r}: `others` is for branches beside those in `branches`"
    if len(set(run.others.values())) != len(run.others):
        yield f"{run.component!r}: `others` feeds an input twice"
    for output, target in (*run.gives.items(), *run.others.items()):
        if output not in component.outputs:
            yield f"{run.component!r} has no output {output!r}"
        elif target not in known.targets or target in ("sample", "timestep"):
            yield f"the denoiser has no input {target!r} to be fed"
        elif component.outputs[output] != known.targets[target]:
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
