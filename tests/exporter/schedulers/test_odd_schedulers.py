"""Old and odd configurations of every scheduler class, and what a pipeline makes of them: the plan
is that of the scheduler that diffusers has, or the export is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, SchedulerMixin

from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers import plans as schedules
from latentc.exporter.schedulers.shifting import Told
from latentc.exporter.schedulers.tables import SCHEDULERS, trace
from latentc.runtimes.errors import ExportError
from latentc.runtimes.sampling.plan import PlanTable
from tests.exporter.schedulers.test_schedule import assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the corrections announce themselves
]

# As published in 2022: what is not here was added to the classes later.
OLD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CHANGES: list[dict[str, Any]] = [
    {},
    {"steps_offset": 1},
    {"steps_offset": 3},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.0001 + 0.02 * index / 999 for index in range(1000)]},
    {"num_train_timesteps": 400},
    {"clip_sample": True},
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 2.0},
    {"set_alpha_to_one": False},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {**ZERO_SNR, "prediction_type": "v_prediction"},
    ZERO_SNR,
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "zero"},
    {"thresholding": True},
    {"solver_order": 1},
    {"solver_order": 3},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "noise_prediction"},
    {"solver_type": "heun"},
    {"solver_type": "bh1"},
    {"lower_order_final": False},
    {"euler_at_final": True},
    {"predict_x0": False},
    {"skip_prk_steps": True},
    {"variance_type": "fixed_large"},
    {"variance_type": "fixed_small_log"},
    {"variance_type": "learned_range"},
    {"interpolation_type": "log_linear"},
    {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    {"sigma_min": 0.1, "sigma_max": 20.0},
    {"lambda_min_clipped": -5.1},
    {"original_inference_steps": 20},
    {"timestep_scaling": 5.0},
    {"predictor_order": 3, "corrector_order": 4},
    {"stochastic_sampling": True},
    {"invert_sigmas": True},
    {"shift": 3.0},
    {"shift_terminal": 0.02},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    {"sigma_schedule": "exponential"},
]
# Entries that only count together, or that published files have wrong.
TOGETHER: list[dict[str, Any]] = [
    {"prediction_type": "v_prediction", "clip_sample": True, "clip_sample_range": 0.5},
    {"thresholding": True, "sample_max_value": 4.0, "dynamic_thresholding_ratio": 0.9},
    {"timestep_spacing": "trailing", "steps_offset": 1, "use_karras_sigmas": True},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    {"num_train_timesteps": 200, "trained_betas": [0.001 * (1 + i % 7) for i in range(200)]},
    {"num_train_timesteps": 50, "steps_offset": 1},
    {"skip_prk_steps": False, "set_alpha_to_one": True},
    {"disable_corrector": [0, 1], "solver_order": 3},
    {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True},
    {"clip_sample": None},
    {"time_shift_type": "linear", "shift": 2.0},
]
STEPS = 5
CLASSES = sorted({named.class_name for named in SCHEDULERS.values()})
# A thousand evaluations for whatever number of steps.
LEFT_OUT = [("IPNDMScheduler", "trained_betas")]


def runs_in_diffusers(scheduler: SchedulerMixin) -> bool:
    """Return whether diffusers itself makes finite samples with a scheduler, of four channels."""
    scheduler = copy.deepcopy(scheduler)
    sample = torch.ones(1, 4, 2, 2)
    learned = scheduler.config.get("variance_type") == "learned_range"
    try:
        scheduler.set_timesteps(STEPS)
        for timestep in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)
            said = torch.cat([sample] * (2 if learned else 1), 1)
            sample = scheduler.step(said, timestep, sample, return_dict=False)[0]
    except Exception:
        return False
    return bool(torch.isfinite(sample).all())


@pytest.mark.fault("2.14", "second look: entries that only count together, null and unknown ones")
@pytest.mark.fault("2.14", "odd configurations of a scheduler class")
@pytest.mark.parametrize("class_name", CLASSES)
def test_odd_configurations(class_name: str) -> None:
    cls = getattr(diffusers, class_name)
    known = set(inspect.signature(cls.__init__).parameters)
    equal, refused = 0, []
    for changes in (*CHANGES, *TOGETHER):
        if not changes.keys() <= known or (class_name, *changes) in LEFT_OUT:
            continue
        with quiet_loading():
            try:
                scheduler = cls.from_config({**OLD, "of_a_later_version": {}, **changes})
            except (ValueError, NotImplementedError):
                continue  # diffusers has no such thing
            try:
                table = trace(scheduler, [STEPS]).table
            except ExportError:
                refused.append((changes, scheduler))
                continue
            assert_same(scheduler, table, STEPS)
        equal += 1
    assert equal > 1
    assert not [changes for changes, scheduler in refused if runs_in_diffusers(scheduler)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("DDPMScheduler", "learned"), ("DPMSolverMultistepScheduler", "learned_range")],
)
def test_a_variance_without_limits_is_refused_by_name(name: str, kind: str) -> None:
    scheduler = getattr(diffusers, name)(variance_type=kind)
    with pytest.raises(ExportError, match=f"{name}.*{kind!r} expects a model that predicts its va"):
        trace(scheduler, [STEPS])


# Pipeline class, scheduler class, configuration, the entries that the pipeline corrects.
CORRECTED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("StableDiffusionPipeline", "PNDMScheduler", {"skip_prk_steps": True}, {"steps_offset": 1}),
    ("StableDiffusionPipeline", "PNDMScheduler", {"steps_offset": 0}, {"steps_offset": 1}),
    (
        "StableDiffusionPipeline",
        "DDIMScheduler",
        {},
        {"steps_offset": 1, "clip_sample": False},
    ),
    ("StableDiffusionPipeline", "DDIMScheduler", {"clip_sample": True}, {"clip_sample": False}),
    ("StableDiffusionPipeline", "DDPMScheduler", {}, {"clip_sample": False, "steps_offset": 1}),
    ("StableDiffusionPipeline", "LCMScheduler", {}, {"steps_offset": 1}),
    ("StableDiffusionPipeline", "EulerDiscreteScheduler", {}, {"steps_offset": 1}),
    (
        "StableDiffusionPipeline",
        "EulerDiscreteScheduler",
        {"timestep_spacing": "leading"},
        {"steps_offset": 1},
    ),
    ("StableDiffusionPipeline", "LMSDiscreteScheduler", {}, {"steps_offset": 1}),
    (
        "StableDiffusionPipeline",
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "leading"},
        {"steps_offset": 1},
    ),
    ("StableDiffusionImg2ImgPipeline", "DDIMScheduler", {}, {"clip_sample": False}),
    (
        "StableDiffusionInpaintPipeline",
        "PNDMScheduler",
        {},
        {"skip_prk_steps": True, "steps_offset": 1},
    ),
    ("StableDiffusionControlNetPipeline", "PNDMScheduler", {"skip_prk_steps": True}, {}),
]


@pytest.fixture(scope="module")
def parts(smallest: Path) -> Callable[[], dict[str, Any]]:
    @cache
    def loaded() -> DiffusionPipeline:
        return DiffusionPipeline.from_pretrained(smallest)

    return lambda: {**loaded().components, "requires_safety_checker": False}


def own_table(scheduler: SchedulerMixin, steps: int) -> PlanTable:
    """The plans that an export makes for a pipeline's own scheduler."""
    config = schedules.plain_config(scheduler)
    name = schedules.own_name(scheduler)
    settings = schedules.Settings(name, type(scheduler).__name__, config, Told())
    return schedules.make(settings, [steps])[1]


