"""Traced plans against the real diffusers schedulers, through the runtime's own loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

from latentc.exporter.schedulers import checking as schedule_check
from latentc.exporter.schedulers.symbols import NotLinear, Symbol, coefficients, unit
from latentc.exporter.schedulers.tables import (
    DEFAULT_SCHEDULERS,
    DEFAULT_STEPS,
    SCHEDULERS,
    build,
    resolve,
    trace,
)
from latentc.exporter.schedulers.tracing import replaced_noise
from latentc.runtimes.errors import ExportError, InputError
from latentc.runtimes.sampling.plan import PlanTable, SamplingPlan
from latentc.runtimes.sampling.plan_archive import write_archive
from latentc.runtimes.sampling.plan_schema import ClipKind
from latentc.runtimes.sampling.sampler import denoise

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
SHAPE = (2, 4, 3, 5)

# diffusers rounds tensors with numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
TOLERANCE = 1e-6


def config(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, **changes}


def noise_source(seed: int) -> Any:
    """Noise as a pipeline draws it, from a torch generator; counts the draws."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Any:
        draw.count += 1  # type: ignore[attr-defined]
        return torch.randn(SHAPE, generator=generator).numpy()

    draw.count = 0  # type: ignore[attr-defined]
    return draw


def real_run(
    scheduler: SchedulerMixin, plan: SamplingPlan, options: Mapping[str, Any]
) -> tuple[list[Any], list[Any], Any]:
    """Model inputs, samples and the generator of a run of diffusers itself."""
    rng = np.random.default_rng(0)
    noise, clean = (torch.from_numpy(a) for a in rng.standard_normal((2, *SHAPE)))
    outputs = torch.from_numpy(rng.standard_normal((plan.num_evaluations, *SHAPE)))
    if plan.learns_variance:
        variances = rng.uniform(-1.5, 1.5, (plan.num_evaluations, *SHAPE))
        outputs = torch.cat([outputs, torch.from_numpy(variances)], 2)
    scheduler.set_timesteps(plan.num_inference_steps)
    sample = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if plan.start:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(plan.start)
        at = scheduler.timesteps[plan.start : plan.start + 1]
        if hasattr(scheduler, "add_noise"):
            sample = scheduler.add_noise(clean, noise, at)
        else:
            sample = scheduler.scale_noise(clean, at, noise)
    generator = torch.Generator().manual_seed(7)

    def drawn(shape: Any, generator: Any, **_: Any) -> Any:
        # in single precision, as in a pipeline: in double, torch draws other numbers
        return torch.randn(shape, generator=generator).double()

    inputs, samples = [], []
    accepts = scheduler.step.__code__.co_varnames
    more = {"generator": generator, **options}
    more = {name: value for name, value in more.items() if name in accepts}
    with replaced_noise(scheduler, drawn):
        timesteps = scheduler.timesteps[plan.start :]
        for place, (timestep, output) in enumerate(zip(timesteps, outputs, strict=True)):
            if type(scheduler) is diffusers.UnCLIPScheduler:  # as the prior of Kandinsky tells it
                more["prev_timestep"] = next(iter(timesteps[place + 1 :]), None)
            scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
            inputs.append(scale(sample, timestep).numpy().copy())
            sample = scheduler.step(output, timestep, sample, **more, return_dict=False)[0]
            samples.append(sample.numpy().copy())
    return inputs, samples, generator


def planned_run(plan: SamplingPlan, draw: Any) -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(0)
    noise, clean = rng.standard_normal((2, *SHAPE))
    outputs = rng.standard_normal((plan.num_evaluations, *SHAPE))
    variances = rng.uniform(-1.5, 1.5, (plan.num_evaluations, *SHAPE))
    inputs: list[Any] = []

    def predict(model_input: Any, _: Any) -> Any:
        inputs.append(model_input.copy())
        return outputs[len(inputs) - 1]

    first = plan.initial_sample(noise, clean if plan.start else None)
    more = {"variance": lambda: variances[len(inputs) - 1]} if plan.learns_variance else {}
    steps = denoise(plan, first, predict, draw, dtype=np.float64, **more)
    return inputs, [step.latents for step in steps]


