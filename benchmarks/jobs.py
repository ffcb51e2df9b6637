"""This module holds what `latentc.benchmarks.full_size` measures, each job in its own process.

    python -m latentc.benchmarks.jobs NAME '{"argument": value}'

A job returns something JSON-able; `latentc.benchmarks.measure.run_child` gets it together with the
process's peak memory. The jobs that run a bundle never import PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from latentc.benchmarks.measure import (
    current_memory,
    gib,
    peak_memory,
    report,
    run_child,
    summarise,
    timed,
)

if TYPE_CHECKING:
    from latentc.benchmarks.measure import Child
    from latentc.exporter.progress import Event
    from latentc.runtimes.arrays import Array
    from latentc.runtimes.bundle.structures import Component

PROMPT = "a large red circle above a small blue square"
# Of an encoder and a denoiser: one row for each branch of the guidance.
_BATCH: Mapping[str, int] = {
    **dict.fromkeys(("encoder", "denoiser"), 2),
    **dict.fromkeys(("decoder", "image_encoder", "postprocessor", "combiner"), 1),
}


def run(name: str, arguments: Mapping[str, Any], echo: bool = False) -> Child:
    """Run a job of this module in a fresh process."""
    return run_child(["-m", "latentc.benchmarks.jobs", name, json.dumps(arguments)], echo=echo)


def export(source: str, output: str, target: str, verify: bool) -> dict[str, Any]:
    """Compile; return seconds, bytes written and memory after each stage."""
    from latentc.exporter.compiler.export import export as compiler

    stages: list[dict[str, Any]] = []

    def note(event: Event) -> None:
        if event.seconds is None:
            return
        stages.append(
            {
                "subject": event.subject,
                "stage": event.stage,
                "seconds": event.seconds,
                "size": event.size,
                "memory": current_memory(),
                "peak_memory": peak_memory(),
            }
        )
        print(
            f"  {event.subject:<16}{event.stage:<26}{event.seconds:8.1f} s   "
            f"now {gib(current_memory()):>9}  peak {gib(peak_memory()):>9}",
            flush=True,
        )

    result, seconds = timed(
        lambda: compiler(source, output, targets=[target], verify=verify, report=note)
    )
    builds = [build for build in result.manifest.builds if build.target == target]
    return {
        "seconds": seconds,
        "stages": stages,
        "size": sum(file.size for file in result.manifest.files()),
        "verified": all(b.verification is not None and b.verification.passed for b in builds),
    }


def component(bundle: str, backend: str, name: str, size: int, runs: int) -> dict[str, Any]:
    """Load one component and run it: seconds to load, of the first call, median of the rest."""
    from latentc.runtimes.backends.choosing import choose_build
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.pipeline.pipeline import open_component

    opened = Bundle.open(bundle, hashing="never")
    build, engine = choose_build(opened.manifest, backend)
    found = next(each for each in opened.manifest.components if each.name == name)
    pixels = size // opened.manifest.latents.factor
    feeds = _feeds(found, {"batch": _BATCH[found.role], "height": pixels, "width": pixels})
    device = engine.device(None)
    session, load = timed(lambda: open_component(opened, build, found, engine, device))
    loaded = current_memory()
    with session:
        _, first = timed(lambda: session.run(feeds))
        calls = [timed(lambda: session.run(feeds))[1] for _ in range(runs)]
    return {
        "load": load,
        "first": first,
        "median": summarise(calls).median,
        "calls": calls,
        "memory_loaded": loaded,
    }


def pipeline(bundle: str, backend: str, size: int, steps: int) -> dict[str, Any]:
    """Load everything and make an image of `size` pixels a side, guidance on."""
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.pipeline.pipeline import load as load_pipeline

    _, hashing = timed(Bundle.open(bundle).check)  # once per machine; not part of a load
    pipe, load = timed(lambda: load_pipeline(bundle, backend))
    loaded = current_memory()
    with pipe:
        result, seconds = timed(
            lambda: pipe(PROMPT, num_inference_steps=steps, seed=0, height=size, width=size)
        )
    return {
        "hash": hashing,
        "load": load,
        "seconds": seconds,
        "steps": result.timings.steps,
        "encode": result.timings.encode,
        "decode": result.timings.decode,
        "median": summarise(result.timings.steps).median,
        "memory_loaded": loaded,
    }


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "export": export,
    "component": component,
    "pipeline": pipeline,
}


def _feeds(found: Component, symbols: Mapping[str, int]) -> dict[str, Array]:
    """Return random inputs of a component's shapes; a free sequence takes CLIP's 77 tokens."""
    import numpy as np

    random = np.random.default_rng(0)
    sizes = {"sequence": 77, **symbols}
    feeds: dict[str, Array] = {}
    for name, spec in found.inputs.items():
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
        if name == "timestep":
            feeds[name] = np.full(shape, 601.0, spec.dtype)
        elif spec.dtype.startswith("int"):
            feeds[name] = random.integers(0, 1000, shape).astype(spec.dtype)
        else:
            feeds[name] = random.standard_normal(shape).astype(spec.dtype)
    return feeds


if __name__ == "__main__":
    report(JOBS[sys.argv[1]](**json.loads(sys.argv[2])))