@pytest.mark.fault("2.14", "a configuration without steps_offset is not corrected")
@pytest.mark.parametrize(("pipeline", "class_name", "entries", "corrected"), CORRECTED)
def test_the_scheduler_that_the_pipeline_has(
    parts: Callable[[], dict[str, Any]],
    pipeline: str,
    class_name: str,
    entries: Mapping[str, Any],
    corrected: Mapping[str, Any],
) -> None:
    with quiet_loading():
        scheduler = getattr(diffusers, class_name).from_config({**OLD, **entries})
        given = parts() | {"scheduler": scheduler}
        if "ControlNet" in pipeline:
            given["controlnet"] = diffusers.ControlNetModel(
                block_out_channels=(8, 8, 8, 8), norm_num_groups=8, attention_head_dim=1
            )
        pipe = getattr(diffusers, pipeline)(**given)
    assert corrected.items() <= dict(pipe.scheduler.config).items()
    assert_same(pipe.scheduler, own_table(pipe.scheduler, STEPS), STEPS)


@pytest.mark.fault("2.14", "a pipeline that takes another scheduler class than its folder says")
@pytest.mark.parametrize("pipeline", [DDIMPipeline, DDPMPipeline])
def test_a_pipeline_that_changes_the_class(pipeline: Any) -> None:
    pipe = pipeline(unet=None, scheduler=diffusers.DDPMScheduler(clip_sample_range=2.0))
    made = own_table(pipe.scheduler, STEPS)
    assert_same(pipe.scheduler, made, STEPS)


def test_another_scheduler_is_made_as_diffusers_makes_it() -> None:
    """Settings that the source left open are open for another class, though the pipeline corrected
    them.
    """
    with quiet_loading():
        scheduler = diffusers.PNDMScheduler.from_config({**OLD, "skip_prk_steps": True})
        changed = diffusers.configuration_utils.FrozenDict({**scheduler.config, "steps_offset": 1})
        scheduler._internal_dict = changed
        theirs = diffusers.DDIMScheduler.from_config(scheduler.config)
    ours = schedules._built("ddim", "PNDMScheduler", schedules.plain_config(scheduler))
    theirs.set_timesteps(STEPS)
    ours.set_timesteps(STEPS)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
    assert ours.config.steps_offset == theirs.config.steps_offset == 0


def test_the_size_that_the_pipeline_corrects(parts: Callable[[], dict[str, Any]]) -> None:
    """UNets of 2022 said 32, and diffusers takes 64 for them."""
    given = parts()
    unet = copy.deepcopy(given["unet"])
    entries = {**unet.config, "sample_size": 32, "_diffusers_version": "0.6.0"}
    unet._internal_dict = diffusers.configuration_utils.FrozenDict(entries)
    pipe = diffusers.StableDiffusionPipeline(**{**given, "unet": unet})
    described = family_of("StableDiffusionPipeline").describe(pipe)
    latents = described.latents
    expected = 64 * pipe.vae_scale_factor
    assert (latents.default_height, latents.default_width) == (expected, expected)