def assert_same(
    scheduler: SchedulerMixin, table: PlanTable, steps: int, start: int = 0, **options: Any
) -> None:
    plan = table.plan(steps, start)
    options.setdefault("eta", 0.0)  # as pipelines do
    scheduler = copy.deepcopy(scheduler)
    expected_inputs, expected, generator = real_run(scheduler, plan, options)
    draw = noise_source(7)
    inputs, samples = planned_run(plan, draw)
    for found, real in zip([*inputs, *samples], [*expected_inputs, *expected], strict=True):
        assert np.linalg.norm(found - real) <= TOLERANCE * np.linalg.norm(real)
    # in step: what either draws next is the same
    assert plan.noise_draws.sum() == draw.count
    np.testing.assert_array_equal(draw(), torch.randn(SHAPE, generator=generator).numpy())


def some_starts(table: PlanTable, steps: int) -> list[int]:
    starts = table.starts(steps)
    return sorted({starts[len(starts) * k // 5] for k in range(5)} | {starts[-1]})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_reproduced_from_every_kind_of_start(name: str) -> None:
    scheduler = build(name, CONFIG)
    table = trace(scheduler, [4, 7, 20]).table
    for steps in (4, 7, 20):
        for start in some_starts(table, steps):
            assert_same(scheduler, table, steps, start)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_late_starts_are_possible_wherever_a_pipeline_may_start(name: str) -> None:
    scheduler = build(name, CONFIG)
    table = trace(scheduler, [6]).table
    evaluations = table.plan(6).num_evaluations
    can = hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")
    expected = range(0, evaluations if can else 1, scheduler.order)
    assert table.starts(6) == tuple(expected)


EPSILON_OR_V = {"pndm", "euler_a", "kdpm2_a", "flow_euler", "flow_heun", "ipndm", "deis"}


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", sorted(set(DEFAULT_SCHEDULERS) | {"dpmpp_2s", "sa_solver", "tcd"}))
def test_prediction_types(name: str, prediction: str) -> None:
    if prediction == "sample" and name in EPSILON_OR_V:
        pytest.skip("not offered by diffusers")
    scheduler = build(name, config(prediction_type=prediction))
    table = trace(scheduler, [6]).table
    for start in some_starts(table, 6):
        assert_same(scheduler, table, 6, start)


VARIANTS = {
    "karras unipc of order 3": ("unipc_karras", {"solver_order": 3}),
    "dpm of order 3": ("dpmpp_3m", {}),
    "singlestep of order 3": (
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "final_sigmas_type": "sigma_min"},
    ),
    "pndm with runge-kutta": ("pndm", {"skip_prk_steps": False}),
    "deis of order 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "trailing spacing": ("dpmpp_2m", {"timestep_spacing": "trailing"}),
    "linspace spacing": ("lms", {"timestep_spacing": "linspace"}),
    "zero terminal SNR": (
        "ddim",
        {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
        },
    ),
    "ddpm, large variance": ("ddpm", {"variance_type": "fixed_large"}),
    "ddpm, learned variance": ("ddpm", {"variance_type": "learned_range"}),
    "ddpm, learned variance and a limited sample": (
        "ddpm",
        {"variance_type": "learned_range", "thresholding": True, "timestep_spacing": "trailing"},
    ),
    "unclip": ("UnCLIPScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    "unclip's prior": (
        "UnCLIPScheduler",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "sample",
            "clip_sample": True,
            "clip_sample_range": 1.2,
        },
    ),
    "unclip, learned variance": (
        "UnCLIPScheduler",
        {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"},
    ),
    "unipc predicting noise": (
        "UniPCMultistepScheduler",
        {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    ),
    "unipc, first corrector off": ("unipc", {"disable_corrector": [0, 1]}),
    "flow sigmas": (
        "dpmpp_2m",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    "shifted flow": ("flow_euler", {"shift": 3.0}),
    "exponential sigmas": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "beta sigmas": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants(case: str) -> None:
    name, changes = VARIANTS[case]
    scheduler = build(name, config(**changes))
    table = trace(scheduler, [18]).table
    for start in some_starts(table, 18):
        assert_same(scheduler, table, 18, start)


def test_only_a_learned_variance_needs_the_model() -> None:
    """The last step draws nothing, and so it has no limits."""
    changes = {"variance_type": "learned_range", "steps_offset": 0}
    learned = trace(build("ddpm", config(**changes)), [4]).table.plan(4)
    np.testing.assert_array_equal(np.isnan(learned.log_low), [False, False, False, True])
    assert (learned.log_low[:3] < learned.log_high[:3]).all()
    with pytest.raises(InputError, match="a model that predicts the variance of the noise"):
        denoise(learned, np.zeros(SHAPE), lambda *_: np.zeros(SHAPE), noise_source(7))
    for name in ("ddpm", "dpmpp_2m", "ddim"):
        fixed = {} if name == "ddpm" else {"variance_type": "learned_range"}
        assert not trace(build(name, config(**fixed)), [4]).table.plan(4).learns_variance


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "heun"])
def test_a_clipped_clean_sample(name: str) -> None:
    scheduler = build(name, config(clip_sample=True, clip_sample_range=1.5))
    table = trace(scheduler, [8]).table
    assert table.plan(8).clip.kind is ClipKind.RANGE
    assert table.plan(8).clip.limit == 1.5
    for start in some_starts(table, 8):
        assert_same(scheduler, table, 8, start)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "dpmpp_2s", "unipc", "sa_solver"])
def test_dynamic_thresholding(name: str) -> None:
    changes = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7}
    scheduler = build(name, config(**changes))
    table = trace(scheduler, [8]).table
    clip = table.plan(8).clip
    assert (clip.kind, clip.limit, clip.ratio) == (ClipKind.DYNAMIC, 1.7, 0.9)
    for start in some_starts(table, 8):
        assert_same(scheduler, table, 8, start)


