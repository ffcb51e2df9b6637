"""The loop against the plan's definition, written out plainly."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentc.runtimes.sampling.plan
import latentc.runtimes.sampling.sampler
from latentc.runtimes.errors import BackendError, InputError, NumericalError
from latentc.runtimes.sampling.plan import Clip, SamplingPlan
from latentc.runtimes.sampling.plan_schema import ClipKind
from latentc.runtimes.sampling.sampler import Rescale, denoise

SHAPE = (2, 3, 4, 5)


def make_plan(
    evaluations: int = 6, slots: int = 3, clip: Clip | None = None, seed: int = 0
) -> SamplingPlan:
    """Random rows with many zeros and ones, so that aliases and moves occur."""
    rng = np.random.default_rng(seed)

    def sparse(*shape: int) -> Any:
        values = rng.standard_normal(shape)
        choice = rng.integers(0, 4, shape)
        return np.where(choice == 0, 0.0, np.where(choice == 1, 1.0, values))

    draws = rng.integers(0, 2, evaluations).astype(bool)
    return SamplingPlan(
        num_inference_steps=evaluations,
        start=0,
        timesteps=np.linspace(999, 0, evaluations),
        input_scale=np.where(rng.integers(0, 2, evaluations) == 0, 1.0, 0.5),
        noise_draws=draws,
        state=sparse(evaluations, slots, slots),
        prediction=sparse(evaluations, slots),
        clean=sparse(evaluations, slots) if clip else np.zeros((evaluations, slots)),
        noise=sparse(evaluations, slots) * draws[:, None],
        clean_from=sparse(evaluations, 2),
        clip=clip or Clip(),
        init_noise_scale=1.0,
        add_noise=None,
        known=np.full((evaluations, 2), np.nan),
        log_low=np.full(evaluations, np.nan),
        log_high=np.full(evaluations, np.nan),
    )


def limited(clean: Any, clip: Clip) -> Any:
    if clip.kind is ClipKind.RANGE:
        return clean.clip(-clip.limit, clip.limit)
    flat = np.abs(clean.reshape(len(clean), -1))
    bound = np.quantile(flat, clip.ratio, axis=1).clip(1, clip.limit)[:, None, None, None]
    return clean.clip(-bound, bound) / bound


def by_definition(
    plan: SamplingPlan, sample: Any, predictions: Any, noises: Any
) -> tuple[list[Any], list[Any]]:
    """Model inputs and samples, straight from the module docstring of
    `latentc.runtimes.sampling.plan`."""
    slots = np.zeros((plan.num_slots, *sample.shape))
    slots[0] = sample
    inputs, samples = [], []
    for i in range(plan.num_evaluations):
        inputs.append(plan.input_scale[i] * slots[0])
        e, n = predictions[i], noises[i]
        v = np.zeros_like(e)
        if plan.clip.kind is not ClipKind.NONE:
            v = limited(plan.clean_from[i, 0] * slots[0] + plan.clean_from[i, 1] * e, plan.clip)
        slots = np.tensordot(plan.state[i], slots, 1)
        for column, value in ((plan.prediction, e), (plan.clean, v), (plan.noise, n)):
            slots = slots + np.multiply.outer(column[i], value)
        samples.append(slots[0])
    return inputs, samples


def with_variance(plan: SamplingPlan, seed: int) -> SamplingPlan:
    """The plan with limits of the variance of some of its noise."""
    rng = np.random.default_rng(seed)
    learned = plan.noise_draws & (rng.integers(0, 3, plan.num_evaluations) > 0)
    low = np.where(learned, rng.uniform(-3, -1, plan.num_evaluations), np.nan)
    return replace(plan, log_low=low, log_high=low + 1)


@pytest.mark.parametrize("seed", range(4))
def test_the_variance_that_the_model_says_is_between_two_limits(seed: int) -> None:
    plan = with_variance(make_plan(seed=seed), seed)
    rng = np.random.default_rng(seed + 100)
    predictions, noises = rng.standard_normal((2, plan.num_evaluations, *SHAPE))
    said = rng.uniform(-2, 2, (plan.num_evaluations, *SHAPE))  # models go beyond them
    first, index = rng.standard_normal(SHAPE), -1

    def predict(*_: Any) -> Any:
        nonlocal index
        index += 1
        return predictions[index]

    scaled = noises.copy()
    for i in np.flatnonzero(~np.isnan(plan.log_low)):
        share = (said[i] + 1) / 2
        variance = np.exp(share * plan.log_high[i] + (1 - share) * plan.log_low[i])
        scaled[i] *= np.sqrt(variance)
    _, expected = by_definition(plan, first, predictions, scaled)
    loop = denoise(
        *(plan, first, predict, lambda: noises[index]), variance=lambda: said[index], dtype=float
    )
    found = [step.latents for step in loop]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


CLIPS = [None, Clip(ClipKind.RANGE, 1.5), Clip(ClipKind.DYNAMIC, 1.7, 0.9)]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(12))
def test_the_loop_is_the_definition(clip: Clip | None, seed: int) -> None:
    plan = make_plan(slots=1 + seed % 4, clip=clip, seed=seed)
    rng = np.random.default_rng(seed + 100)
    predictions, noises = rng.standard_normal((2, plan.num_evaluations, *SHAPE))
    first = rng.standard_normal(SHAPE)
    inputs, samples = by_definition(plan, first, predictions, noises)
    seen: list[Any] = []
    draws = iter(noises[plan.noise_draws])

    def predict(model_input: Any, timestep: Any) -> Any:
        assert timestep.dtype == np.float32
        assert timestep.shape == (1,)
        assert timestep[0] == np.float32(plan.timesteps[len(seen)])
        seen.append(model_input.copy())
        return predictions[len(seen) - 1]

    steps = list(denoise(plan, first, predict, lambda: next(draws), dtype=np.float64))
    for i, step in enumerate(steps):
        np.testing.assert_allclose(seen[i], inputs[i], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(step.latents, samples[i], rtol=1e-10, atol=1e-10)
        assert (step.index, step.total) == (i, plan.num_evaluations)
    assert next(draws, None) is None  # neither too many nor too few


def test_guidance_is_a_weighted_sum_over_branches() -> None:
    plan = make_plan(seed=3)
    weights = (-1.5, 0.5, 2.0)
    rng = np.random.default_rng(0)
    predictions = rng.standard_normal((plan.num_evaluations, 3, *SHAPE)).astype(np.float32)
    noises = np.zeros((plan.num_evaluations, *SHAPE))
    first = rng.standard_normal(SHAPE).astype(np.float32)
    calls = 0

    def predict(model_input: Any, _: Any) -> Any:
        nonlocal calls
        assert model_input.dtype == np.float32
        branches = model_input.reshape(3, *SHAPE)
        np.testing.assert_array_equal(branches[0], branches[2])
        calls += 1
        return predictions[calls - 1].reshape(3 * SHAPE[0], *SHAPE[1:])

    loop = denoise(plan, first, predict, lambda: noises[0], weights=[weights] * len(predictions))
    found = [step.latents for step in loop]
    guided = np.tensordot(predictions, weights, ((1,), (0,)))
    _, expected = by_definition(plan, first, guided, noises)
    assert found[-1].dtype == np.float32
    np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-4, atol=1e-4)


def zeros(model_input: Any, _: Any) -> Any:
    return np.zeros_like(model_input)


def no_noise() -> Any:
    return np.zeros(SHAPE, np.float32)


def test_half_precision_predictions_are_computed_with_in_single_precision() -> None:
    plan = make_plan(evaluations=1, slots=1, seed=5)
    big = np.full(SHAPE, 60_000, np.float16)
    step = next(denoise(plan, np.zeros(SHAPE), lambda *_: big, no_noise, weights=[(4.0,)] * 3))
    assert np.isfinite(step.latents).all()


def test_a_yielded_sample_is_the_consumers_own() -> None:
    plan = make_plan(seed=4)
    first = np.ones(SHAPE, np.float32)
    kept = [(s.latents, s.latents.copy()) for s in denoise(plan, first, zeros, no_noise)]
    for array, as_it_was in kept:
        np.testing.assert_array_equal(array, as_it_was)
    loop = denoise(plan, first, zeros, no_noise)
    found = []
    for step in loop:
        found.append(step.latents.copy())
        step.latents[:] = np.nan  # reaches nobody
    np.testing.assert_array_equal(found[-1], kept[-1][1])
    np.testing.assert_array_equal(first, 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_a_sent_sample_replaces_only_the_sample(seed: int) -> None:
    plan = make_plan(seed=seed)
    rng = np.random.default_rng(seed)
    predictions = rng.standard_normal((plan.num_evaluations, *SHAPE))
    first, edit = rng.standard_normal((2, *SHAPE))
    calls = iter(predictions)
    loop = denoise(plan, first, lambda *_: next(calls), no_noise, dtype=np.float64)
    next(loop)
    step = loop.send(edit)
    slots = np.zeros((plan.num_slots, *SHAPE))
    slots[0] = first
    for i in range(2):
        slots = np.tensordot(plan.state[i], slots, 1)
        slots += np.multiply.outer(plan.prediction[i], predictions[i])
        expected, slots[0] = slots[0].copy(), edit
    np.testing.assert_allclose(step.latents, expected, rtol=1e-10, atol=1e-10)


def test_closing_stops_the_run() -> None:
    calls: list[int] = []

    def predict(model_input: Any, _: Any) -> Any:
        calls.append(1)
        return model_input

    loop = denoise(make_plan(), np.ones(SHAPE), predict, no_noise)
    next(loop)
    loop.close()
    assert len(calls) == 1
    assert next(loop, None) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_stop_the_run_and_name_the_step(value: float) -> None:
    plan = make_plan(seed=1)
    bad = np.zeros(SHAPE, np.float32)
    bad[1, 2, 3, 4] = value
    answers = iter([np.zeros(SHAPE, np.float32), bad])
    loop = denoise(plan, np.ones(SHAPE), lambda *_: next(answers), no_noise)
    next(loop)
    with pytest.raises(NumericalError, match=r"step 2 of 6 \(timestep 799.2\)"):
        next(loop)


def test_large_finite_predictions_are_let_through() -> None:
    plan = make_plan(evaluations=1, slots=1)
    huge = np.full(SHAPE, 1e30, np.float32)
    assert next(denoise(plan, np.zeros(SHAPE), lambda *_: huge, no_noise)).index == 0


def test_wrong_use_is_refused() -> None:
    plan = make_plan()
    assert plan.noise_draws.any()
    with pytest.raises(InputError, match="noise"):
        denoise(plan, np.ones(SHAPE), zeros)
    with pytest.raises(BackendError, match="shape"):
        next(denoise(plan, np.ones(SHAPE), lambda *_: np.zeros((1, 2)), no_noise))


def test_the_loop_names_no_scheduler_and_no_model() -> None:
    names = r"ddim|ddpm|pndm|plms|euler|heun|dpm|unipc|lms|lcm|karras|deis|tcd|edm|sdxl|flux"
    for module in (latentc.runtimes.sampling.sampler, latentc.runtimes.sampling.plan):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert not re.findall(rf"\b\w*(?:{names})\w*\b", text, re.IGNORECASE)


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_rescaled_guidance(amount: float) -> None:
    """The rescaling does as `rescale_noise_cfg` of diffusers' pipelines does; not where a step is
    not guided.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    rng = np.random.default_rng(5)
    plan, first = make_plan(evaluations=4), rng.standard_normal(SHAPE).astype(np.float32)
    parts = rng.standard_normal((4, 2, *SHAPE)).astype(np.float32) * [[[[[[1]]]], [[[[3]]]]]]
    parts = parts.astype(np.float32)
    noises = rng.standard_normal((4, *SHAPE)).astype(np.float32)
    weights, guided = (-4.0, 5.0), [True, True, False, True]
    asked: list[int] = []

    def predict(sample: Any, _: Any) -> Any:
        asked.append(len(sample))
        both = parts[len(asked) - 1]
        return both.reshape(-1, *SHAPE[1:]) if len(sample) > SHAPE[0] else both[1]

    expected = []
    for both, all_branches in zip(parts, guided, strict=True):
        negative, positive = (torch.from_numpy(each) for each in both)
        made = negative + 5.0 * (positive - negative)
        made = rescale_noise_cfg(made, positive, guidance_rescale=amount)
        expected.append(made.numpy() if all_branches else positive.numpy())
    loop = denoise(
        plan,
        first,
        predict,
        iter(noises).__next__,
        weights=[weights if all_branches else (1.0,) for all_branches in guided],
        adjust=[Rescale(amount, 1)],
    )
    found = [step.latents for step in loop]
    alone = denoise(plan, first, lambda *_: expected.pop(0), iter(noises[:]).__next__)
    assert asked == [4, 4, 2, 4]
    for ours, theirs in zip(found, alone, strict=True):
        np.testing.assert_allclose(ours, theirs.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.fault("2.1", "latents that overflow where every prediction is finite")
def test_a_sample_that_overflows() -> None:
    plan = replace(make_plan(evaluations=1, slots=1), prediction=np.full((1, 1), 10.0))
    huge = np.full(SHAPE, 1e38, np.float32)
    with pytest.raises(NumericalError, match="latents reach NaN or infinity at step 1 of 1"):
        next(denoise(plan, np.zeros(SHAPE), lambda *_: huge, no_noise))
