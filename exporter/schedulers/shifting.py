"""Schedulers whose noise levels follow the image's size (`use_dynamic_shifting`), as tables.

Such a scheduler is told a number mu, which diffusers' pipelines make of the number of patches (a
straight line, `calculate_shift` there). The coefficients of its plans are smooth functions of mu.
So plans are traced at some mus (Chebyshev's points of the second kind, both ends included) and the
runtime takes the polynomial through them; how many points that takes is tried out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from diffusers import SchedulerMixin

from latentc.exporter.classes import record_of
from latentc.exporter.components.description import Shifted
from latentc.exporter.components.learned_variance import VARIANCE, learns_variance
from latentc.exporter.schedulers.tables import AllRefused, trace
from latentc.runtimes.bundle.structures import Shift, TensorSpec
from latentc.runtimes.errors import BundleError, ExportError
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.programs.statements import Program, loop_of
from latentc.runtimes.sampling.plan import PlanTable, SamplingPlan, join
from latentc.runtimes.sampling.plan_schema import ROW_FIELDS

_NUMBERS = ("timesteps", "input_scale", "init_noise_scale", "add_noise", "known")
# Latents of an image, height times width, up to which there are plans where the model has no limit
# of its own: with 8 pixels to a latent 4096 by 4096 pixels, or any others of 16.8 megapixels. The
# larger the image is, the closer the first noise levels come to each other; a little beyond they
# are equal in float32, and diffusers' FlowMatchEulerDiscreteScheduler fails. Some schedulers fail
# before, or have no exact plans so far: theirs are for images of a quarter of it.
LARGEST_AREAS = (512 * 512, 256 * 256)
TOLERANCE = 1e-6  # of a number of a plan, by the largest of its kind
# How many mus are tried. Chebyshev's points of n are among those of m where n - 1 divides m - 1, so
# next to nothing is traced in vain.
_COUNTS = (6, 11, 16, 31, 61)
_CHECKED = (0.02, 0.37, 0.81)  # where between the ends all plans are checked


@dataclass(frozen=True)
class Told:
    """A `Told` holds what a pipeline tells its scheduler besides the number of steps.

    `even_sigmas`: evenly spaced noise levels; `shift`: the line that mu is on, None where it tells
    none; `ranges`: the smallest and the largest mu that there are to be plans for, equal where the
    size is fixed; where there are several ranges, the first that the scheduler can have;
    `variance`: whether it has a model that predicts the variance of noise.
    """

    even_sigmas: bool = False
    shift: Shift | None = None
    ranges: tuple[tuple[float, float], ...] = ()
    variance: bool = False

    def options(self, mu: float | None = None) -> Callable[[int], Mapping[str, Any]]:
        """Return a function that gives the arguments of `set_timesteps` for a number of steps."""

        def arguments(steps: int) -> dict[str, Any]:
            options: dict[str, Any] = {} if mu is None else {"mu": mu}
            if self.even_sigmas:
                options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
            return options

        return arguments


def line(config: Mapping[str, Any], shifted: Shifted | None) -> Shift | None:
    """Return the line that mu is on, by height times width of the latents."""
    if shifted is None or not config.get("use_dynamic_shifting"):
        return None
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", shifted.max_shift) - base) / (last - first)
    return Shift(base - slope * first, slope / shifted.patch**2)


def told_by(
    pipeline_class: str,
    shift: Shift | None,
    latents: Latents,
    sample: TensorSpec,
    programs: Sequence[Program],
) -> Told:
    """Return what pipelines of this class tell their scheduler.

    Args:
        sample: of the denoiser's input; its height and width may be fixed.
        programs: all whose loops may follow the scheduler.
    """
    even = record_of(pipeline_class).even_sigmas
    variance = all(loop_of(program).state.variance is not None for program in programs)
    if shift is None:
        return Told(even, variance=variance)
    fixed = [side for side in sample.shape[2:] if isinstance(side, int)]
    if len(fixed) == 2:
        return Told(even, shift, ((shift.of(*fixed), shift.of(*fixed)),), variance)
    smallest = shift.of(1, latents.multiple**2)
    areas = (latents.maximum**2,) if latents.maximum else LARGEST_AREAS
    ends = [shift.of(1, area) for area in areas]
    ranges = tuple((min(smallest, end), max(smallest, end)) for end in ends)
    return Told(even, shift, ranges, variance)


def trace_told(
    scheduler: SchedulerMixin,
    steps: Sequence[int],
    told: Told,
    skip_refused: bool = False,
) -> PlanTable:
    """Return the plans of a scheduler that is told so, for every mu where it depends on it.

    Raises:
        ExportError: as `latentc.exporter.schedulers.tables.trace` does, or no polynomial comes
        close enough.
    """
    if learns_variance(scheduler) and not told.variance:
        raise ExportError(
            f"{type(scheduler).__name__} expects a model that predicts the variance of noise, and "
            f"this one does not: save the pipeline with another {VARIANCE}, such as 'fixed_small'"
        )
    if not scheduler.config.get("use_dynamic_shifting"):
        options = told.options()
        return trace(scheduler, steps, step_options=options, skip_refused=skip_refused).table
    if told.shift is None:
        raise ExportError(
            f"{type(scheduler).__name__} shifts its noise by the image's size, which this kind "
            "of pipeline does not tell it"
        )
    traced = _Traced(scheduler, steps, told, skip_refused)
    *better, last = told.ranges
    for low, high in better:
        with suppress(ExportError):
            return traced.table(_points(traced, low, high))
    return traced.table(_points(traced, *last))


def trace_more(
    there: PlanTable,
    scheduler: SchedulerMixin,
    steps: Sequence[int],
    told: Told,
    skip_refused: bool = False,
) -> PlanTable:
    """Return a table with the plans of more steps: at its own mus if those are enough for them,
    else with all its plans anew, as all are for the same mus.

    Raises:
        ExportError: as `trace_told` does.
    """
    if len(there.shifts) == 1:
        return there.merge(trace_told(scheduler, steps, told, skip_refused))
    traced = _Traced(scheduler, steps, told, skip_refused)
    with suppress(ExportError):
        traced.check(there.shifts)
        return there.merge(traced.table(there.shifts))
    whole = sorted({*there.step_counts, *steps})
    return trace_told(scheduler, whole, told, skip_refused)


class _NotClose(ExportError):
    """A polynomial through plans is not close to a plan between them."""


class _Traced:
    """The plans of a scheduler at some mus: those of most steps, by which the mus are chosen, are
    traced first, and nothing twice."""

    def __init__(
        self,
        scheduler: SchedulerMixin,
        steps: Sequence[int],
        told: Told,
        skip_refused: bool,
    ) -> None:
        counts = set(steps)
        self._scheduler, self._told, self._skip_refused = scheduler, told, skip_refused
        self._longest, self._others = max(counts), counts - {max(counts)}
        self._known: dict[float, PlanTable] = {}

    def longest(self, mu: float) -> PlanTable:
        """Return the plan of most steps at `mu`."""
        if mu not in self._known:
            self._known[mu] = self._trace(mu, [self._longest])
        return self._known[mu]

    def all(self, mu: float) -> PlanTable:
        """Return the plans of all step counts at `mu`."""
        tables = [self.longest(mu)]
        if self._others:
            with suppress(AllRefused):
                tables.append(self._trace(mu, self._others))
        return join(tables)

    def checked(self, mu: float) -> PlanTable:
        """Return them when each was run beside the scheduler."""
        return self._trace(mu, {self._longest, *self._others}, check=True)

    def check(self, mus: Sequence[float]) -> None:
        """Raise `_NotClose` where the polynomial through the plans of most steps at these points of
        Chebyshev is not close to such plans between them."""
        table = _joined(self.longest(mu) for mu in mus)
        between = _chebyshev(mus[0], mus[-1], 2 * len(mus) - 1)[1::2]
        for mu in (*between[:2], between[len(between) // 2], *between[-2:]):
            _check(table, self.longest(mu), mu, TOLERANCE / 2)

    def table(self, mus: Sequence[float]) -> PlanTable:
        """Return the plans of all step counts at these mus.

        Raises:
            ExportError: the scheduler refuses a step count at some of them only, or the polynomial
                through the plans is not close to those at others.
        """
        if len(mus) == 1:
            return self.checked(mus[0])
        table = _joined(self.all(mu) for mu in mus)
        for part in _CHECKED:
            mu = mus[0] + part * (mus[-1] - mus[0])
            _check(table, self.checked(mu), mu, TOLERANCE)
        return table

    def _trace(self, mu: float, counts: Iterable[int], check: bool = False) -> PlanTable:
        options, skip_refused = self._told.options(mu), self._skip_refused
        traced = trace(
            self._scheduler,
            counts,
            step_options=options,
            skip_refused=skip_refused,
            check=check,
        )
        return replace(traced.table, shift=np.full(len(traced.table.steps), mu))


def _points(traced: _Traced, low: float, high: float) -> Sequence[float]:
    """Return as few mus as the polynomial through the plan of most steps at them needs.

    Raises:
        ExportError: no polynomial comes close enough, or the scheduler refuses so many steps.
    """
    if low == high:
        return [low]
    traced.longest(high)  # schedulers that refuse some sizes refuse large images
    reason = ""
    for count in _COUNTS:
        mus = _chebyshev(low, high, count)
        try:
            traced.check(mus)
        except _NotClose as error:
            reason = str(error)
            continue
        return mus
    raise ExportError(f"no polynomial of mu comes close to this scheduler: {reason}")


def _joined(parts: Iterable[PlanTable]) -> PlanTable:
    """Return plans at several mus as one table; `ExportError` where one is of another kind."""
    try:
        return join(parts)
    except BundleError as error:
        raise ExportError(f"plans depend on the image's size in no even way: {error}") from error


def _chebyshev(low: float, high: float, count: int) -> list[float]:
    """Return Chebyshev's points of the second kind, ascending, the ends to the last bit. Points of
    two counts that are equal are so to the last bit."""
    inner = [
        (low + high) / 2 - (high - low) / 2 * math.cos(math.pi * (index / (count - 1)))
        for index in range(1, count - 1)
    ]
    return [low, *inner, high]


def _check(table: PlanTable, traced: PlanTable, mu: float, limit: float) -> None:
    """Raise `_NotClose` where a plan of `table` at `mu` is not as it was traced there."""
    for steps in traced.step_counts:
        starts = traced.starts(steps)
        pairs = [
            (table.plan(steps, start, mu), traced.plan(steps, start))
            for start in {0, starts[len(starts) // 2], starts[-1]}
        ]
        # Other numbers of a plan that starts late are those of the whole one.
        names = {True: (*_NUMBERS, *ROW_FIELDS), False: ("add_noise", *ROW_FIELDS)}
        worst = max(_difference(*p, name) for p in pairs for name in names[p[1].start == 0])
        if not worst <= limit:
            raise _NotClose(
                f"the plan of {steps} steps at mu {mu:g} is {worst:.1e} off, allowed is {limit:.0e}"
            )


def _difference(found: SamplingPlan, expected: SamplingPlan, name: str) -> float:
    one, other = (np.asarray(getattr(plan, name), np.float64) for plan in (found, expected))
    if one.shape != other.shape:
        return math.inf
    apart = np.abs(np.nan_to_num(one) - np.nan_to_num(other)).max(initial=0.0)
    return float(apart / max(1.0, np.abs(np.nan_to_num(other)).max(initial=0.0)))
