"""What PyTorch and diffusers say: the probes that a bundle is verified against.

Two kinds of probe per component, random inputs at a shape that was not traced and inputs met
on a real denoising trajectory, and one whole run of the diffusers pipeline. They are stored
in the bundle, so that any machine can repeat the check without PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from exporter.capture import example_inputs, resolve
from exporter.families import Description, Graph, plain
from exporter.source import quiet_loading
from exporter.step_cache import with_features
from runtimes.errors import ExportError
from runtimes.interpreter.images import Images, pixels
from runtimes.manifest import LoopProbe, Schedule, TensorSpec
from runtimes.pictures import listed
from runtimes.programs.statements import Pixels
from runtimes.session import first_line
from runtimes.version_1.tasks import NOISE, START, Feed, argument

STEPS = 6
SEED = 20
LARGEST = 256  # pixels along a side: verifying a large model must not take hours
_GRID = 8  # pixels: diffusers' pipelines take no other sizes than multiples, whatever the VAE
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Trajectory:
    """What was seen while the diffusers pipeline ran."""

    calls: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    latents: torch.Tensor | None = None
    # What is in the first input, and of each branch whether it has the prompt.
    observed: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] = lambda sample: {
        "sample": sample
    }
    guided: tuple[bool, ...] = ()
    # What the pipeline's loop holds → latents, as the denoiser's graph takes them.
    read: Callable[[torch.Tensor], torch.Tensor] = lambda held: held


def reference(
    pipe: Any,
    description: Description,
    schedule: Schedule,
    sizes: Sequence[Mapping[str, int]],
    fixed: tuple[int, int] | None = None,
) -> tuple[dict[str, Arrays], LoopProbe]:
    """Run the pipeline and each module in PyTorch.

    Args:
        schedule: the pipeline's own; its run takes the step count nearest to `STEPS`.
        sizes: symbols of the random probes (not those that were traced), one probe for each
            that makes other shapes.
        fixed: height and width in pixels of an export with a fixed size.

    Returns:
        arrays per component (``<probe>/in/<name>``, ``<probe>/out/<name>``) and for
        ``"loop"`` (``latents`` float32, ``image`` uint8 [batch, height, width, channels], and
        pictures that it was given, ``in/<argument>``, uint8),
        and the settings of the run.
    """
    height, width = fixed or loop_size(description)
    steps = min(schedule.steps, key=lambda count: abs(count - STEPS))
    arguments = dict(description.probe_arguments)
    pictures = probe_pictures(description, height, width)
    probe = LoopProbe(arguments, schedule.name, steps, SEED, height, width)
    seen, images = run(pipe, description, probe, pictures)
    if seen.latents is None:
        raise ExportError(f"{type(pipe).__name__} made no denoising step")
    conditioning = _conditioning(pipe, description, height, width)
    made: dict[str, Arrays] = {}
    for graph in description.graphs:
        found: Arrays = {}
        for label, inputs in _random(graph, sizes):
            _record(found, label, graph, inputs)
        for label, inputs in _on_trajectory(graph, seen, conditioning, images):
            _record(found, label, graph, inputs)
        made[graph.component.name] = found
    made["loop"] = {
        "latents": seen.latents.numpy(),
        "image": (images * 255).round().astype(np.uint8),
        **{f"in/{name}": _bytes(picture) for name, picture in pictures.items()},
    }
    return made, probe


def _bytes(picture: Any) -> np.ndarray[Any, Any]:
    several = isinstance(picture, list)
    return np.stack([np.asarray(each) for each in picture]) if several else np.asarray(picture)


def probe_pictures(description: Description, height: int, width: int) -> Mapping[str, Any]:
    """What the pipeline's own task takes, as Pillow images."""
    make = description.probe_pictures
    return {} if make is None else make(height, width)


