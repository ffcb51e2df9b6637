"""This module compares a denoiser's graph for every size with one for sizes that halve evenly.

    python -m latentc.benchmarks.any_size

The graph for even sizes enlarges by two; the one for every size enlarges to the size of the skip
connection (docs/decisions/0045). Both are made of the same UNet, written for each engine and run in
turn, in one process, on one thread, at a size that both take: what differs is the graph alone.
Processor time is counted, which other programs on the machine disturb less than the clock.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import torch

from latentc.exporter import targets
from latentc.exporter.capture.graphs import capture
from latentc.exporter.components.description import Graph, size_multiple
from latentc.exporter.components.text_to_image import sample_spec
from latentc.exporter.components.unets import least_side
from latentc.exporter.families.stable_diffusion import Denoiser
from latentc.runtimes.arrays import Array
from latentc.runtimes.backends import backend
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.backends.session import Session
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.storage.files import temporary_folder
from latentc.runtimes.terminal import say

ENGINES: Mapping[str, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
_BUILTIN = Path(str(files("latentc"))) / "models" / "shapes"
# Both are what each image of a guided call is to the denoiser.
_ROWS, _LENGTH = 2, 77
# Three of Stable Diffusion 1.5's four widths, one layer of each kind.
WIDE: Mapping[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
Timing: TypeAlias = tuple[str, str, float, float]  # engine, shapes, ms of either graph


def graphs(unet: Any) -> dict[str, tuple[Graph, int]]:
    """Return the UNet's graph for even sizes and the one for every size, by name, with what
    latent sides are multiples of."""
    even = Denoiser(unet)
    even.unet = unet
    sample = sample_spec(unet.config.out_channels)
    states = ("batch", _LENGTH, unet.config.cross_attention_dim)
    inputs = {
        "sample": sample,
        "timestep": TensorSpec("float32", ("batch",)),
        "encoder_hidden_states": TensorSpec("float32", states),
    }
    component = Component("denoiser", "denoiser", inputs, {"prediction": sample})
    return {
        "even": (Graph(component, even), size_multiple(unet)),
        "any": (Graph(component, Denoiser(unet), least=least_side(unet)), 1),
    }


def write(unet: Any, target: str, side: int, folder: Path) -> dict[str, tuple[Path, Component]]:
    """Write both graphs for a target; return their files and components by the graphs' names."""
    traced = {"batch": _ROWS, "height": 4 * side, "width": 3 * side}
    written = {}
    for name, (graph, multiple) in graphs(unet).items():
        (folder / name).mkdir()
        program = capture(graph, multiple, traced)
        entry = targets.get(target).lower(program, graph.component, folder / name)
        written[name] = folder / name / entry, graph.component
    return written


def feeds(unet: Any, side: int) -> dict[str, Array]:
    """Return inputs of a call, latents of `side` by `side`."""
    random = np.random.default_rng(0)
    shape = _ROWS, unet.config.in_channels, side, side
    states = _ROWS, _LENGTH, unet.config.cross_attention_dim
    return {
        "sample": random.standard_normal(shape, np.float32),
        "timestep": np.full(_ROWS, 601.0, np.float32),
        "encoder_hidden_states": random.standard_normal(states, np.float32),
    }


def medians(
    opened: Mapping[str, Session], inputs: Mapping[str, Array], runs: int
) -> dict[str, float]:
    """Return the median processor time of a call of each session in milliseconds. They are run in
    turn, forward and back, after two calls each to warm up.

    Raises:
        click.ClickException: the graphs do not give the same.
    """
    found: dict[str, list[float]] = {name: [] for name in opened}
    results = [session.run(inputs)["prediction"] for session in [*opened.values()] * 2]
    for result in results[1:]:
        if np.abs(result - results[0]).max() > 1e-3 * np.abs(results[0]).max():
            raise click.ClickException("the graphs do not give the same")
    for turn in range(runs):
        for name in list(opened)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.process_time()
            opened[name].run(inputs)
            found[name].append((time.process_time() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(unet: Any, side: int, runs: int) -> Iterator[Timing]:
    """Yield the timings of both engines with open and with fixed shapes, on one thread."""
    fixed = {"batch": _ROWS, "height": side, "width": side}
    for target, name in ENGINES.items():
        engine = backend.get(name)
        with temporary_folder() as folder:
            written = write(unet, target, side, folder)
            for shapes, sizes in (("dynamic", {}), ("static", fixed)):
                options = SessionOptions(threads=1, sizes=sizes)
                opened = {
                    graph: engine.open(entry, component, "cpu", options)
                    for graph, (entry, component) in written.items()
                }
                found = medians(opened, feeds(unet, side), runs)
                for session in opened.values():
                    session.close()
                yield name, shapes, found["even"], found["any"]


def unets() -> dict[str, tuple[Any, int]]:
    """Return the UNets to measure, and the side of their latents."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    builtin = UNet2DConditionModel.from_pretrained(_BUILTIN / "unet")
    return {
        "built-in model": (builtin.eval(), 16),
        "wide": (UNet2DConditionModel(**WIDE).eval(), 32),
    }


@click.command()
@click.option("--runs", default=30, show_default=True, help="Calls of each graph.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a file.")
def main(runs: int, json_file: Path | None) -> None:
    """Measure a denoiser's graph for every size against that for even sizes."""
    say(f"{'':16}{'engine':14}{'shapes':10}{'even ms':>10}{'any ms':>10}{'ratio':>8}")
    results = []
    for name, (unet, side) in unets().items():
        for engine, shapes, even, every in measure(unet, side, runs):
            say(f"{name:16}{engine:14}{shapes:10}{even:10.2f}{every:10.2f}{every / even:8.3f}")
            results.append([name, side, engine, shapes, even, every])
    if json_file is not None:
        report = {"unit": "ms per call, median", "runs": runs, "results": results}
        json_file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
