"""A loop of a program: its branches on one batch, through the sampling plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Session, cast
from latentc.runtimes.backends.sessions import Sessions
from latentc.runtimes.calls.request import Request
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.statements import (
    GUIDED,
    Branch,
    During,
    Feed,
    Loop,
    Push,
    State,
    Window,
    value_of,
)
from latentc.runtimes.sampling import noise
from latentc.runtimes.sampling.blending import blended
from latentc.runtimes.sampling.packing import Packing, unpacked_steps
from latentc.runtimes.sampling.plan import PlanTable, SamplingPlan
from latentc.runtimes.sampling.sampler import Adjust, Rescale, Steps, denoise
from latentc.runtimes.sampling.step_cache import StepCache, kinds
from latentc.runtimes.sampling.views import View, cut, merged, one_by_one, views_of


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


def in_window(
    call: Request, loop: Loop, window: Window, evaluations: int, timesteps: Array | None = None
) -> Array:
    """Return whether each evaluation is in a window: bool [evaluations, columns], one column where
    the window is the same for all.

    Args:
        timesteps: [evaluations], those of the plan, which windows of timesteps need.
    """
    places = np.arange(evaluations).reshape(-1, 1)
    bounds = (window.start, window.stop)
    start, stop = (
        np.array(call.numbers[bound] if isinstance(bound, str) else (bound,)) for bound in bounds
    )
    if window.count == "timestep":
        assert timesteps is not None
        times = timesteps.reshape(-1, 1)
        return (start <= times) & (times < stop)
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
        self._base = next(branch for branch in self.branches if not branch.push)
        types = call.facts.types
        self._packing = Packing(
            inputs=tuple(state.input for state in loop.states),
            predictions=tuple(state.prediction for state in loop.states),
            shapes=tuple(
                tuple(size.value(call.symbols) for size in types[state.noise].shape)
                for state in loop.states
            ),
        )

    def steps(self, generators: noise.Generators) -> tuple[list[Array], Steps]:
        """Return the first value of each state, and the steps from there."""
        states = [self._first(state) for state in self._loop.states]
        first = self._packing.packed(states)
        views = self._views(first)
        all_run = guided(self._call, self._loop, self._plan.num_evaluations)
        count = 1 if views is None else len(views)
        predict = self._predict(all_run, count)
        steps = denoise(
            self._plan,
            first if views is None else cut(first, views),
            predict if count == 1 else one_by_one(predict, count, self._call.made),
            lambda: self._noise(generators, states, views),
            weights=self._weights(all_run),
            adjust=self._adjustments(),
            variance=self._variance(predict),
            segments=self._packing.segments(),
        )
        if views is not None:
            steps = merged(steps, views, first.shape)
        kept = None if self._call.continues(self._loop) else self._kept(states)
        if kept is not None:
            steps = blended(steps, self._plan, *kept)
        return states, unpacked_steps(steps, self._packing) if self._packing.several else steps

    def _kept(self, states: list[Array]) -> tuple[Array, Array, Array] | None:
        """Return what is put back after each step: where not, with what, and with which noise; None
        where nothing is. A state that keeps nothing is all its own."""
        keeps = [state.keep for state in self._loop.states]
        if not any(keeps):
            return None
        parts: list[list[Array]] = [[], [], []]
        for keep, state in zip(keeps, states, strict=True):
            own = (
                [np.ones_like(state), np.zeros_like(state), np.zeros_like(state)]
                if keep is None
                else [
                    np.broadcast_to(self._images(name), state.shape)
                    for name in (keep.where, keep.value, keep.noise)
                ]
            )
            for part, array in zip(parts, own, strict=True):
                part.append(array)
        where, value, drawn = map(self._packing.packed, parts)
        return where, value, drawn

    def _views(self, first: Array) -> list[View] | None:
        """Return the places of the views, None where the denoiser is given all of the state."""
        views = self._loop.views
        return None if views is None else views_of(first.shape[2:], views.size, views.stride)

    def _noise(
        self, generators: noise.Generators, states: list[Array], views: list[View] | None
    ) -> Array:
        """Draw noise for each state in turn; of views, for one after the other."""
        if views is None:
            return self._packing.packed([noise.draw(generators, state.shape) for state in states])
        shapes = [states[0][..., rows, columns].shape for rows, columns in views]
        return np.concatenate([noise.draw(generators, shape) for shape in shapes])

    def _first(self, state: State) -> Array:
        """Return what a state begins with."""
        if self._call.continues(self._loop):
            assert state.clean is not None
            sample = self._images(state.clean)
        else:
            clean = None
            if state.clean is not None and self._call.holds(state.clean_when):
                clean = self._images(state.clean)
            sample = self._plan.initial_sample(self._images(state.noise), clean)
        return sample.astype(np.float32, copy=False)

    def _weights(self, all_run: list[bool]) -> list[tuple[float, ...]]:
        """Return for each evaluation the weight of each branch that it evaluates."""
        count = self._plan.num_evaluations
        pushing = [
            (branch, push, self._in_window(push.during, count))
            for branch in self.branches
            for push in branch.push
        ]
        alone = (1.0,)
        return [
            self._weights_of([(b, push) for b, push, within in pushing if within[index]])
            if all_run[index]
            else alone
            for index in range(count)
        ]

    def _in_window(self, window: Window | None, count: int) -> list[bool]:
        """Return whether each evaluation is in a window, which is the same for all columns."""
        if window is None:
            return [True] * count
        within = in_window(self._call, self._loop, window, count, self._plan.timesteps)
        return [bool(each) for each in within[:, 0]]

    def _weights_of(self, pushing: Sequence[tuple[Branch, Push]]) -> tuple[float, ...]:
        """Return the weight of each branch: one for the base, and for each push what it moves from
        one branch to another, constants and numbers of the call apart, so that 1 + (g - 1) is g."""
        constants = {each.name: 0.0 for each in self.branches}
        constants[self._base.name] = 1.0
        scales: dict[str, dict[str, float]] = {each.name: {} for each in self.branches}
        for branch, push in pushing:
            for name, sign in ((push.branch, 1.0), (branch.name, -1.0)):
                own = scales[name]
                own[push.by] = own.get(push.by, 0.0) + sign
                constants[name] -= sign * push.less
        return tuple(
            constants[each.name]
            + sum(factor * self._call.number(by) for by, factor in scales[each.name].items())
            for each in self.branches
        )

    def _adjustments(self) -> list[Adjust]:
        """Return what is done to what the branches make together, in order."""
        adjustments: list[Adjust] = []
        if len(self.branches) < 2:
            return adjustments
        rescale, combine = self._loop.rescale, self._loop.combine
        amount = 0.0 if rescale is None else self._call.number(rescale)
        if amount != 0.0:
            adjustments.append(Rescale(amount, self.branches.index(self._base)))
        names = [branch.name for branch in self.branches]
        if combine is not None and {*combine.feeds.values()} <= {GUIDED, *names}:
            session = self._held.enter_context(self._sessions.using(combine.component))
            places = {
                input: None if source == GUIDED else names.index(source)
                for input, source in combine.feeds.items()
            }
            adjustments.append(_combining(session, places, self._loop.state.prediction))
        return adjustments

    def _variance(self, predict: StepCache) -> Callable[[], Array] | None:
        """Return what says the variance of the noise: the base in the evaluation just made, as
        diffusers' pipelines take it."""
        if self._loop.state.variance is None:
            return None
        made, place = self._call.made, self.branches.index(self._base)

        def said() -> Array:
            assert predict.variance is not None
            rows = predict.variance
            return rows if len(rows) == made else rows[place * made : (place + 1) * made]

        return said

    def _predict(self, all_run: list[bool], views: int) -> StepCache:
        """Return what predicts for the branches that run, for one of several views at a time."""
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
        return StepCache(
            self._denoisers(fixed, views),
            self._bind(cache.component, fixed, self._held)
            if cache is not None and interval > 1
            else {},
            () if cache is None else cache.keeps,
            [kind for kind in kinds(all_run, interval) for _ in range(views)],
            {rows: [each for each in own for _ in range(views)] for rows, own in varying.items()}
            if changing
            else None,
            packing=self._packing,
            variance=self._loop.state.variance,
        )

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
            name: in_window(self._call, self._loop, feed.during, count, self._plan.timesteps)
            for name, feed in self._feeds(self._base).items()
            if isinstance(feed, During)
        }
        if all(window.all() for window in windows.values()):
            return [{}] * count
        return [
            {
                name: constants[name] * each[index].astype(np.float32)
                for name, each in windows.items()
            }
            for index in range(count)
        ]

    def _denoisers(
        self, fixed: Mapping[int, Mapping[str, Array]], views: int
    ) -> Callable[[int], Mapping[int, Session]]:
        """Return what says which denoiser runs in an evaluation; of several views each has as many
        evaluations. One denoiser is bound at a time, so that a pipeline that keeps nothing open
        holds one of them in memory."""
        count = self._plan.num_evaluations
        names = [self._loop.denoiser] * count
        for switch in reversed(self._loop.switches):
            within = self._in_window(switch.during, count)
            names = [
                switch.component if inside else name
                for inside, name in zip(within, names, strict=True)
            ]
        held = self._held.enter_context(ExitStack())
        bound: dict[str, Mapping[int, Session]] = {}

        def denoiser_of(index: int) -> Mapping[int, Session]:
            name = names[index // views]
            if name not in bound:
                held.close()
                bound.clear()
                bound[name] = self._bind(name, fixed, held)
            return bound[name]

        return denoiser_of

    def _bind(
        self, component: str, by_rows: Mapping[int, Mapping[str, Array]], held: ExitStack
    ) -> dict[int, Session]:
        """Return a component with what is the same in all evaluations given, by number of rows.

        Args:
            held: closes it.
        """
        session = held.enter_context(self._sessions.using(component))
        bound = {}
        for rows, constants in by_rows.items():
            used = {name: value for name, value in constants.items() if name in session.inputs}
            bound[rows] = session.bind(cast(session, used))
            held.callback(bound[rows].close)
        return bound


def _combining(session: Session, places: Mapping[str, int | None], prediction: str) -> Adjust:
    """Return what replaces a weighted sum by what a component makes of it.

    Args:
        places: of each input the branch whose prediction it is fed; None for the weighted sum.
        prediction: the component's output.
    """

    def combine(predictions: Array, guided: Array, images: int) -> None:
        shape = (images, *predictions.shape[1:])
        branches = predictions.reshape(-1, *shape)
        feeds = {
            input: guided.reshape(shape) if place is None else branches[place]
            for input, place in places.items()
        }
        outputs = session.run(cast(session, feeds))
        np.copyto(guided, outputs[prediction].reshape(-1))

    return combine
