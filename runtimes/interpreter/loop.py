"""A loop of a program: its branches on one batch, through the sampling plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from runtimes import noise
from runtimes.blending import blended
from runtimes.errors import InputError
from runtimes.interpreter.request import Request
from runtimes.plan import PlanTable, SamplingPlan
from runtimes.programs.statements import Branch, During, Feed, Loop, Window, value_of
from runtimes.sampler import Rescale, Steps, denoise
from runtimes.session import Array, Session, cast
from runtimes.sessions import Sessions
from runtimes.step_cache import StepCache, kinds
from runtimes.views import View, cut, merged, one_by_one, views_of


@dataclass(frozen=True)
class Schedule:
    """The plans of the scheduler that a call uses, for images of its size."""

    table: PlanTable
    num_train_timesteps: int
    shift: float | None = None


def sampling_plan(call: Request, loop: Loop, schedule: Schedule) -> SamplingPlan:
    """Return what of a schedule is run, counted as diffusers' pipelines count it.

    Raises:
        PlanNotFound: there is no plan for the step count.
        InputError: nothing would be run.
    """
    part, table, shift = loop.part, schedule.table, schedule.shift
    steps = int(call.number(loop.plan.steps))
    if part.start is not None and call.continues(loop):
        cutoff = round(schedule.num_train_timesteps * (1 - call.number(part.start)))
        plan = table.plan_from_timestep(steps, cutoff, shift)
    else:
        plan = table.plan_from_step(steps, first_step(call, loop, steps), shift)
    stop = 1.0 if part.stop is None else call.number(part.stop)
    if stop == 1:
        return plan
    cutoff = round(schedule.num_train_timesteps * (1 - stop))
    kept = int(np.count_nonzero(plan.timesteps >= cutoff))
    if kept < 1:
        raise InputError(f"{part.stop} {stop:g} leaves no step")
    return plan.until(kept)


def first_step(call: Request, loop: Loop, steps: int) -> int:
    """Return the step to start with, as diffusers' image-to-image pipelines choose it.

    Raises:
        InputError: the strength leaves no step.
    """
    if loop.part.strength is None:
        return 0
    strength = call.number(loop.part.strength)
    part = min(steps * strength, steps)
    kept = int(part) if loop.part.rounds == "down" else steps - int(steps - part)
    if kept < 1:
        raise InputError(
            f"strength {strength:g} of {steps} steps leaves none: give more steps, or a strength "
            f"of at least {1 / steps:g}"
        )
    return steps - kept


def live_branches(call: Request, loop: Loop) -> list[Branch]:
    """Return the branches that run in a call."""
    return [branch for branch in loop.branches if call.holds(branch.when)]


def guided(call: Request, loop: Loop, evaluations: int) -> list[bool]:
    """Return for each evaluation whether all branches of the call run, not the base alone."""
    windows = [b.during for b in live_branches(call, loop) if b.during is not None]
    within = [in_window(call, loop, window, evaluations)[:, 0] for window in windows]
    return [all(bool(each[index]) for each in within) for index in range(evaluations)]


def batches(call: Request, evaluations: int) -> list[int]:
    """Return how many rows the denoiser gets in the evaluations of a call."""
    loop = call.facts.loop
    whole = len(live_branches(call, loop)) * call.made
    return [whole] if all(guided(call, loop, evaluations)) else [whole, call.made]


def in_window(call: Request, loop: Loop, window: Window, evaluations: int) -> Array:
    """Return whether each evaluation is in a window: bool [evaluations, columns], one column where
    the window is the same for all."""
    places = np.arange(evaluations).reshape(-1, 1)
    bounds = (window.start, window.stop)
    start, stop = (
        np.array(call.numbers[bound] if isinstance(bound, str) else (bound,)) for bound in bounds
    )
    if window.count == "within":
        return (places / evaluations >= start) & ((places + 1) / evaluations <= stop)
    # Of the step count, though some schedulers evaluate more often: so does diffusers.
    whole = evaluations if window.count == "floor" else int(call.number(loop.plan.steps))
    first, end = ((whole * each).astype(np.int64) for each in (start, stop))
    return (first <= places) & (places < end)


class LoopRun:
    """One loop of one call.

    Args:
        images: name → the value with a row for each image that is made.
        held: closes what the loop opens when it is left.
    """

    def __init__(
        self,
        call: Request,
        loop: Loop,
        plan: SamplingPlan,
        images: Callable[[str], Array],
        sessions: Sessions,
        held: ExitStack,
    ) -> None:
        self._call = call
        self._loop = loop
        self._plan = plan
        self._images = images
        self._sessions = sessions
        self._held = held
        self.branches = live_branches(call, loop)
        self._base = next(each for each in self.branches if not each.push)

    def steps(self, generators: noise.Generators) -> tuple[Array, Steps]:
        """Return the first sample and the steps from there."""
        loop, call = self._loop, self._call
        first = self._first()
        views = self._views(first)
        all_run = guided(call, loop, self._plan.num_evaluations)
        steps = denoise(
            self._plan,
            first if views is None else cut(first, views),
            self._predict(all_run, 1 if views is None else len(views)),
            lambda: self._noise(generators, first, views),
            weights=self._weights(),
            guided=all_run,
            rescale=self._rescale(),
        )
        if views is not None:
            steps = merged(steps, views, first.shape)
        keep = loop.state.keep
        if keep is None or call.continues(loop):
            return first, steps
        where, value, drawn = map(self._images, (keep.where, keep.value, keep.noise))
        return first, blended(steps, self._plan, where, value, drawn)

    def _views(self, first: Array) -> list[View] | None:
        """Return the places of the views, None where the denoiser is given all of the state."""
        views = self._loop.views
        return None if views is None else views_of(first.shape[2:], views.size, views.stride)

    def _noise(self, generators: noise.Generators, first: Array, views: list[View] | None) -> Array:
        """Draw noise for the sample; of views, for one after the other."""
        if views is None:
            return noise.draw(generators, first.shape)
        shapes = [first[..., rows, columns].shape for rows, columns in views]
        return np.concatenate([noise.draw(generators, shape) for shape in shapes])

    def _first(self) -> Array:
        state = self._loop.state
        if self._call.continues(self._loop):
            assert state.clean is not None
            sample = self._images(state.clean)
        else:
            clean = None
            if state.clean is not None and self._call.holds(state.clean_when):
                clean = self._images(state.clean)
            sample = self._plan.initial_sample(self._images(state.noise), clean)
        return sample.astype(np.float32, copy=False)

    def _weights(self) -> list[float]:
        """Return the weight of each branch: one for the base, and for each push what it moves from
        one branch to another, constants and numbers of the call apart, so that 1 + (g - 1) is g."""
        constants = {each.name: 0.0 for each in self.branches}
        constants[self._base.name] = 1.0
        scales: dict[str, dict[str, float]] = {each.name: {} for each in self.branches}
        for branch in self.branches:
            for push in branch.push:
                for name, sign in ((push.branch, 1.0), (branch.name, -1.0)):
                    own = scales[name]
                    own[push.by] = own.get(push.by, 0.0) + sign
                    constants[name] -= sign * push.less
        return [
            constants[each.name]
            + sum(factor * self._call.number(by) for by, factor in scales[each.name].items())
            for each in self.branches
        ]

    def _rescale(self) -> Rescale | None:
        name = self._loop.rescale
        amount = 0.0 if name is None else self._call.number(name)
        if amount == 0.0 or len(self.branches) < 2:
            return None
        return Rescale(amount, self.branches.index(self._base))

    def _predict(self, all_run: list[bool], views: int) -> Callable[[Array, Array], Array]:
        """Return what predicts for the branches that run; of several views, for one at a time."""
        made = self._call.made
        by_rows = {len(self.branches) * made: self._constants(self.branches)}
        if len(self.branches) > 1 and not all(all_run):
            by_rows[made] = self._constants([self._base])
        varying = {rows: self._varying(own) for rows, own in by_rows.items()}
        changing = {name for steps in varying.values() for name in steps[0]}
        fixed = {
            rows: {name: value for name, value in own.items() if name not in changing}
            for rows, own in by_rows.items()
        }
        cache = self._loop.cache
        interval = 1 if cache is None else int(self._call.number(cache.every))
        predict = StepCache(
            self._bind(self._loop.denoiser, fixed),
            self._bind(cache.component, fixed) if cache is not None and interval > 1 else {},
            () if cache is None else cache.keeps,
            [kind for kind in kinds(all_run, interval) for _ in range(views)],
            {rows: [each for each in own for _ in range(views)] for rows, own in varying.items()}
            if changing
            else None,
            sample=self._loop.state.input,
            prediction=self._loop.state.prediction,
        )
        return predict if views == 1 else one_by_one(predict, views, made)

    def _feeds(self, branch: Branch) -> dict[str, Feed]:
        return {**self._loop.feeds, **branch.feeds}

    def _constants(self, branches: Iterable[Branch]) -> dict[str, Array]:
        """Return what the branches are fed, one after the other."""
        feeds = [self._feeds(branch) for branch in branches]
        return {
            name: np.concatenate([self._images(value_of(own[name])) for own in feeds])
            for name in feeds[0]
        }

    def _varying(self, constants: Mapping[str, Array]) -> list[dict[str, Array]]:
        """Return for each evaluation the feeds that are not the same in all of them."""
        count = self._plan.num_evaluations
        windows = {
            name: in_window(self._call, self._loop, feed.during, count)
            for name, feed in self._feeds(self._base).items()
            if isinstance(feed, During)
        }
        if all(each.all() for each in windows.values()):
            return [{}] * count
        return [
            {
                name: constants[name] * each[index].astype(np.float32)
                for name, each in windows.items()
            }
            for index in range(count)
        ]

    def _bind(
        self, component: str, by_rows: Mapping[int, Mapping[str, Array]]
    ) -> dict[int, Session]:
        """Return a component with what is the same in all evaluations given, by number of rows."""
        session = self._held.enter_context(self._sessions.using(component))
        bound = {}
        for rows, constants in by_rows.items():
            used = {name: value for name, value in constants.items() if name in session.inputs}
            bound[rows] = session.bind(cast(session, used))
            self._held.callback(bound[rows].close)
        return bound