def loop_size(description: Description) -> tuple[int, int]:
    """Height and width in pixels of the whole-loop check: small, and not square if possible."""
    latents = description.latents
    if not description.resizable:
        return latents.default_height, latents.default_width
    unit = math.lcm(latents.factor * latents.multiple, _GRID)
    height = max(unit, min(latents.default_height, LARGEST) // unit * unit)
    width = max(unit, (height * 3 // 4) // unit * unit)
    return height, width


def run(
    pipe: Any, description: Description, probe: LoopProbe, pictures: Mapping[str, Any]
) -> tuple[Trajectory, Any]:
    """Run the pipeline with the settings of `probe`, its own scheduler, and look on; returns
    what was seen and the images."""
    arguments: dict[str, Any] = {**probe.arguments, **pictures}
    if description.resizable and description.task.size_of is None:
        arguments |= {"height": probe.height, "width": probe.width}
    with watched(pipe, description.denoiser, description) as seen, torch.no_grad(), quiet_loading():
        generator = torch.Generator().manual_seed(probe.seed)
        try:
            images = description.call(
                num_inference_steps=probe.num_inference_steps, generator=generator, **arguments
            )
        except Exception as error:
            raise ExportError(
                f"{type(pipe).__name__} itself does not run in diffusers, and there is nothing to "
                f"compare with: {first_line(error)}"
            ) from error
    seen.observed = description.observed
    seen.guided = tuple(not branch.prefix for branch in description.guidance.branches)
    return seen, images


@contextmanager
def watched(
    pipe: Any, denoiser: torch.nn.Module, description: Description | None = None
) -> Iterator[Trajectory]:
    """Record the denoiser's (sample, timestep) inputs and the scheduler's last sample, as latents
    and the scheduler's timesteps if `description` says how to read them."""
    seen = Trajectory()
    view = description.view if description else plain
    scale = description.timesteps if description else 1.0
    last: dict[str, Any] = {}
    seen.read = lambda held: view(held, last)

    def before(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        sample = (*inputs, *named.values())[0]
        timestep = torch.as_tensor(named["timestep"] if "timestep" in named else inputs[1])
        last.clear()
        last.update(named)
        # One timestep for the batch, which some pipelines repeat for each of its rows.
        first = timestep.reshape(-1)[:1].float() * scale
        seen.calls.append((view(sample, named).clone(), first))

    step = pipe.scheduler.step

    # Pipelines look at the signature to see whether a step takes a generator.
    @functools.wraps(step)
    def watched_step(*inputs: Any, **named: Any) -> Any:
        result = step(*inputs, **named)
        held = result[0] if isinstance(result, tuple) else result.prev_sample
        seen.latents = view(held, last).clone()
        return result

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    pipe.scheduler.step = watched_step
    try:
        yield seen
    finally:
        handle.remove()
        del pipe.scheduler.step


def _conditioning(
    pipe: Any, description: Description, height: int, width: int
) -> dict[str, torch.Tensor]:
    """Named conditioning of the two texts, empty and probe, as the denoiser takes it."""
    made: dict[str, torch.Tensor] = {}
    for graph in description.graphs:
        if graph.component.role == "encoder":
            inputs = tokens(pipe, description)
            made |= inputs
            with torch.no_grad():
                outputs = graph.module(**{name: inputs[name] for name in graph.component.inputs})
            made |= dict(zip(graph.component.outputs, outputs, strict=True))
    return made | vectors(description, height, width) | _pictured(description, height, width)


def _pictured(description: Description, height: int, width: int) -> dict[str, torch.Tensor]:
    """Inputs made of the probe's pictures alone, [2, …]: the row of the empty text, then that of
    the probe's. Those that are found in what the denoiser was given count before these."""
    task, pictures = description.task, probe_pictures(description, height, width)
    factor = description.latents.factor
    symbols = {"height": height // factor, "width": width // factor}
    own = {name for name, kind in task.pictures.items() if kind == "image"}
    found = {name: listed(name, _picked(name, pictures)) for name in own}

    def tensor(feed: Feed, spec: TensorSpec) -> torch.Tensor:
        return torch.from_numpy(_pixels(feed, spec, found, symbols))

    graphs = {graph.component.name: graph for graph in description.graphs}
    denoiser = next(g.component for g in graphs.values() if g.component.role == "denoiser")
    made = {
        name: tensor(feed, denoiser.inputs[name]).repeat(2, 1, 1, 1)
        for name, feed in task.inputs.items()
        if feed.picture in own
    }
    positive = {branch.name for branch in description.guidance.branches if not branch.prefix}
    for run in task.preparations:
        graph = graphs[run.component]
        if set(graph.component.inputs) != set(run.feeds) or START in run.gives.values():
            continue  # it takes noise or numbers
        if any(feed.mask or feed.picture not in own for feed in run.feeds.values()):
            continue
        given = {n: tensor(feed, graph.component.inputs[n]) for n, feed in run.feeds.items()}
        with torch.no_grad():
            outputs = dict(zip(graph.component.outputs, graph.module(**given), strict=True))
        for output, target in run.gives.items():
            row = outputs[output]
            whole = not run.branches or set(run.branches) - positive
            other = next((outputs[o] for o, t in run.others.items() if t == target), row * 0)
            made[target] = torch.cat([row if whole else other, row])
    return made


def _pixels(
    feed: Feed, spec: TensorSpec, images: Mapping[str, Any], symbols: Mapping[str, int]
) -> np.ndarray[Any, Any]:
    """Return what an input is fed with: float32 [n, channels, height, width]."""
    statement = Pixels(
        gives="",
        of=feed.picture,
        shape=spec.shape[1:],
        resample=feed.resample,
        fit=feed.fit,
    )
    return pixels(statement, Images({feed.picture: [images[feed.picture]]}), symbols)


def _picked(name: str, pictures: Mapping[str, Any]) -> Any:
    given = pictures[argument(name)]
    return given[int(name[:-1].split("[")[1])] if "[" in name else given


def vectors(description: Description, height: int, width: int) -> dict[str, torch.Tensor]:
    """Inputs made of the arguments' defaults, [2, n] with equal rows."""
    made = {}
    size = {"height": float(height), "width": float(width)}
    defaults = {
        argument.name: [size[v] if isinstance(v, str) else v for v in argument.default]
        for argument in description.arguments
    }
    for vector in description.vectors:
        row = [value for name in vector.arguments for value in defaults[name]]
        made[vector.input] = torch.tensor([row, row])
    return made


def tokens(pipe: Any, description: Description) -> dict[str, torch.Tensor]:
    """Token ids of the empty and the probe's text, by encoder input: int64 [2, max_length]."""
    made = {}
    for text in description.text_inputs:
        tokenizer = getattr(pipe, text.attribute)
        known = [name for name in text.texts if name in description.probe_arguments]
        made[text.input] = tokenizer(
            ["", text.prepared(str(description.probe_arguments[known[0]]))],
            padding="max_length",
            max_length=text.length(tokenizer),
            truncation=True,
            return_tensors="pt",
        ).input_ids
    return made


def _random(
    graph: Graph, sizes: Sequence[Mapping[str, int]]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    shapes: list[list[torch.Size]] = []
    for symbols in sizes:
        inputs = example_inputs(graph, symbols, seed=1)
        shape = [value.shape for value in inputs.values()]
        if shape not in shapes:
            yield f"random-{len(shapes)}" if shapes else "random", inputs
            shapes.append(shape)


def _on_trajectory(
    graph: Graph,
    seen: Trajectory,
    conditioning: Mapping[str, torch.Tensor],
    images: Any,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    component = graph.component
    if component.role == "encoder":
        yield "prompt", {name: conditioning[name] for name in component.inputs}
    elif component.role == "decoder" and seen.latents is not None:
        yield "trajectory", {"latents": seen.latents}
    elif component.role == "image_encoder" and seen.latents is not None:
        yield "picture", image_encoder_inputs(graph, images, seen.latents, conditioning)
    elif component.role in ("denoiser", "shallow"):
        last = len(seen.calls) - 1
        for place in sorted({0, last // 2, last}):
            yield f"trajectory-{place}", _denoiser_input(graph, seen, conditioning, place)


def image_encoder_inputs(
    graph: Graph, images: Any, latents: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Pictures of a run, [batch, height, width, 3], as large as the graph takes them, noise where
    it is drawn, and numbers of `conditioning`."""
    symbols = dict(zip(("height", "width"), latents.shape[2:], strict=True))
    pictures = torch.from_numpy(np.asarray(images, np.float32)).permute(0, 3, 1, 2).contiguous()
    generator = torch.Generator().manual_seed(SEED)
    made = {}
    for name, spec in graph.component.inputs.items():
        shape = [len(pictures), *(resolve(dim, symbols) for dim in spec.shape[1:])]
        if name in conditioning:
            made[name] = conditioning[name][-len(pictures) :]
        elif name == NOISE:
            made[name] = torch.randn(shape, generator=generator)
        else:
            made[name] = torch.nn.functional.interpolate(pictures, shape[2:])
    return made


def denoiser_inputs(
    pipe: Any,
    description: Description,
    graph: Graph,
    seen: Trajectory,
    size: tuple[int, int],
    places: Iterable[int],
) -> list[dict[str, torch.Tensor]]:
    """What the denoiser was given at some of the calls of a run of `size` in pixels."""
    conditioning = _conditioning(pipe, description, *size)
    return [_denoiser_input(graph, seen, conditioning, place) for place in places]


def _denoiser_input(
    graph: Graph, seen: Trajectory, conditioning: Mapping[str, torch.Tensor], place: int
) -> dict[str, torch.Tensor]:
    """A shallow graph gets the features of the call before. Where a call has one row, as without
    guidance, it is that of the prompt, which comes last in `conditioning`, after the empty one."""
    sample, timestep = seen.calls[place]
    inputs = {**seen.observed(sample), "timestep": timestep.expand(len(sample)).clone()}
    names = [n for n in graph.component.inputs if n in conditioning and n not in inputs]
    rows = [int(each) for each in seen.guided] if len(sample) == len(seen.guided) else [1]
    inputs |= {name: conditioning[name][rows] for name in names}
    if graph.fed_by is None:
        return inputs
    before = _denoiser_input(graph.fed_by, seen, conditioning, max(place - 1, 0))
    made: dict[str, torch.Tensor] = with_features(graph, inputs, before)
    return made


def _record(found: Arrays, label: str, graph: Graph, inputs: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        outputs = graph.module(**inputs)
    for name, value in inputs.items():
        found[f"{label}/in/{name}"] = value.numpy()
    for name, value in zip(graph.component.outputs, outputs, strict=True):
        if not torch.isfinite(value).all():
            raise ExportError(
                f"{graph.component.name}: PyTorch itself gives NaN or infinity on the "
                f"{label} inputs; nothing can be verified against that"
            )
        found[f"{label}/out/{name}"] = value.numpy()
