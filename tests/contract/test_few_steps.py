"""Zero terminal SNR, rescaled guidance, and models for one to four steps: as in diffusers.

The graphs are those of one pipeline with a LoRA fused; the schedulers have trailing timesteps as
SD-Turbo, with zero terminal SNR or without.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS
from latentc.exporter.schedulers.tables import build
from latentc.exporter.verification.reference import watched
from latentc.runtimes.errors import InputError
from latentc.runtimes.verification.verify import relative_l2
from tests.conftest import KEPT, one_at_a_time
from tests.exporter.source.test_ingredients import make_lora
from tests.support import tiny_configurations as tiny
from tests.support.combinations import kept
from tests.support.loaded import EAGER, kept_open
from tests.support.uncaptured import uncaptured

SEED = 7
STEPS = (1, 4)
LATENTS = 1e-4  # relative L2 of the final latents
IMAGE = 2  # of 255
BACKENDS = ("onnxruntime", "openvino")
TRAILING = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SCHEDULERS = {
    "turbo": TRAILING,
    "zero-snr": {**TRAILING, "rescale_betas_zero_snr": True},
}
LORA = "lora.safetensors"
Get = Callable[..., Any]


@pytest.fixture(scope="module")
def folder() -> Callable[[str], Path]:
    """Return a function that makes one pipeline with either scheduler, and a LoRA beside it."""

    def make(name: str) -> Path:
        made = KEPT / "pipelines" / "few-steps" / name
        with one_at_a_time(f"pipeline-{name}"):
            torch.manual_seed(3)
            scheduler = SCHEDULERS[name]
            tiny.stable_diffusion(
                made, tiny.Configuration(unet={"mid_block_type": None}, scheduler=scheduler)
            )
            make_lora(made, made / LORA, 1)
        return made

    return make


@pytest.fixture(scope="module")
def bundle_of(folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """Return a function that exports both pipelines, and returns the bundle of one."""
    bundles = KEPT / "bundles" / "few-steps"

    @cache
    def get(wanted: str) -> Path:
        with one_at_a_time("bundle-few-steps"):
            for name in SCHEDULERS:
                if name != "turbo" and not (bundles / name).exists():
                    shutil.copytree(bundles / "turbo", bundles / name)  # the graphs are the same
                export(
                    folder(name),
                    bundles / name,
                    targets=["onnx", "openvino"],
                    lora=[folder(name) / LORA],
                    steps=STEPS,
                    overwrite=True,
                )
        return bundles / wanted

    return get


@pytest.fixture(scope="module")
def ours(
    folder: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Get]:
    def modules(name: str) -> latentc.Pipeline:
        return uncaptured(
            folder(name),
            tmp_path_factory.mktemp("few-steps") / name,
            steps=STEPS,
            schedulers=None,
            asked={"lora": [str(folder(name) / LORA)]},
        )

    with kept_open(bundle_of, modules) as get:
        yield lambda backend, name="turbo": get(name, backend)


@pytest.fixture(scope="module")
def theirs(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            with quiet_loading():
                pipe = DiffusionPipeline.from_pretrained(folder(name))
                pipe.load_lora_weights(folder(name), weight_name=LORA)
            pipe.set_progress_bar_config(disable=True)
            pipe.own_scheduler_config = dict(pipe.scheduler.config)
            loaded[name] = pipe
        return loaded[name]

    return get


def assert_same(pipe: latentc.Pipeline, theirs: Any, scheduler: str, **call: Any) -> Any:
    """The last latents and the images; returns our result."""
    with quiet_loading():
        theirs.scheduler = build(scheduler, theirs.own_scheduler_config)
    with watched(theirs, theirs.unet) as seen, torch.no_grad():
        generator = torch.Generator().manual_seed(SEED)
        images = theirs(generator=generator, output_type="np", **call).images
    assert seen.latents is not None
    result = pipe(scheduler=scheduler, seed=SEED, output_type="np", **call)
    assert relative_l2(result.latents, seen.latents.numpy()) <= LATENTS
    assert np.abs(result.images - images).max() * 255 <= IMAGE
    return result


def test_what_one_step_cannot_do_is_left_out(ours: Get) -> None:
    """The default schedulers but PNDM have plans for 1 step; for 4 all have."""
    steps = {each.name: each.steps for each in ours(EAGER).manifest.schedules}
    assert steps == dict.fromkeys(DEFAULT_SCHEDULERS, STEPS) | {"pndm": (4,)}


@pytest.mark.support(family="zero-snr", task="text-to-image", target="backend")
@pytest.mark.parametrize("backend", kept([EAGER, *BACKENDS], EAGER))
@pytest.mark.parametrize("scheduler", DEFAULT_SCHEDULERS)
def test_zero_terminal_snr(scheduler: str, backend: str, ours: Get, theirs: Get) -> None:
    """Two images of different deviations: each is rescaled by its own."""
    call: dict[str, Any] = {
        "prompt": ["a red circle", "!"],
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "guidance_rescale": 0.7,
    }
    pipe = ours(backend, "zero-snr")
    result = assert_same(pipe, theirs("zero-snr"), scheduler, **call)
    if scheduler == "ddim":
        assert result.settings["guidance_rescale"] == 0.7
        off = pipe(scheduler=scheduler, seed=SEED, **(call | {"guidance_rescale": 0.0}))
        assert relative_l2(off.latents, result.latents) > 1e-2


@pytest.mark.support(family="turbo", task="text-to-image", target="backend")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("backend", kept([EAGER, *BACKENDS], EAGER))
def test_turbo(backend: str, steps: int, ours: Get, theirs: Get) -> None:
    call: dict[str, Any] = {"prompt": "a red circle", "guidance_scale": 0.0}
    assert_same(ours(backend), theirs("turbo"), "euler_a", num_inference_steps=steps, **call)


@pytest.mark.support(family="lcm-lora", task="text-to-image", target="backend")
@pytest.mark.parametrize("backend", kept([EAGER, *BACKENDS], EAGER))
def test_lora_of_a_latent_consistency_model(backend: str, ours: Get, theirs: Any) -> None:
    call: dict[str, Any] = {"prompt": "a red circle", "guidance_scale": 1.0}
    assert_same(ours(backend), theirs("turbo"), "lcm", num_inference_steps=4, **call)


def test_rescaling_means_nothing_without_guidance(ours: Get) -> None:
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 1}
    pipe = ours(EAGER)
    plain = pipe("a red circle", **call)
    assert np.array_equal(pipe("a red circle", guidance_rescale=0.7, **call).latents, plain.latents)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_rescaling_may_be(value: float, ours: Get) -> None:
    with pytest.raises(InputError, match="guidance_rescale"):
        ours(EAGER)("a red circle", guidance_rescale=value)