@pytest.mark.parametrize("name", DEFAULT_SCHEDULERS)
def test_untouched_single_precision_runs_agree_up_to_rounding(name: str) -> None:
    scheduler = build(name, CONFIG)
    plan = trace(scheduler, [20]).table.plan(20)
    rng = np.random.default_rng(0)
    first = plan.initial_sample(rng.standard_normal(SHAPE).astype(np.float32))
    outputs = rng.standard_normal((plan.num_evaluations, *SHAPE)).astype(np.float32)
    calls = iter(outputs)
    loop = denoise(plan, first.astype(np.float32), lambda *_: next(calls), noise_source(7))
    found = [step.latents for step in loop]
    scheduler.set_timesteps(20)
    generator, sample = torch.Generator().manual_seed(7), torch.from_numpy(first)
    accepts = "generator" in scheduler.step.__code__.co_varnames
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(sample, timestep)
        more = {"generator": generator} if accepts else {}
        sample = scheduler.step(torch.from_numpy(outputs[i]), timestep, sample, **more)[0]
        np.testing.assert_allclose(found[i], sample.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta_adds_noise(name: str) -> None:
    scheduler = build(name, CONFIG)
    table = trace(scheduler, [8], eta=0.4).table
    assert table.plan(8).noise.any()
    assert_same(scheduler, table, 8, eta=0.4)
    assert not trace(scheduler, [8]).table.plan(8).noise.any()


def test_windows_are_as_short_as_the_schedulers_memory() -> None:
    windows = {name: trace(build(name, CONFIG), [12]).table.window for name in DEFAULT_SCHEDULERS}
    assert windows == {
        "ddim": 0, "pndm": 4, "euler": 0, "euler_a": 0, "dpmpp_2m": 1, "dpmpp_2m_karras": 1,
        "unipc": 2, "lms": 3, "heun": 0, "ddpm": 0, "lcm": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["unipc", "euler_a", "lcm"])
def test_the_default_counts_of_steps(name: str, tmp_path: Path) -> None:
    """In few bytes: UniPC's are the most of all."""
    traced = trace(build(name, CONFIG))
    assert set(traced.table.step_counts) | set(traced.refused) == set(DEFAULT_STEPS)
    assert traced.worst_error <= TOLERANCE
    path = tmp_path / f"{name}.zip"
    write_archive(traced.table.of_singles(), path)
    assert path.stat().st_size < 280_000
    if name == "lcm":
        assert "50" in traced.refused[60]
    else:
        assert not traced.refused


class Forgetful(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """A scheduler that remembers the step before where there are few steps only."""

    def set_timesteps(self, num_inference_steps: int, **options: Any) -> None:
        self.register_to_config(solver_order=2 if num_inference_steps < 10 else 1)
        super().set_timesteps(num_inference_steps, **options)


def test_counts_that_have_less_in_common_than_it_seems_are_traced_by_themselves() -> None:
    alone = trace(Forgetful.from_config(CONFIG), [8]).table
    both = trace(Forgetful.from_config(CONFIG), [8, 20]).table
    assert alone.window == 1
    for start in range(8):
        np.testing.assert_array_equal(both.plan(8, start).state, alone.plan(8, start).state)


def test_the_schedulers_own_state_is_left_alone() -> None:
    scheduler = build("unipc", CONFIG)
    scheduler.set_timesteps(9)
    before = dict(vars(scheduler))
    trace(scheduler, [5])
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[name] is value for name, value in before.items())
    noise = diffusers.schedulers.scheduling_ddpm.randn_tensor
    trace(build("ddpm", CONFIG), [3])
    assert diffusers.schedulers.scheduling_ddpm.randn_tensor is noise


def test_equal_input_gives_equal_files(tmp_path: Path) -> None:
    for path in ("a.json", "b.json"):
        trace(build("pndm", CONFIG), [5, 6]).table.save(tmp_path / path)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_step_counts_traced_later_merge() -> None:
    scheduler = build("dpmpp_2m", CONFIG)
    both = trace(scheduler, [5]).table.merge(trace(scheduler, [9]).table)
    for steps in (5, 9):
        assert_same(scheduler, both, steps)


def test_names() -> None:
    assert set(DEFAULT_SCHEDULERS) <= set(SCHEDULERS)
    assert resolve("DDIMScheduler").class_name == "DDIMScheduler"
    karras = build("dpmpp_2m_karras", config(use_karras_sigmas=False, solver_order=3))
    assert karras.config.use_karras_sigmas
    assert karras.config.solver_order == 2
    for name in ("no_such", "UNet2DModel", "os.system", "__class__"):
        with pytest.raises(InputError, match=r"unknown scheduler.*ddim.*tcd"):
            resolve(name)


def test_an_asked_step_count_that_is_refused_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"LCMScheduler refuses 100 steps: .*original_steps"):
        trace(build("lcm", CONFIG), [4, 100])


