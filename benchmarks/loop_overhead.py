"""This module measures what the sampling loop costs beside the model, in seconds of a step.

    python -m latentc.benchmarks.loop_overhead

The model is replaced by a function that returns a prepared array, so nothing but the loop is
measured. The bare loop is DDIM written out in numpy by hand, in the same process.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np

from latentc.exporter.schedulers.tables import DEFAULT_SCHEDULERS, build, trace
from latentc.runtimes.sampling.plan import SamplingPlan
from latentc.runtimes.sampling.sampler import denoise
from latentc.runtimes.terminal import say

Shape: TypeAlias = tuple[int, int, int, int]  # of latents: batch, channels, height, width

# The scheduler of Stable Diffusion 1.x
CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
LIMIT_MS = 0.3
USUAL: Shape = (1, 4, 64, 64)
# Images of 256 to 768 pixels a side, and batches up to 16.
GROWING: tuple[Shape, ...] = (
    (1, 4, 32, 32),
    USUAL,
    (1, 4, 96, 96),
    (4, 4, 64, 64),
    (16, 4, 64, 64),
)
_WEIGHTS = (-4.0, 5.0)


class _Model:
    """Returns prepared predictions, and knows how long it took itself."""

    def __init__(self, shape: Shape) -> None:
        random = np.random.default_rng(0)
        rows = len(_WEIGHTS) * shape[0]
        self._prediction = random.standard_normal((rows, *shape[1:])).astype(np.float32)
        self.seconds = 0.0

    def __call__(self, model_input: Any, timestep: Any) -> Any:
        begin = time.perf_counter()
        result = self._prediction
        self.seconds += time.perf_counter() - begin
        return result


def _times(steps: Iterable[Any], model: _Model) -> list[float]:
    """Return the milliseconds of each step of `steps` that were not spent in the model."""
    times = []
    begin = time.perf_counter()
    for _ in steps:
        end = time.perf_counter()
        times.append((end - begin - model.seconds) * 1e3)
        model.seconds, begin = 0.0, time.perf_counter()
    return times


def _planned(plan: SamplingPlan, shape: Shape) -> list[float]:
    model, noise = _Model(shape), np.zeros(shape, np.float32)
    latents = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    weights = [_WEIGHTS] * plan.num_evaluations
    return _times(denoise(plan, latents, model, lambda: noise, weights=weights), model)[1:]


def _bare(plan: SamplingPlan, shape: Shape) -> list[float]:
    model = _Model(shape)

    def steps() -> Iterable[Any]:
        sample = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        for i in range(plan.num_evaluations):
            timestep = np.array([plan.timesteps[i]], np.float32)
            negative, positive = np.split(model(np.concatenate([sample, sample]), timestep), 2)
            guided = negative + 5.0 * (positive - negative)
            sample = float(plan.state[i, 0, 0]) * sample + float(plan.prediction[i, 0]) * guided
            yield sample

    return _times(steps(), model)[1:]


Loop: TypeAlias = Callable[[SamplingPlan, Shape], list[float]]


def measure(run: Loop, plan: SamplingPlan, runs: int, shape: Shape = USUAL) -> float:
    """Return the median over all steps of `runs` runs, in ms, after one run to warm up."""
    run(plan, shape)
    return statistics.median(value for _ in range(runs) for value in run(plan, shape))


def growth(plan: SamplingPlan, runs: int) -> dict[str, tuple[float, float]]:
    """Return the times of our loop and of the bare one, by shape of the latents."""
    return {
        "×".join(map(str, shape)): (
            measure(_planned, plan, runs, shape),
            measure(_bare, plan, runs, shape),
        )
        for shape in GROWING
    }


@click.command()
@click.option("--runs", default=20, show_default=True, help="Runs per scheduler.")
@click.option("--steps", default=50, show_default=True, help="Steps of a run.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write a file.")
def main(runs: int, steps: int, json_file: Path | None) -> None:
    """Measure the loop's overhead, guidance on: for the default schedulers at 4x64x64, and for
    "ddim" at other sizes and batches."""
    plans = {
        name: trace(build(name, CONFIG), [steps]).table.plan(steps) for name in DEFAULT_SCHEDULERS
    }
    results = {"bare numpy (ddim)": measure(_bare, plans["ddim"], runs)}
    results |= {name: measure(_planned, plan, runs) for name, plan in plans.items()}
    say(f"{'':20}ms per step, median")
    for name, value in results.items():
        say(f"{name:20}{value:8.3f}")
    worst = max(results, key=lambda name: results[name])
    say(f"worst: {worst}, {results[worst]:.3f} ms; allowed: {LIMIT_MS} ms")
    grown = growth(plans["ddim"], runs)
    say(f"\n{'ddim, latents':20}{'loop':>8}{'bare':>8}")
    for name, (ours, bare) in grown.items():
        say(f"{name:20}{ours:8.3f}{bare:8.3f}")
    if json_file is not None:
        report = {
            "unit": "ms per step, median",
            "shape": USUAL,
            "branches": len(_WEIGHTS),
            "runs": runs,
            "steps": steps,
            "limit": LIMIT_MS,
            "machine": {"cpu": platform.machine(), "python": platform.python_version()},
            "results": results,
            "growth": grown,
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
