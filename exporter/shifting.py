"""Schedulers whose noise levels follow the picture's size (`use_dynamic_shifting`), as tables.

Such a scheduler is told a number mu, which diffusers' pipelines make of the number of patches (a
straight line, `calculate_shift` there). The coefficients of its plans are smooth functions of mu.
So plans are traced at some mus (Chebyshev's points of the second kind, both ends included) and the
runtime takes the polynomial through them; how many points that takes is tried out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from diffusers import SchedulerMixin

from exporter.families import EVEN_SIGMAS, Shifted
from exporter.schedule import DEFAULT_STEPS, trace
from runtimes.errors import ExportError
from runtimes.manifest import Latents, Shift, TensorSpec
from runtimes.plan import PlanTable, SamplingPlan, join
from runtimes.plan_schema import ROW_FIELDS

_NUMBERS = ("timesteps", "input_scale", "init_noise_scale", "add_noise", "known")
# Latents of an image, height times width, up to which there are plans where the model has no limit
# of its own: with 8 pixels to a latent 2048 by 2048 pixels, 4096 by 1024, or any others of 4.2
# megapixels. The last noise levels come so close to each other beyond that their differences, in
# the schedulers' float32, are less exact than `TOLERANCE`; from four times that on they are 0, and
# diffusers' own schedulers fail.
LARGEST_AREA = 256 * 256
TOLERANCE = 1e-6  # of a number of a plan, by the largest of its kind
_COUNTS = (6, 9, 13, 19, 27, 38, 54)
_CHECKED = (0.02, 0.37, 0.81)  # where between the ends all plans are checked


@dataclass(frozen=True)
class Told:
    """What a pipeline tells its scheduler besides the number of steps.

    `even_sigmas`: evenly spaced noise levels; `shift`: the line that mu is on, None where it tells
    none; `low` and `high`: mu at the smallest and largest size, equal where the size is fixed.
    """

    even_sigmas: bool = False
    shift: Shift | None = None
    low: float = 0.0
    high: float = 0.0

    def options(self, mu: float | None = None) -> Callable[[int], Mapping[str, Any]]:
        """The arguments of `set_timesteps` for a number of steps."""

        def arguments(steps: int) -> dict[str, Any]:
            made: dict[str, Any] = {} if mu is None else {"mu": mu}
            if self.even_sigmas:
                made["sigmas"] = np.linspace(1.0, 1 / steps, steps)
            return made

        return arguments


def line(config: Mapping[str, Any], shifted: Shifted | None) -> Shift | None:
    """The line that mu is on, by height times width of the latents."""
    if shifted is None or not config.get("use_dynamic_shifting"):
        return None
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", shifted.max_shift) - base) / (last - first)
    return Shift(base - slope * first, slope / shifted.patch**2)


def told_by(pipeline_class: str, shift: Shift | None, latents: Latents, sample: TensorSpec) -> Told:
    """Return what pipelines of this class tell their scheduler.

    Args:
        sample: of the denoiser's input; its height and width may be fixed.
    """
    even = pipeline_class in EVEN_SIGMAS
    if shift is None:
        return Told(even)
    fixed = [side for side in sample.shape[2:] if isinstance(side, int)]
    if len(fixed) == 2:
        return Told(even, shift, shift.of(*fixed), shift.of(*fixed))
    area = latents.maximum**2 if latents.maximum else LARGEST_AREA
    low, high = sorted(shift.of(1, each) for each in (latents.multiple**2, area))
    return Told(even, shift, low, high)


def trace_told(
    scheduler: SchedulerMixin,
    steps: Sequence[int] | None,
    told: Told,
    skip_refused: bool = False,
) -> PlanTable:
    """The plans of a scheduler that is told so, for every mu where it depends on it.

    Raises:
        ExportError: as `exporter.schedule.trace` does, or no polynomial comes close enough.
    """

    def at(mu: float | None, counts: Iterable[int] | None) -> PlanTable:
        options = told.options(mu)
        made = trace(scheduler, counts, step_options=options, skip_refused=skip_refused).table
        return made if mu is None else replace(made, shift=np.full(len(made.steps), mu))

    if not scheduler.config.get("use_dynamic_shifting"):
        return at(None, steps)
    if told.shift is None:
        raise ExportError(
            f"{type(scheduler).__name__} shifts its noise by the picture's size, which this kind "
            "of pipeline does not tell it"
        )
    if told.low == told.high:
        return at(told.low, steps)
    mus = _points(told, at, max(steps or DEFAULT_STEPS))
    table = join(at(mu, steps) for mu in mus)
    for part in _CHECKED:
        mu = told.low + part * (told.high - told.low)
        _check(table, at(mu, table.step_counts), mu, TOLERANCE)
    return table


def _points(told: Told, at: Callable[[float, Iterable[int]], PlanTable], steps: int) -> list[float]:
    """As few mus as the polynomial through the plan of `steps` at them needs."""
    reason = ""
    for count in _COUNTS:
        mus = _chebyshev(told.low, told.high, count)
        table = join(at(mu, [steps]) for mu in mus)
        between = [(a + b) / 2 for a, b in pairwise(mus)]
        try:
            for mu in (*between[:2], between[len(between) // 2], *between[-2:]):
                _check(table, at(mu, [steps]), mu, TOLERANCE / 2)
        except ExportError as error:
            reason = str(error)
            continue
        return mus
    raise ExportError(f"no polynomial of mu comes close to this scheduler: {reason}")


def _chebyshev(low: float, high: float, count: int) -> list[float]:
    """Ascending, the ends included to the last bit."""
    inner = [
        (low + high) / 2 - (high - low) / 2 * math.cos(math.pi * index / (count - 1))
        for index in range(1, count - 1)
    ]
    return [low, *inner, high]


def _check(table: PlanTable, traced: PlanTable, mu: float, limit: float) -> None:
    """Raises ExportError where a plan of `table` at `mu` is not as it was traced there."""
    for steps in traced.step_counts:
        found, expected = table.plan(steps, 0, mu), traced.plan(steps)
        worst = max(_difference(found, expected, name) for name in (*_NUMBERS, *ROW_FIELDS))
        if not worst <= limit:
            raise ExportError(
                f"the plan of {steps} steps at mu {mu:g} is {worst:.1e} off, allowed is {limit:.0e}"
            )


def _difference(found: SamplingPlan, expected: SamplingPlan, name: str) -> float:
    one, other = (np.asarray(getattr(plan, name), np.float64) for plan in (found, expected))
    if one.shape != other.shape:
        return math.inf
    apart = np.abs(np.nan_to_num(one) - np.nan_to_num(other)).max(initial=0.0)
    return float(apart / max(1.0, np.abs(np.nan_to_num(other)).max(initial=0.0)))
