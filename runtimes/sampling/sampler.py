"""The sampling loop. There is one, for every model, scheduler and backend.

A plan says what each step multiplies by what (`latentc.runtimes.sampling.plan`). Before the first
step the plan is compiled: every tensor of the state gets a buffer, a slot that only passes
something on becomes an alias, and what remains is a short list of multiply-adds into preallocated
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.errors import BackendError, InputError, NumericalError
from latentc.runtimes.sampling.plan import Clip, SamplingPlan
from latentc.runtimes.sampling.plan_schema import ClipKind

Predict: TypeAlias = Callable[[Array, Array], Array]
DrawNoise: TypeAlias = Callable[[], Array]
Variance: TypeAlias = Callable[[], Array]


@dataclass(frozen=True)
class Step:
    """A step is what the loop yields after each model evaluation.

    `latents` is a copy, float32 [B, *shape of a row]: it stays as it is and may be kept or changed.
    `others` are the other states of a loop that has several.
    """

    index: int
    total: int
    timestep: float
    latents: Array
    others: tuple[Array, ...] = ()


Steps: TypeAlias = Generator[Step, Array | None, None]
# Changes the guided prediction [B*n], flat, in place: (predictions [G*B, ...], guided, images B).
Adjust: TypeAlias = Callable[[Array, Array, int], None]


@dataclass(frozen=True)
class Rescale:
    """A `Rescale` gives each image's guided prediction the standard deviation that one branch's
    prediction has.

    `amount` says how much of it; 1 is all.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4
    (https://arxiv.org/abs/2305.08891): guidance makes predictions larger, and images too
    contrasty.
    """

    amount: float
    branch: int

    def __call__(self, predictions: Array, guided: Array, images: int) -> None:
        """Change `guided` [B*C*H*W] in place, made of `predictions` [G*B, C, H, W]."""
        own = guided.reshape(images, -1)
        branch = predictions.reshape(-1, *own.shape)[self.branch]
        wanted, found = (
            each.std(axis=1, keepdims=True, dtype=np.float64) for each in (branch, own)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = 1.0 + self.amount * (wanted / found - 1.0)
        np.multiply(own, factor.astype(own.dtype), out=own)


def with_latents(
    steps: Steps, latents_of: Callable[[Step], Array], taken: Callable[[Array], Array]
) -> Steps:
    """Yield the steps of `denoise` with other latents.

    Args:
        latents_of: the latents that a step is to show.
        taken: the sample that the loop goes on with, of the latents that were shown, or of those
            that the caller sent instead.
    """
    sample: Array | None = None
    while True:
        try:
            step = steps.send(sample)
        except StopIteration:
            return
        latents = latents_of(step)
        sent = yield replace(step, latents=latents)
        sample = taken(latents if sent is None else sent)


def denoise(
    plan: SamplingPlan,
    latents: Array,
    predict: Predict,
    draw_noise: DrawNoise | None = None,
    *,
    weights: Sequence[Sequence[float]] | None = None,
    adjust: Sequence[Adjust] = (),
    variance: Variance | None = None,
    segments: Sequence[slice] = (slice(None),),
    dtype: np.dtype[Any] | type = np.float32,
) -> Steps:
    """Run `plan` from `latents`, yielding a `Step` after each evaluation of the model.

    latents: [B, ...], often [B, C, H, W], the first sample (`SamplingPlan.initial_sample`).
    predict: (model input [G*B, ...], timestep float32 [1]) -> prediction of the input's shape.
        Branch g of the guidance has the rows g*B .. (g+1)*B-1. The input's memory is reused in the
        next step.
    draw_noise: () -> [B, ...], called exactly where the original scheduler draws.
    weights: for each evaluation one for each guidance branch that is evaluated, G of them; the
        prediction used is the branches' weighted sum. None: there is one branch.
    adjust: what is done to the weighted sum where more branches than one are evaluated, in order.
    variance: () -> [B, ...], what the model said in the last evaluation of the variance of noise:
        -1 is the smallest and 1 the largest one; a plan with limits of it needs it.
    segments: the numbers of a row that are clipped together.
    dtype: what is computed in; float64 is for checking plans.

    `send(array)` in place of `next()` replaces the sample before the next step. Closing the
    generator stops the run. Raises `NumericalError` when a prediction or a sample is not finite.
    """
    if draw_noise is None and plan.noise_draws.any():
        raise InputError("this plan draws noise in the loop, and no source of noise was given")
    if variance is None and plan.learns_variance:
        raise InputError(
            "this plan is for a model that predicts the variance of the noise, and this one does "
            "not; take another with `scheduler`"
        )
    weights = [(1.0,)] * plan.num_evaluations if weights is None else weights
    branches = max(map(len, weights))
    program = _Program(plan, latents, branches, segments, np.dtype(dtype))
    noise = None if draw_noise is None else _Noise(plan, draw_noise, variance)
    return _loop(plan, program, latents.shape, predict, noise, weights, adjust)


def _loop(
    plan: SamplingPlan,
    program: _Program,
    shape: tuple[int, ...],
    predict: Predict,
    noise: _Noise | None,
    weights: Sequence[Sequence[float]],
    adjust: Sequence[Adjust],
) -> Steps:
    model_input = program.inputs.reshape((-1, *shape[1:]))
    timesteps = plan.timesteps.astype(np.float32)
    total = plan.num_evaluations
    for index in range(total):
        program.load_input(index)
        guided, used = program.guided[index], weights[index]
        fed = model_input[: len(used) * shape[0]]
        predictions = predict(fed, timesteps[index : index + 1])
        _weighted_sum(predictions, used, guided, program.scratch)
        if len(used) > 1:
            for change in adjust:
                change(predictions, guided, shape[0])
        if not _all_finite(guided):
            raise NumericalError(
                f"the model returned NaN or infinity at step {index + 1} of {total} "
                f"(timestep {timesteps[index]:g})"
            )
        if noise is not None:
            noise.draw(index, program.noise)
        with np.errstate(invalid="ignore", over="ignore"):
            program.run(index)
        sample = program.samples[index]
        if not _all_finite(sample):  # the next prediction may hide it: of rounded activations, say
            raise NumericalError(
                f"the latents reach NaN or infinity at step {index + 1} of {total} (timestep "
                f"{timesteps[index]:g})"
            )
        edited = yield Step(
            index, total, float(plan.timesteps[index]), sample.reshape(shape).copy()
        )
        if edited is not None:
            np.copyto(sample, edited.reshape(-1))


class _Noise:
    """The noise of a plan's evaluations, with the variance that the model predicts for it."""

    def __init__(self, plan: SamplingPlan, draw: DrawNoise, variance: Variance | None) -> None:
        self._plan = plan
        self._draw = draw
        self._variance = variance

    def draw(self, index: int, out: Array) -> None:
        """Write the noise of evaluation `index` [B*C*H*W], if it draws any, into `out`."""
        if not self._plan.noise_draws[index]:
            return
        np.copyto(out, self._draw().reshape(-1))
        low, high = float(self._plan.log_low[index]), float(self._plan.log_high[index])
        if self._variance is None or math.isnan(low):
            return
        said = self._variance().reshape(-1).astype(out.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # the sample is looked at below
            share = (said + 1) / 2
            out *= np.exp((share * high + (1 - share) * low) / 2)


def _all_finite(values: Array) -> bool:
    # One pass that any NaN or infinity spoils; only if it is spoilt, look closer.
    with np.errstate(over="ignore"):
        square = np.dot(values, values)
    return bool(np.isfinite(square) or np.isfinite(values).all())


def _weighted_sum(predictions: Array, weights: Sequence[float], out: Array, scratch: Array) -> None:
    if predictions.size != len(weights) * out.size:
        raise BackendError(
            f"the model returned the shape {predictions.shape} for {len(weights)} guidance "
            f"branches of {out.size} values each"
        )
    branches = predictions.reshape(len(weights), -1)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is an error below
        np.multiply(branches[0], weights[0], out=out, dtype=out.dtype)
        for branch, weight in zip(branches[1:], weights[1:], strict=True):
            np.multiply(branch, weight, out=scratch, dtype=out.dtype)
            np.add(out, scratch, out=out)


@dataclass(frozen=True, slots=True)
class _Combine:
    """out = Σ factor · source, where the first factor is left out if it is 1."""

    out: Array
    terms: tuple[tuple[Array, float], ...]
    scratch: Array

    def __call__(self) -> None:
        first, factor = self.terms[0]
        if factor != 1.0:
            np.multiply(first, factor, out=self.out)
        elif len(self.terms) == 1:
            np.copyto(self.out, first)
            return
        else:
            second, factor = self.terms[1]
            np.multiply(second, factor, out=self.out)
            np.add(self.out, first, out=self.out)
        for source, factor in self.terms[1 if self.terms[0][1] != 1.0 else 2 :]:
            np.multiply(source, factor, out=self.scratch)
            np.add(self.out, self.scratch, out=self.out)


@dataclass(frozen=True, slots=True)
class _Limit:
    """The clipped sample, in place. One row of `sample` per image."""

    sample: Array
    clip: Clip

    def __call__(self) -> None:
        if self.clip.kind is ClipKind.RANGE:
            np.clip(self.sample, -self.clip.limit, self.clip.limit, out=self.sample)
            return
        bound = np.quantile(np.abs(self.sample), self.clip.ratio, axis=1, keepdims=True)
        bound = np.clip(bound, 1.0, self.clip.limit).astype(self.sample.dtype)
        np.clip(self.sample, -bound, bound, out=self.sample)
        np.divide(self.sample, bound, out=self.sample)


class _Program:
    """A plan compiled for one shape: buffers, and for each step what to do with them.

    guided[i]: where the guided prediction of step i goes; samples[i]: where the sample is
    after it. All flat.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        latents: Array,
        branches: int,
        segments: Sequence[slice],
        dtype: np.dtype[Any],
    ) -> None:
        self._batch = latents.shape[0]
        self._segments = segments
        self._size = latents.size
        self._dtype = dtype
        self._plan = plan
        self._free: list[Array] = []
        self.inputs = np.empty((branches, self._size), dtype)
        self.noise = np.empty(self._size, dtype)
        self.scratch = np.empty(self._size, dtype)
        self._first = self._take()
        np.copyto(self._first, latents.reshape(-1))
        self.guided: list[Array] = []
        self.samples: list[Array] = []
        self._steps: list[tuple[_Combine | _Limit, ...]] = []
        slots: list[Array | None] = [self._first, *[None] * (plan.num_slots - 1)]
        for index in range(plan.num_evaluations):
            slots = self._compile(index, slots)

    def load_input(self, index: int) -> None:
        """Write the scaled sample into every branch of `inputs`."""
        sample = self.samples[index - 1] if index else self._first
        scale = self._plan.input_scale[index]
        if scale == 1.0:
            np.copyto(self.inputs, sample)
        else:
            np.multiply(sample, float(scale), out=self.inputs)

    def run(self, index: int) -> None:
        """Advance the state by one step."""
        for operation in self._steps[index]:
            operation()

    def _take(self) -> Array:
        return self._free.pop() if self._free else np.empty(self._size, self._dtype)

    def _compile(self, index: int, slots: list[Array | None]) -> list[Array | None]:
        """Translate the rows of one step; `slots` are the state's buffers, None for zero."""
        plan, guided = self._plan, self._take()
        operations: list[_Combine | _Limit] = []
        taken, clean = [guided], None
        if plan.clean[index].any():
            clean = self._take()
            taken.append(clean)
            sources = [(slots[0], plan.clean_from[index, 0]), (guided, plan.clean_from[index, 1])]
            operations.append(self._combine(clean, sources))
            rows = clean.reshape(self._batch, -1)
            operations += [_Limit(rows[:, segment], plan.clip) for segment in self._segments]
        after: list[Array | None] = []
        for slot in range(plan.num_slots):
            sources = [
                *zip(slots, plan.state[index, slot], strict=True),
                (guided, plan.prediction[index, slot]),
                (clean, plan.clean[index, slot]),
                (self.noise, plan.noise[index, slot]),
            ]
            used = [(buffer, f) for buffer, f in sources if buffer is not None and f != 0.0]
            # The caller may overwrite the sample, so slot 0 shares its buffer with no other.
            shared = len(used) == 1 and used[0][1] == 1.0 and used[0][0] is not self.noise
            if shared and slot and used[0][0] is not after[0]:
                after.append(used[0][0])
            elif used or slot == 0:
                taken.append(self._take())
                operations.append(self._combine(taken[-1], used))
                after.append(taken[-1])
            else:
                after.append(None)
        self._release([*slots, *taken], after)
        self.guided.append(guided)
        self.samples.append(taken[1 if clean is None else 2])  # slot 0 took it
        self._steps.append(tuple(operations))
        return after

    def _combine(self, out: Array, sources: Sequence[tuple[Array | None, float]]) -> _Combine:
        terms = [(b, float(f)) for b, f in sources if b is not None and f != 0.0]
        # A factor of exactly 1 goes first: it costs one pass less.
        terms.sort(key=lambda term: term[1] != 1.0)
        return _Combine(out, tuple(terms) or ((self._first, 0.0),), self.scratch)

    def _release(self, before: Sequence[Array | None], after: Sequence[Array | None]) -> None:
        kept = {id(buffer) for buffer in after if buffer is not None}
        for buffer in before:
            if buffer is not None and id(buffer) not in kept:
                kept.add(id(buffer))
                self._free.append(buffer)
