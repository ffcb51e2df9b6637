"""Run a scheduler on symbols and read off the rows of its sampling plans.

Before every step each tensor that the scheduler remembers is replaced by the unit symbol of a
slot of its own. So a row says how the next state follows from this one, never how it follows
from the whole past, and rows of equal state are equal wherever a run began.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import SchedulerMixin

from latentc.exporter.components.learned_variance import learns_variance
from latentc.exporter.schedulers.symbols import (
    CLEAN,
    MAX_SLOTS,
    NOISE,
    OUTPUT,
    SHAPE,
    WIDTH,
    NotLinear,
    Symbol,
    coefficients,
    poison,
    unit,
)
from latentc.runtimes.sampling.plan import Clip, Floats
from latentc.runtimes.sampling.plan_schema import ClipKind

# Patching a module's noise source is global: one trace at a time.
_PATCHING = threading.Lock()


@dataclass(frozen=True)
class RawStep:
    """One traced step. Columns: `MAX_SLOTS` slots, output, clean, noise.

    matrix: f8[MAX_SLOTS, WIDTH], row s being the next value of slot s; clean_from: f8[2];
    log_variance: logarithms of the smallest and the largest variance of noise that has a learned
    one, else NaN.
    """

    matrix: Floats
    clean_from: Floats
    input_scale: float
    draws: bool
    clip: Clip
    log_variance: tuple[float, float]


_FIXED = (float("nan"), float("nan"))


@dataclass
class _Events:
    """An `_Events` holds what the scheduler asked for in the step being traced."""

    clipped: Floats | None = None
    clip: Clip = field(default_factory=Clip)
    draws: int = 0
    log_variance: tuple[float, float] = _FIXED

    def clear(self) -> None:
        self.clipped, self.clip, self.draws, self.log_variance = None, Clip(), 0, _FIXED

    def limit(self, argument: Symbol, clip: Clip) -> Symbol:
        if self.clipped is not None:
            raise NotLinear("limits the clean sample twice in a step")
        self.clipped, self.clip = coefficients(argument), clip
        return unit(CLEAN)

    def clamp(self, argument: Symbol, low: Any, high: Any) -> Symbol:
        if low is None or high is None or float(low) != -float(high):
            raise NotLinear(f"clamp to {low} .. {high}")
        return self.limit(argument, Clip(ClipKind.RANGE, float(high)))

    def noise(self, shape: Any, *_: Any, **__: Any) -> Symbol:
        if tuple(shape) != SHAPE:
            raise NotLinear(f"noise of another shape than the sample's ({tuple(shape)})")
        self.draws += 1
        if self.draws > 1:
            raise NotLinear("draws noise twice in a step")
        return unit(NOISE)


class StepTracer:
    """Traces single steps of one scheduler whose `set_timesteps` has been called."""

    def __init__(self, scheduler: SchedulerMixin, options: Mapping[str, Any]) -> None:
        _memoise(scheduler)
        self.scheduler = scheduler
        self._options = accepted_options(scheduler, options)
        self._events = _Events()
        self._slots: dict[tuple[str, ...], int] = {}
        self._scale = 1.0
        self._pristine = _snapshot(scheduler)

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Make noise and the limited clean sample symbols while this lasts."""
        config, events, cls = self.scheduler.config, self._events, type(self.scheduler)

        def threshold(argument: Symbol) -> Symbol:
            ratio, limit = config.dynamic_thresholding_ratio, config.sample_max_value
            return events.limit(argument, Clip(ClipKind.DYNAMIC, float(limit), float(ratio)))

        with ExitStack() as stack:
            stack.enter_context(_PATCHING)
            stack.enter_context(replaced_noise(self.scheduler, events.noise))
            stack.enter_context(mock.patch.object(Symbol, "clamp_hook", events.clamp))
            if hasattr(cls, "_threshold_sample"):
                method = staticmethod(threshold)
                stack.enter_context(mock.patch.object(cls, "_threshold_sample", method))
            if learns_variance(self.scheduler):
                stack.enter_context(self._recording_limits())
            yield

    @contextmanager
    def _recording_limits(self) -> Iterator[None]:
        """Give the scheduler's noise the variance 1 while this lasts, and note limits.

        They are those of the variance that it would have: what the scheduler makes of -1 and of 1.
        """
        limits = self.scheduler._get_variance

        def noted(t: Any, predicted_variance: None = None, **options: Any) -> torch.Tensor:
            low, high = (
                float(limits(t, predicted_variance=torch.tensor(said), **options))
                for said in (-1.0, 1.0)
            )
            self._events.log_variance = (low, high)
            return torch.zeros(())  # a logarithm

        # Not on the instance, whose attributes are its state.
        with mock.patch.object(type(self.scheduler), "_get_variance", staticmethod(noted)):
            yield

    def reset(self, start: int | None) -> None:
        """Go back to before the first step, to begin at evaluation `start` (None: unspecified)."""
        for name in set(vars(self.scheduler)) - set(self._pristine):
            delattr(self.scheduler, name)
        vars(self.scheduler).update(_copied(self._pristine))
        if start is not None and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)

    def enter(self, index: int) -> tuple[Any, ...]:
        """Go up to evaluation `index`, within `intercepting`, and scale the model's input.

        Returns everything besides symbols that decides what this step and the next ones do.
        """
        self._rebase()
        self._events.clear()
        scaled = scaled_input(self.scheduler, unit(0), self.scheduler.timesteps[index])
        self._scale = self._input_scale(scaled)
        return self._fingerprint()

    def step(self, index: int) -> RawStep:
        """Trace evaluation `index`, which was entered.

        Raises `NotLinear`, or what the scheduler raises.
        """
        scheduler, timestep, events = self.scheduler, self.scheduler.timesteps[index], self._events
        options = self._options | steps_to(scheduler, index)
        result = scheduler.step(unit(OUTPUT), timestep, unit(0), **options, return_dict=False)
        matrix = np.zeros((MAX_SLOTS, WIDTH))
        matrix[0] = coefficients(result[0])
        for path, symbol, _ in _stored(scheduler):
            slot = self._slot(path)
            if slot is not None:
                matrix[slot] = coefficients(symbol)
        clean_from, draws = _clean_from(events), events.draws > 0
        return RawStep(matrix, clean_from, self._scale, draws, events.clip, events.log_variance)

    def add_noise(self, start: int) -> tuple[float, float] | None:
        """Return the coefficients of (clean sample, noise) for a run that starts here, or None."""
        self.reset(start)
        return self._noisy(start)

    def known(self, index: int) -> tuple[float, float] | None:
        """Return the coefficients of a clean sample and of noise that make it as noisy as the run's
        is before evaluation `index`, which comes next; without noise after the last. diffusers'
        inpainting pipelines ask for it like this.
        """
        return self._noisy(index) if index < len(self.scheduler.timesteps) else (1.0, 0.0)

    def all_known(self) -> Floats | None:
        """Return what `known` gives after each evaluation, f8[evaluations, 2], of all at once.

        It is None where the scheduler adds no noise to samples of several timesteps.
        """
        self.reset(None)
        timesteps = self.scheduler.timesteps[1:]
        if not len(timesteps):
            return None
        one = torch.ones((len(timesteps), 1, 1, 1), dtype=torch.float64)
        zero = torch.zeros_like(one)
        try:
            pairs = ((one, zero), (zero, one))
            columns = [self._noised(*pair, timesteps).flatten() for pair in pairs]
        except Exception:  # whatever a scheduler raises that expects one timestep
            return None
        return np.concatenate([torch.stack(columns, 1).numpy(), [(1.0, 0.0)]])

    def _noised(self, clean: Any, noise: Any, timesteps: torch.Tensor) -> Any:
        """Return clean samples with noise; errors are the scheduler's."""
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(clean, noise, timesteps)
        return self.scheduler.scale_noise(clean, timesteps, noise)

    def _noisy(self, index: int) -> tuple[float, float] | None:
        timestep = self.scheduler.timesteps[index : index + 1]
        try:
            noisy = self._noised(unit(0), unit(NOISE), timestep)
        except (AttributeError, IndexError, NotImplementedError):
            return None
        found = coefficients(noisy)
        if np.count_nonzero(found) > np.count_nonzero(found[[0, NOISE]]):
            return None
        return float(found[0]), float(found[NOISE])

    def _fingerprint(self) -> tuple[Any, ...]:
        """Return what differs from the state before the first step, whose tables are shared."""
        pristine = self._pristine
        return tuple(
            (name, _freeze(value))
            for name, value in vars(self.scheduler).items()
            if name != "_begin_index" and value is not pristine.get(name, self)
        )

    def _slot(self, path: tuple[str, ...]) -> int | None:
        if path not in self._slots and len(self._slots) == MAX_SLOTS - 1:
            return None
        return self._slots.setdefault(path, len(self._slots) + 1)

    def _rebase(self) -> None:
        for path, _, replace in list(_stored(self.scheduler)):
            slot = self._slot(path)
            replace(poison() if slot is None else unit(slot))

    @staticmethod
    def _input_scale(scaled: Any) -> float:
        found = coefficients(scaled)
        if found[1:].any():
            raise NotLinear("scale_model_input does more than scale the sample")
        return float(found[0])


