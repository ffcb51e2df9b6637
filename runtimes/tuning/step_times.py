"""This module times the parts of an image: an encode, each kind of denoiser step, a decode.

An image's time follows from them, whatever its number of steps, guidance window and interval of
step caching: it need not be made to know how long it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from latentc.runtimes.arrays import Array
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.presets.preset import Arguments
from latentc.runtimes.sampling.step_cache import Kind, kinds

_SHORT = 1.0  # seconds: what is shorter is measured more often
_FEWEST, _MOST = 3, 24  # steps of a kind


@dataclass(frozen=True)
class Times:
    """Seconds: medians of each kind of step that was seen."""

    encode: float
    decode: float
    steps: Mapping[Kind, float]

    def image(self, kinds: Sequence[Kind]) -> float | None:
        """Return the seconds of a whole image with these steps.

        It is None where a kind was not measured.
        """
        if not set(kinds) <= self.steps.keys():
            return None
        return self.encode + sum(self.steps[kind] for kind in kinds) + self.decode


def measure(
    pipe: Pipeline,
    call: Mapping[str, Any],
    patience: float | None,
    window: bool = False,
    caching: bool = False,
) -> Times | None:
    """Time the parts of an image; None where the first steps exceed `patience` seconds.

    Half of the steps that are run are not guided if `window`; every other one is shallow if
    `caching`. The first of each kind warms up, and does not count.
    """
    usual, total = _first_steps(pipe, call, 2)
    if patience and usual > patience:
        return None
    often = min(max(_FEWEST, int(_SHORT / max(usual, 1e-6))), _MOST)
    each = max(2, min(often * (2 if caching else 1), total // 2))
    given: Arguments = {"cache_interval": 2} if caching else {}
    if window and total >= 2 * each:
        given["guidance_stop"] = (each + 0.5) / total
    pipe.encoded.clear()  # a new prompt is to be timed
    run = pipe.stream(**{**call, **given})
    for progress in run:
        if progress.index + 1 >= min(2 * each if window else each, total):
            break
    timings = run.timings
    found: dict[Kind, list[float]] = {}
    interval = int(given.get("cache_interval", 1))
    seen = kinds(run.guided(), interval)
    for kind, spent in zip(seen, timings.steps, strict=False):
        found.setdefault(kind, []).append(spent)
    run.close()
    medians = {kind: median(spent[1:] or spent) for kind, spent in found.items()}
    encode = timings.tokenize + timings.encode
    return Times(encode, _decode_seconds(pipe, progress.latents), medians)


def _first_steps(pipe: Pipeline, call: Mapping[str, Any], count: int) -> tuple[float, int]:
    """Warm up with a few steps: the fastest one's seconds, and how many steps a run has."""
    run = pipe.stream(**call)
    for progress in run:
        if progress.index + 1 >= count:
            break
    run.close()
    return min(run.timings.steps), run.num_timesteps


def _decode_seconds(pipe: Pipeline, latents: Array) -> float:
    """Return the better of two times, where decoding is short; a long one has little to warm up
    for.
    """
    spent: list[float] = []
    while len(spent) < 2 and sum(spent) < _SHORT:
        start = perf_counter()
        pipe.decode(latents)
        spent.append(perf_counter() - start)
    return min(spent)