def test_a_scheduler_whose_own_samples_are_not_finite_is_refused() -> None:
    broken = build("UniPCMultistepScheduler", config(predict_x0=False))  # log of its last sigma, 0
    with pytest.raises(ExportError, match="coefficients that are not finite"):
        trace(broken, [6])


def test_a_scheduler_with_a_noise_source_of_its_own_is_refused() -> None:
    with pytest.raises(ExportError, match=r"DPMSolverSDEScheduler.*torchsde"):
        trace(build("DPMSolverSDEScheduler", CONFIG), [4])


class Odd(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A scheduler that does `trick` to the sample before it steps."""

    trick: Any = None

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        sample = type(self).trick(self, sample)
        return super().step(model_output, timestep, sample, **options)


def _keep(scheduler: Any, sample: Any) -> Any:
    scheduler.pair = (sample, 1)
    return sample


TRICKS = {
    "a square": (lambda _, x: x**2, "pow"),
    "a product": (lambda _, x: x * x, "mul of two"),
    "a norm": (lambda _, x: x / x.norm(), "norm"),
    "a constant": (lambda _, x: x + 1, "add with a constant"),
    "a comparison": (lambda _, x: x if (x > 0).all() else -x, "__gt__|gt"),
    "numpy": (lambda _, x: torch.from_numpy(x.numpy() * 2), "numpy"),
    "noise of its own": (lambda _, x: x + torch.randn(x.shape), "add with a constant"),
    "one-sided clamp": (lambda _, x: x.clamp(min=0), "clamp"),
    "a mask": (lambda _, x: x * torch.ones(x.shape), "not one number"),
    "data": (lambda _, x: x.data * 2, "data"),
    "a tuple": (_keep, "tuple"),
}


@pytest.mark.parametrize("case", TRICKS)
def test_what_is_not_linear_is_refused_by_name(case: str, monkeypatch: Any) -> None:
    trick, message = TRICKS[case]
    monkeypatch.setattr(Odd, "trick", trick)
    with pytest.raises(ExportError, match=f"Odd cannot become a plan.*({message})"):
        trace(Odd.from_config(CONFIG), [4])


def test_a_plan_that_differs_from_its_scheduler_is_refused(monkeypatch: Any) -> None:
    class Moody(diffusers.DDIMScheduler):  # type: ignore[misc]
        """Behaves only while it is traced."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            factor = 1.0 if isinstance(sample, Symbol) else 1.00001
            return super().step(model_output * factor, timestep, sample, **options)

    with pytest.raises(ExportError, match="differs from the scheduler by"):
        trace(Moody.from_config(CONFIG), [4])
    assert schedule_check.TOLERANCE == TOLERANCE


def test_symbols_carry_coefficients() -> None:
    found = coefficients((2 * unit(0) - unit(1) / 4).to(torch.float32).clone())
    assert found.dtype == np.float64
    assert found[:3].tolist() == [2.0, -0.25, 0.0]
    with pytest.raises(NotLinear):
        coefficients(torch.zeros(1))