def scaled_input(scheduler: SchedulerMixin, sample: Any, timestep: Any) -> Any:
    """Return what the model is given for `sample`; flow-matching schedulers do not scale it."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    return scheduler.scale_model_input(sample, timestep)


def accepted_options(scheduler: SchedulerMixin, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `options` that `scheduler.step` takes, as diffusers' pipelines pass them."""
    parameters = _parameters(type(scheduler).step)
    return {name: value for name, value in options.items() if name in parameters}


def steps_to(scheduler: SchedulerMixin, index: int) -> dict[str, Any]:
    """Return what diffusers' pipelines tell a scheduler that asks for the timestep which a step
    leads to: the next one, None after the last."""
    if "prev_timestep" not in _parameters(type(scheduler).step):
        return {}
    following = scheduler.timesteps[index + 1 : index + 2]
    return {"prev_timestep": following[0] if len(following) else None}


@cache
def _parameters(step: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters of a class's `step`."""
    return frozenset(inspect.signature(step).parameters)


def _clean_from(events: _Events) -> Floats:
    if events.clipped is None:
        return np.zeros(2)
    found = events.clipped.copy()
    pair = np.array([float(found[0]), float(found[OUTPUT])])
    found[[0, OUTPUT]] = 0.0
    if found.any():
        raise NotLinear("limits something else than a clean sample predicted in this step")
    return pair


@contextmanager
def replaced_noise(scheduler: SchedulerMixin, source: Callable[..., Any]) -> Iterator[None]:
    """Let `source` answer in place of `randn_tensor` in the modules of a scheduler's classes."""
    modules = {cls.__module__ for cls in type(scheduler).__mro__}
    with ExitStack() as stack:
        for name in modules:
            module = sys.modules.get(name)
            if module is not None and hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", source))
        yield


_PLAIN = frozenset({torch.Tensor, np.ndarray, float, int, bool, str, type(None)})
_Stored = tuple[tuple[str, ...], Any, Callable[[Any], None]]


def _stored(scheduler: SchedulerMixin) -> Iterator[_Stored]:
    """Yield every symbol that the scheduler keeps: where, which, and how to replace it."""
    for name, value in list(vars(scheduler).items()):
        if name != "_internal_dict" and type(value) not in _PLAIN:
            yield from _found((name,), value, partial(setattr, scheduler, name))


def _found(path: tuple[str, ...], value: Any, replace: Callable[[Any], None]) -> Iterator[_Stored]:
    if isinstance(value, Symbol):
        yield path, value, replace
    elif isinstance(value, list):
        # Counted from the end: a growing history keeps its newest entry in the same slot.
        for i in range(-1, -len(value) - 1, -1):
            yield from _found((*path, str(i)), value[i], partial(value.__setitem__, i))
    elif isinstance(value, dict):
        for key in value:
            yield from _found((*path, str(key)), value[key], partial(value.__setitem__, key))
    elif isinstance(value, tuple) and any(isinstance(item, Symbol) for item in value):
        raise NotLinear(f"keeps tensors in a tuple ({'.'.join(path)})")
    elif isinstance(value, SchedulerMixin):
        raise NotLinear(f"runs another scheduler inside ({'.'.join(path)})")


def _freeze(value: Any) -> Any:
    if isinstance(value, Symbol):
        return "symbol"
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.reshape(-1).tolist()))
    if isinstance(value, dict):
        return tuple((key, _freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    if value is None or isinstance(value, (int, float, str, bool, np.generic)):
        return value
    return id(value)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.copy()
        if isinstance(value, (list, dict)) and name != "_internal_dict"
        else value
        for name, value in state.items()
    }


def _snapshot(scheduler: SchedulerMixin) -> dict[str, Any]:
    return _copied(vars(scheduler))


def _memoise(scheduler: SchedulerMixin) -> None:
    """Remember what pure functions of a scheduler return, which ask for the same numbers again and
    again; and integrate over numpy scalars.

    0-dimensional tensors give the same float32 numbers ten times as slowly.
    """
    integral = getattr(scheduler, "get_lms_coefficient", None)
    if integral is not None:

        def integrate(*args: Any) -> Any:
            sigmas = scheduler.sigmas
            scheduler.sigmas = sigmas.numpy()
            try:
                return integral(*args)
            finally:
                scheduler.sigmas = sigmas

        scheduler.get_lms_coefficient = cache(integrate)
    split = getattr(scheduler, "_sigma_to_alpha_sigma_t", None)
    if split is not None:
        pairs: dict[tuple[torch.dtype, float], Any] = {}

        def split_once(sigma: torch.Tensor) -> Any:
            if sigma.ndim:
                return split(sigma)
            key = (sigma.dtype, sigma.item())
            if key not in pairs:
                pairs[key] = split(sigma)
            return pairs[key]

        scheduler._sigma_to_alpha_sigma_t = split_once
