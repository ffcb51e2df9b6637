"""Run a plan beside the scheduler it was traced from, on random numbers, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from latentc.exporter.components.learned_variance import learns_variance
from latentc.exporter.schedulers.tracing import (
    StepTracer,
    accepted_options,
    replaced_noise,
    scaled_input,
    steps_to,
)
from latentc.runtimes.arrays import Array
from latentc.runtimes.sampling.plan import SamplingPlan
from latentc.runtimes.sampling.sampler import denoise

TOLERANCE = 1e-6
_SHAPE = (1, 4, 2, 2)


class _KeepDouble(TorchFunctionMode):
    """Some schedulers cast the sample to float32. Where that alone explains a difference, it is
    no fault of the plan: see past it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.to and args[0].dtype == torch.float64 and args[0].ndim == 4:
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass
class _Recorded:
    """A `_Recorded` holds what a run went through: first sample, model inputs, samples, steps that
    drew noise.
    """

    first: Array
    inputs: list[Array] = field(default_factory=list)
    samples: list[Array] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)


def probe(tracer: StepTracer, options: Mapping[str, Any]) -> Exception | None:
    """Return what the scheduler raises when it is run on ordinary tensors, None if it runs."""
    scheduler = tracer.scheduler
    tracer.reset(None)
    sample = torch.ones(_SHAPE)
    try:
        for index, timestep in enumerate(scheduler.timesteps):
            scaled_input(scheduler, sample, timestep)
            accepted = accepted_options(scheduler, options) | steps_to(scheduler, index)
            said = torch.cat([sample] * (2 if learns_variance(scheduler) else 1), 1)
            sample = scheduler.step(said, timestep, sample, **accepted, return_dict=False)[0]
    except Exception as error:
        return error
    return None


def check_run(tracer: StepTracer, plan: SamplingPlan, options: Mapping[str, Any]) -> float:
    """Return the largest relative L2 difference between plan and scheduler over a run.

    Compared are the first sample, the model's input and the sample of every step, and whether
    noise is drawn in the same steps (infinity if not).
    """
    random = np.random.default_rng(plan.num_inference_steps * 1000 + plan.start)
    outputs = random.standard_normal((plan.num_evaluations, *_SHAPE))
    variances = random.uniform(-1, 1, (plan.num_evaluations, *_SHAPE))
    noises = random.standard_normal((plan.num_evaluations, *_SHAPE))
    noise, clean = random.standard_normal((2, *_SHAPE))
    first = plan.initial_sample(noise, clean if plan.add_noise is not None else None)
    whole = outputs
    if learns_variance(tracer.scheduler):
        whole = np.concatenate([outputs, variances], axis=2)
    arguments = (tracer, plan, options, whole, noises, noise, clean)
    run = _planned(plan, first, outputs, noises, variances)
    error = _worst(run, _original(*arguments))
    if not error <= TOLERANCE:
        with _KeepDouble():
            error = _worst(run, _original(*arguments))
    return error


def _planned(
    plan: SamplingPlan, first: Array, outputs: Array, noises: Array, variances: Array
) -> _Recorded:
    record = _Recorded(first)
    inputs, drawn = record.inputs, record.drawn

    def predict(model_input: Array, _: Array) -> Array:
        inputs.append(model_input.copy())
        return np.asarray(outputs[len(inputs) - 1])

    def draw() -> Array:
        drawn.append(len(inputs) - 1)
        return np.asarray(noises[len(inputs) - 1])

    def said() -> Array:
        return np.asarray(variances[len(inputs) - 1])

    loop = denoise(plan, first, predict, draw, variance=said, dtype=np.float64)
    record.samples.extend(step.latents for step in loop)
    return record


def _worst(found: _Recorded, expected: _Recorded) -> float:
    if found.drawn != expected.drawn:
        return float("inf")
    one, other = (
        np.array([run.first, *run.inputs, *run.samples]).reshape(-1, run.first.size)
        for run in (found, expected)
    )
    norms = np.maximum(np.linalg.norm(other, axis=1), 1e-30)
    return float((np.linalg.norm(one - other, axis=1) / norms).max())


def _original(
    tracer: StepTracer,
    plan: SamplingPlan,
    options: Mapping[str, Any],
    outputs: Array,
    noises: Array,
    noise: Array,
    clean: Array,
) -> _Recorded:
    scheduler, start = tracer.scheduler, plan.start
    known = accepted_options(scheduler, options)
    predictions = torch.from_numpy(outputs).unbind()

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        record.drawn.append(len(record.samples))
        return torch.from_numpy(noises[len(record.samples)])

    sample = torch.from_numpy(noise) * plan.init_noise_scale
    if plan.add_noise is not None:
        tracer.reset(start)
        at = scheduler.timesteps[start : start + 1]
        original, added = torch.from_numpy(clean), torch.from_numpy(noise)
        if hasattr(scheduler, "add_noise"):
            sample = scheduler.add_noise(original, added, at)
        else:
            sample = scheduler.scale_noise(original, at, added)
    record = _Recorded(sample.numpy().copy())
    tracer.reset(start or None)
    with replaced_noise(scheduler, draw):
        for index, guided in enumerate(predictions, start):
            timestep, more = scheduler.timesteps[index], steps_to(scheduler, index)
            record.inputs.append(scaled_input(scheduler, sample, timestep).numpy().copy())
            sample = scheduler.step(guided, timestep, sample, **known, **more, return_dict=False)[0]
            record.samples.append(sample.numpy().copy())
    return record
