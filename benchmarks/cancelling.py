"""This module times how long a run that is given up in the middle of a long step goes on.

    python -m latentc.benchmarks.cancelling BUNDLE

So many images are made at once that a step takes about `--seconds`, so no full-size weights are
needed. Another thread then calls `Run.close` at a random moment of the step, and what counts is the
time from there until the thread that runs the step has its hands free again.
"""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import click

from latentc.runtimes.pipeline.pipeline import Pipeline, load
from latentc.runtimes.terminal import say

LIMIT = 0.3  # seconds from giving up to the end
BACKENDS = ("onnxruntime", "openvino")
_STEPS = 20


def images_for(pipe: Pipeline, seconds: float, arguments: dict[str, Any]) -> int:
    """Return how many images make a step take about `seconds`."""
    images = 1
    while True:
        spent = step_seconds(pipe, {**arguments, "num_images_per_prompt": images})
        if spent >= seconds * 0.8:
            return images
        images = math.ceil(images * min(4.0, seconds / spent))


def step_seconds(pipe: Pipeline, arguments: dict[str, Any]) -> float:
    """Return the duration of the second step: the first one of a shape is longer."""
    run = pipe.stream(**arguments)
    try:
        next(run)
        start = time.perf_counter()
        next(run)
        return time.perf_counter() - start
    finally:
        run.close()


def cancel_seconds(pipe: Pipeline, wait: float, arguments: dict[str, Any]) -> float:
    """Give up a run `wait` seconds after its second step has begun.

    Returns:
        The seconds from `close` until the thread of the step has left it.
    """
    run = pipe.stream(**arguments)
    next(run)
    ended: list[float] = []

    def work() -> None:
        for _ in run:
            pass
        ended.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(wait)
    start = time.perf_counter()
    run.close()
    thread.join()
    return max(0.0, ended[0] - start)


def measure(bundle: Path, backend: str, runs: int, seconds: float, size: int) -> dict[str, Any]:
    """Return the figures of one backend."""
    arguments: dict[str, Any] = {"seed": 1, "height": size, "width": size}
    arguments["num_inference_steps"] = _STEPS
    chance = random.Random(0)
    with load(bundle, backend=backend) as pipe:
        if pipe.tokenizers:
            arguments["prompt"] = "a large red circle"
        images = images_for(pipe, seconds, arguments)
        arguments["num_images_per_prompt"] = images
        step = step_seconds(pipe, arguments)
        found = [
            cancel_seconds(pipe, chance.uniform(0.05, 0.95) * step, arguments) for _ in range(runs)
        ]
    return {
        "backend": backend,
        "images": images,
        "step": step,
        "median": statistics.median(found),
        "largest": max(found),
        "each": found,
    }


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--backend", "backends", multiple=True, default=BACKENDS, show_default=True)
@click.option("--runs", default=10, show_default=True, help="Runs to give up, per backend.")
@click.option("--seconds", default=4.0, show_default=True, help="How long a step should take.")
@click.option("--size", default=64, show_default=True, help="Height and width of the images.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a file.")
def main(
    bundle: Path,
    backends: tuple[str, ...],
    runs: int,
    seconds: float,
    size: int,
    json_file: Path | None,
) -> None:
    """Measure how long a step of BUNDLE goes on after its run was given up."""
    results = []
    say(f"{'':14}{'images':>7}{'step, s':>9}{'median, s':>11}{'largest, s':>12}")
    for backend in backends:
        result = measure(bundle, backend, runs, seconds, size)
        results.append(result)
        say(
            f"{backend:14}{result['images']:7}{result['step']:9.2f}{result['median']:11.3f}"
            f"{result['largest']:12.3f}"
        )
    if json_file is not None:
        machine = {"cpu": platform.machine(), "python": platform.python_version()}
        report = {"unit": "s", "limit": LIMIT, "machine": machine, "results": results}
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if any(result["median"] > LIMIT for result in results):
        raise SystemExit(f"a step went on for more than {LIMIT} s after its run was given up")


if __name__ == "__main__":
    main()
