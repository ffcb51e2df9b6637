"""This module records what PyTorch and diffusers say: the probes that a bundle is verified against.

Two kinds of probe per component, random inputs at a shape that was not traced and inputs that it
meets while the pipeline's own program runs, and one whole run of the diffusers pipeline. They are
stored in the bundle, so that any machine can repeat the check without PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentc.exporter.capture.graphs import example_inputs
from latentc.exporter.capture.step_cache import with_features
from latentc.exporter.components.description import Description, Graph, as_held
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.verification.eager import Inputs, pipeline_over
from latentc.exporter.verification.probe_calls import arguments_of, images_of, size_of
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import LoopProbe, Schedule
from latentc.runtimes.errors import ExportError, NumericalError, first_line
from latentc.runtimes.programs.statements import loop_of

STEPS = 6
SEED = 20
LARGEST = 256  # pixels along a side: verifying a large model must not take hours
_GRID = 8  # pixels: diffusers' pipelines take no other sizes than multiples, whatever the VAE
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Trajectory:
    """A trajectory keeps what is seen while a diffusers pipeline runs: what its scheduler gave
    last, as latents, and how what its loop holds is read as latents."""

    latents: torch.Tensor | None = None
    read: Callable[[torch.Tensor], torch.Tensor] = lambda held: held


def reference(
    description: Description,
    draft: Manifest,
    root: Path,
    schedule: Schedule,
    sizes: Sequence[Mapping[str, int]],
    fixed: tuple[int, int] | None = None,
    pipe: Any = None,
) -> tuple[dict[str, Arrays], LoopProbe]:
    """Run the pipeline in diffusers, its own program over the modules, and each module.

    Args:
        draft: the manifest, whose files stand at `root`.
        schedule: the pipeline's own; its run takes the step count nearest to `STEPS`.
        sizes: symbols of the random probes (not those that were traced), one probe for each
            that makes other shapes.
        fixed: height and width in pixels of an export with a fixed size.
        pipe: the diffusers pipeline.

    Returns:
        arrays per component (``<probe>/in/<name>``, ``<probe>/out/<name>``) and for
        ``"loop"`` (``latents`` float32, ``image`` uint8 [batch, height, width, channels], and
        images that it was given, ``in/<argument>``, uint8),
        and the settings of the run.
    """
    height, width = fixed or loop_size(description)
    steps = min(schedule.steps, key=lambda count: abs(count - STEPS))
    arguments = arguments_of(description.program)
    given = images_of(description.program, height, width)
    probe = LoopProbe(arguments, schedule.name, steps, SEED, height, width)
    latents, images = _run(pipe, description, probe, given)
    arrays_by_name: dict[str, Arrays] = {}
    for graph in description.graphs:
        arrays = arrays_by_name[graph.component.name] = {}
        for label, inputs in _random(graph, sizes):
            _record(arrays, label, graph, inputs)
    after = any(graph.component.role == "postprocessor" for graph in description.graphs)
    met = program_inputs(description, draft, root, probe, given, after)
    for graph in description.graphs:
        for label, known in _on_trajectory(graph, met, latents):
            _record(arrays_by_name[graph.component.name], label, graph, known)
    arrays_by_name["loop"] = {
        "latents": latents.numpy(),
        "image": (images * 255).round().astype(np.uint8),
        **{f"in/{name}": _bytes(image) for name, image in given.items()},
    }
    return arrays_by_name, probe


def _bytes(image: Any) -> np.ndarray[Any, Any]:
    several = isinstance(image, list)
    return np.stack([np.asarray(each) for each in image]) if several else np.asarray(image)


def loop_size(description: Description) -> tuple[int, int]:
    """Return height and width in pixels of the whole-loop check: small, and not square if possible,
    and more than one view, where there are views."""
    latents = description.latents
    if not description.resizable:
        return latents.default_height, latents.default_width
    unit = math.lcm(latents.factor * latents.multiple, _GRID)
    views = loop_of(description.program).views
    if views is not None:  # one of them in height, and the next width that has two
        side = views.size * latents.factor
        return side, side + unit
    height = max(unit, min(latents.default_height, LARGEST) // unit * unit)
    width = max(unit, (height * 3 // 4) // unit * unit)
    return height, width


def _run(
    pipe: Any, description: Description, probe: LoopProbe, given: Mapping[str, Any]
) -> tuple[torch.Tensor, Any]:
    """Run the diffusers pipeline with the settings of `probe` and its own scheduler; return the
    latents at its end and the images."""
    arguments: dict[str, Any] = {**probe.arguments, **given}
    if description.resizable and size_of(description.program) is None:
        arguments |= {"height": probe.height, "width": probe.width}
    arguments["num_inference_steps"] = probe.num_inference_steps

    def seeded(**more: Any) -> Any:
        generator = torch.Generator().manual_seed(probe.seed)
        return description.call(generator=generator, **arguments, **more)

    with watched(pipe, description.denoiser, description) as seen, torch.no_grad(), quiet_loading():
        try:
            images = seeded()
            if loop_of(description.program).views is not None:
                seen.latents = seeded(output_type="latent")  # a scheduler sees one view alone
        except Exception as error:
            raise ExportError(
                f"{type(pipe).__name__} itself does not run in diffusers, and there is nothing to "
                f"compare with: {first_line(error)}"
            ) from error
    if seen.latents is None:
        raise ExportError(f"{type(pipe).__name__} made no denoising step")
    return seen.latents, images


@contextmanager
def watched(
    pipe: Any, denoiser: torch.nn.Module, description: Description | None = None
) -> Iterator[Trajectory]:
    """Record the scheduler's last sample, as latents if `description` says how to read it."""
    seen = Trajectory()
    view = description.view if description else as_held
    last: dict[str, Any] = {}
    seen.read = lambda held: view(held, last)

    def before(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        last.clear()
        last.update(named)

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


def program_inputs(
    description: Description,
    draft: Manifest,
    root: Path,
    probe: LoopProbe,
    given: Mapping[str, Any],
    images: bool = False,
) -> Inputs:
    """Return what each component is given while the pipeline's own program runs over the modules,
    in order, by its name; that of the decoder are the latents at the end.

    Args:
        images: decode them, for what is run on images; without, those components get none.

    Raises:
        ExportError: something is not finite.
    """
    modules = {graph.component.name: graph.module for graph in description.graphs}
    inputs: Inputs = {name: [] for name in modules}
    arguments: dict[str, Any] = {**probe.arguments, **given}
    with pipeline_over(root, draft, modules, inputs) as pipe:
        try:
            result = pipe(
                **arguments,
                scheduler=probe.scheduler,
                num_inference_steps=probe.num_inference_steps,
                seed=probe.seed,
                height=probe.height,
                width=probe.width,
                output_type="np" if images else "latent",
            )
        except NumericalError as error:
            raise ExportError(
                f"PyTorch itself gives NaN or infinity; nothing can be verified against that: "
                f"{error}"
            ) from error
    decoder = draft.decoding[0]
    (input,) = decoder.feeds
    inputs[decoder.component] = [{input: torch.from_numpy(result.latents)}]
    return inputs


def _random(
    graph: Graph, sizes: Sequence[Mapping[str, int]]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    shapes: list[list[torch.Size]] = []
    for symbols in (*sizes, *([{**sizes[0], **graph.also}] if graph.also else [])):
        inputs = example_inputs(graph, symbols, seed=1)
        shape = [value.shape for value in inputs.values()]
        if shape not in shapes:
            yield f"random-{len(shapes)}" if shapes else "random", inputs
            shapes.append(shape)


_LABELS = {
    "encoder": "prompt",
    "image_encoder": "image",
    "combiner": "predictions",
    "postprocessor": "image",
}


def _on_trajectory(
    graph: Graph, met: Inputs, latents: torch.Tensor
) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Yield some of what a component was given; a decoder gets diffusers' own latents."""
    component = graph.component
    if component.role == "decoder":
        yield "trajectory", {"latents": latents}
    elif component.role in _LABELS:
        if met[component.name]:
            yield _LABELS[component.role], in_one_batch(met[component.name])
    else:
        calls = denoiser_inputs(graph, met)
        last = len(calls) - 1
        for place in sorted({0, last // 2, last}) if calls else ():  # it may be for other timesteps
            yield f"trajectory-{place}", calls[place]


def in_one_batch(calls: Sequence[Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
    """Return the rows of all calls of an encoder; of the first alone, where forms differ."""
    forms = {tuple(value.shape[1:] for value in call.values()) for call in calls}
    if len(forms) > 1:
        return calls[0]
    return {name: torch.cat([call[name] for call in calls]) for name in calls[0]}


def denoiser_inputs(graph: Graph, met: Inputs) -> list[Mapping[str, torch.Tensor]]:
    """Return what the denoiser was given; a shallow graph gets the features of the call before."""
    if graph.fed_by is None:
        return met[graph.component.name]
    whole = met[graph.fed_by.component.name]
    pairs = zip(whole, [whole[0], *whole], strict=False)
    return [with_features(graph, inputs, before) for inputs, before in pairs]


def _record(arrays: Arrays, label: str, graph: Graph, inputs: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        outputs = graph.module(**inputs)
    for name, value in inputs.items():
        arrays[f"{label}/in/{name}"] = value.numpy()
    for name, value in zip(graph.component.outputs, outputs, strict=True):
        if not torch.isfinite(value).all():
            raise ExportError(
                f"{graph.component.name}: PyTorch itself gives NaN or infinity on the "
                f"{label} inputs; nothing can be verified against that"
            )
        arrays[f"{label}/out/{name}"] = value.numpy()
