"""Scheduler → table of sampling plans: by name, traced, and checked against the original."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin

from latentc.exporter.components.learned_variance import VARIANCE, learns_variance
from latentc.exporter.schedulers.checking import TOLERANCE, check_run, probe
from latentc.exporter.schedulers.names import (
    DEFAULT_SCHEDULERS,
    SCHEDULERS,
    NamedScheduler,
    unknown_scheduler,
)
from latentc.exporter.schedulers.rows import TracedRuns, build_table, same_row
from latentc.exporter.schedulers.symbols import NotLinear
from latentc.exporter.schedulers.tracing import RawStep, StepTracer
from latentc.runtimes.errors import ExportError
from latentc.runtimes.sampling.plan import PlanTable, join

__all__ = [
    "DEFAULT_SCHEDULERS",
    "DEFAULT_STEPS",
    "LEFT_OPEN",
    "OWN_STEPS",
    "SCHEDULERS",
    "SIZED_STEPS",
    "AllRefused",
    "NamedScheduler",
    "TracedSchedule",
    "build",
    "rebuild",
    "resolve",
    "trace",
]

# Of a scheduler's config: the entries that its source does not have.
LEFT_OPEN = "_use_default_values"
DEFAULT_STEPS = tuple(range(1, 61))
OWN_STEPS = tuple(range(1, 101))  # of a pipeline's own scheduler
# Of one whose plans follow the image's size, which are there many times over.
SIZED_STEPS = (*DEFAULT_STEPS, 100)

# A late run whose rows equal the full run's for so many steps is taken to have caught up.
_PATIENCE = 3
# Up to so many evaluations every start is checked; of longer plans a few, until they have caught up
# and as many evaluations more.
_CHECK_ALL = 8

StepOptions = Callable[[int], Mapping[str, Any]]


class AllRefused(ExportError):
    """The scheduler itself runs with none of the step counts."""


@dataclass(frozen=True)
class TracedSchedule:
    """A table, the step counts that the scheduler refused with its reasons, and the worst
    relative L2 difference to the original scheduler that was seen while checking."""

    table: PlanTable
    refused: Mapping[int, str]
    worst_error: float


def resolve(name: str) -> NamedScheduler:
    """Return what a short name of `SCHEDULERS` or a diffusers class name stands for.

    Raises:
        InputError: the name is neither.
        ExportError: a class whose library is missing.
    """
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    try:
        if isinstance(found, type) and hasattr(found, "set_timesteps") and hasattr(found, "step"):
            return NamedScheduler(name, {})
    except ImportError as error:  # diffusers' stand-in for a class whose library is missing
        raise ExportError(_one_line(error)) from error
    raise unknown_scheduler(name)


def rebuild(class_name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """Return a scheduler with every entry of `config`, as a pipeline has it.

    A pipeline corrects entries of old configurations that the source left open (`steps_offset`,
    `clip_sample`, `skip_prk_steps`), and diffusers goes on to call them left open. `build` takes
    the class's default for those, as diffusers does for a scheduler that takes another's place.

    Raises:
        ExportError: as `build`.
    """
    return build(class_name, {k: v for k, v in config.items() if k != LEFT_OPEN})


def build(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """Return the scheduler called `name`, made from the config of a pipeline's own scheduler.

    config: best `pipeline.scheduler.config` as it is. Its private entry `_use_default_values`
        lists what the source left open; diffusers lets the new class choose its own defaults
        for those, and so do we.
    Raises `ExportError` if there is none or it cannot be made from that config.
    """
    named = resolve(name)
    cls = getattr(diffusers, named.class_name)
    init_keys = set(getattr(cls, "_get_init_keys", lambda _: set())(cls))
    overrides = {key: value for key, value in named.overrides.items() if key in init_keys}
    # Entries of another class's config that this one lacks are no news: be quiet about them.
    chatter = logging.getLogger("diffusers.configuration_utils")
    was, chatter.disabled = chatter.disabled, True
    try:
        return cls.from_config(config, **overrides)
    except Exception as error:
        raise ExportError(f"{named.class_name}: {_one_line(error)}") from error
    finally:
        chatter.disabled = was


def trace(
    scheduler: SchedulerMixin,
    step_counts: Iterable[int] | None = None,
    *,
    eta: float = 0.0,
    step_options: StepOptions | None = None,
    skip_refused: bool = False,
    check: bool = True,
) -> TracedSchedule:
    """Trace `scheduler` (left untouched) for each step count and check every plan.

    step_counts: None means `DEFAULT_STEPS`, less those that the scheduler refuses; a refused
        count that was asked for is an `ExportError`.
    eta: passed to schedulers whose step takes it; 0 is what diffusers' pipelines pass.
    skip_refused: leave out refused counts also where they were asked for.
    check: False where the caller compares the plans with checked ones.
    step_options: for a step count, more arguments for `set_timesteps` (`sigmas`, `mu`).
    Raises `ExportError` when the scheduler is not linear, or the plan differs from the
    original by more than 1e-6.
    """
    _refuse_variance(scheduler)
    refused: dict[int, str] = {}
    tables: list[PlanTable] = []
    worst = 0.0
    common: _Common | None = None
    for count in sorted(set(DEFAULT_STEPS if step_counts is None else step_counts), reverse=True):
        more = dict(step_options(count)) if step_options else {}
        try:
            with torch.inference_mode():  # numbers cost less where no gradient may be asked for
                one = _trace_count(scheduler, count, {"eta": eta}, more, check, common)
        except _Refused as reason:
            if step_counts is not None and not skip_refused:
                raise ExportError(
                    f"{_name(scheduler)} refuses {count} steps: diffusers itself fails there "
                    f"({reason}); take another number of steps"
                ) from reason
            refused[count] = str(reason)
            continue
        common = one.common
        tables.append(one.table)
        worst = max(worst, one.error)
    if not tables:
        raise AllRefused(f"{_name(scheduler)}: {next(iter(refused.values()), 'no step counts')}")
    return TracedSchedule(join(tables), dict(sorted(refused.items())), worst)


@dataclass(frozen=True)
class _Common:
    """A `_Common` says what the plans of all step counts of a scheduler have in common.

    window: after so many evaluations late runs go on like the full one; adds_known: noise is added
        to a clean sample at a start just as to what is known of it after the evaluation before;
        at_once: and to several samples at once as to one after the other.
    """

    window: int
    adds_known: bool
    at_once: bool


def _common(tracer: StepTracer, table: PlanTable) -> _Common | None:
    """Return what the table of most steps says of the others; None where it does not start at every
    step, so that nothing is said of others."""
    (count,) = table.step_counts
    starts = range(0, len(table.timesteps), getattr(tracer.scheduler, "order", 1))
    if table.starts(count) != tuple(starts):
        return None
    later = np.array(starts[1:], int)
    adds_known = np.array_equal(table.add_noise[later], table.known[later - 1])
    known = tracer.all_known()
    at_once = known is not None and np.array_equal(table.known, known)
    return _Common(table.window, adds_known, at_once)


@dataclass(frozen=True)
class _OneCount:
    """The table of one step count, the worst error of its plans where they were checked, and what
    it says of tables of fewer steps."""

    table: PlanTable
    error: float
    common: _Common | None


def _refuse_variance(scheduler: SchedulerMixin) -> None:
    """Raise `ExportError` where a scheduler reads a variance from the model's output, and no plan
    can: where it is the variance itself, or where the scheduler only cuts it off."""
    takes_it = VARIANCE in inspect.signature(type(scheduler).__init__).parameters
    kind = scheduler.config.get(VARIANCE) if takes_it else None
    if str(kind).startswith("learned") and not learns_variance(scheduler):
        raise ExportError(
            f"{_name(scheduler)} with the {VARIANCE} {kind!r} expects a model that predicts its "
            "variance, which is supported for DDPMScheduler and UnCLIPScheduler with "
            f"'learned_range'; other schedulers take none: set their {VARIANCE} to null"
        )


class _Refused(Exception):
    """The scheduler itself does not run with this step count."""


class _Differs(ExportError):
    """A plan is not what the scheduler does."""


def _trace_count(
    original: SchedulerMixin,
    count: int,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
    check: bool,
    common: _Common | None,
) -> _OneCount:
    """Return the table of one step count.

    common: what a table of more steps says of this one; where the plans turn out to differ from
        the scheduler it is looked at for itself.
    """
    tracer = _tracer(original, count, options, more)
    try:
        table = _traced(tracer, count, options, common)
        error = _check(tracer, table, count, options) if check else 0.0
        return _OneCount(table, error, common or _common(tracer, table))
    except _Differs:
        if common is None:
            raise
    return _trace_count(original, count, options, more, check, None)


def _tracer(
    original: SchedulerMixin, count: int, options: Mapping[str, Any], more: Mapping[str, Any]
) -> StepTracer:
    scheduler = copy.deepcopy(original)
    try:
        with np.errstate(all="ignore"):  # what has no noise levels is refused below
            scheduler.set_timesteps(count, **more)
    except Exception as error:
        raise _Refused(_one_line(error)) from error
    return StepTracer(scheduler, options)


def _traced(
    tracer: StepTracer, count: int, options: Mapping[str, Any], common: _Common | None
) -> PlanTable:
    scheduler = tracer.scheduler
    try:
        # What is not finite is refused by name, where a plan reads it.
        with tracer.intercepting(), np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            runs = _trace_runs(tracer, count, common)
        return build_table(runs)
    except NotLinear as error:
        raise ExportError(f"{_name(scheduler)} cannot become a plan: it {error}") from error
    except Exception as error:
        reason = probe(tracer, options)
        if reason is not None:
            raise _Refused(_one_line(reason)) from error
        raise ExportError(
            f"{_name(scheduler)} cannot be traced: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _trace_runs(tracer: StepTracer, count: int, common: _Common | None) -> TracedRuns:
    scheduler = tracer.scheduler
    evaluations = len(scheduler.timesteps)
    together = tracer.all_known() if common is not None and common.at_once else None
    tracer.reset(None)
    full: list[RawStep] = []
    entered = []
    known: list[tuple[float, float] | None] = []
    if together is not None:
        known = [(float(a), float(b)) for a, b in together]
    for i in range(evaluations):
        entered.append(tracer.enter(i))
        full.append(tracer.step(i))
        if together is None:
            known.append(tracer.known(i + 1))
    late: dict[int, list[RawStep]] = {}
    add_noise: dict[int, tuple[float, float]] = {}
    for start in range(0, evaluations, getattr(scheduler, "order", 1)):
        is_known = common is not None and common.adds_known and start
        pair = known[start - 1] if is_known else tracer.add_noise(start)
        window = None if common is None else common.window
        steps = _late_run(tracer, start, full, entered, window) if pair and start else []
        if pair is not None and steps is not None:
            add_noise[start] = pair
            late[start] = steps
    return TracedRuns(
        steps=count,
        full=full,
        late={start: steps for start, steps in late.items() if start},
        timesteps=scheduler.timesteps.double().numpy().copy(),
        init_noise_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        add_noise=add_noise,
        known=known,
    )


def _late_run(
    tracer: StepTracer,
    start: int,
    full: list[RawStep],
    entered: list[Any],
    window: int | None,
) -> list[RawStep] | None:
    """Return the first steps of a run from `start`, until it goes on like the full one.

    entered: what `StepTracer.enter` returned at each evaluation of the full run.
    window: how many steps that are, where it is known.
    """
    steps: list[RawStep] = []
    if window == 0:
        return steps
    tracer.reset(start)
    equal = 0
    for i in range(start, len(full) if window is None else min(start + window, len(full))):
        try:
            if tracer.enter(i) == entered[i]:
                break
            steps.append(tracer.step(i))
        except (ValueError, IndexError, TypeError):
            return None  # this scheduler cannot start here
        if window is None:
            equal = equal + 1 if same_row(steps[-1], full[i]) else 0
            if equal == _PATIENCE:
                break
    return steps


def _check(tracer: StepTracer, table: PlanTable, count: int, options: Mapping[str, Any]) -> float:
    starts = table.starts(count)
    if len(starts) > _CHECK_ALL:
        starts = (0, starts[len(starts) // 2], starts[-2])
    worst = 0.0
    for start in starts:
        plan = table.plan(count, start)
        if start:  # which goes on like the whole one
            plan = plan.until(table.window + _CHECK_ALL)
        try:
            error = check_run(tracer, plan, options)
        except Exception as failure:
            raise ExportError(
                f"{_name(tracer.scheduler)}, {count} steps from evaluation {start}: checking the "
                f"plan failed: {_one_line(failure)}"
            ) from failure
        if not error <= TOLERANCE:
            raise _Differs(
                f"{_name(tracer.scheduler)}, {count} steps from evaluation {start}: the plan "
                f"differs from the scheduler by {error:.1e}, allowed is {TOLERANCE:.0e}"
            )
        worst = max(worst, error)
    return worst


def _name(scheduler: SchedulerMixin) -> str:
    return type(scheduler).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
