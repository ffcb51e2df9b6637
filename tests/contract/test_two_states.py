"""A loop over two states: one plan moves images and strips, which one denoiser takes and predicts
together, as in the pipeline of `tests.support.duet`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import latentc
from latentc.exporter.classes import OWN, PipelineClass
from latentc.exporter.compiler.export import export
from latentc.runtimes.programs.statements import loop_of
from latentc.runtimes.verification.verify import relative_l2
from tests.docs import independent_loader as reader
from tests.support import duet

SCHEDULERS = ["dpmpp_2m", "euler_a"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("duet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "DuetPipeline", duet.DuetPipeline, raising=False)
        patch.setattr(diffusers, "DuetDenoiser", duet.DuetDenoiser, raising=False)
        patch.setitem(OWN, "DuetPipeline", PipelineClass(duet.__name__, offers=()))  # type: ignore[arg-type]
        duet.make_pipeline().save_pretrained(folder / "pipeline")
        options: dict[str, Any] = {"schedulers": SCHEDULERS, "steps": [4, 7]}
        targets = ["onnx", "openvino"]
        exported = export(folder / "pipeline", folder / "bundle", targets=targets, **options)
        yield exported.bundle


@pytest.fixture(params=["onnxruntime", "openvino"])
def ours(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with latentc.load(bundle, backend=request.param) as pipe:
        yield pipe


def _original(bundle: Path, scheduler: str | None) -> Any:
    pipe = duet.make_pipeline()
    saved = bundle.parent / "pipeline" / "scheduler"
    pipe.scheduler = diffusers.DDIMScheduler.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    classes: dict[str | None, Any] = {
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    }
    if scheduler is not None:
        pipe.scheduler = classes[scheduler].from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
@pytest.mark.parametrize("seeds", [3, [4, 5]], ids=["one", "several"])
def test_both_states_are_those_of_pytorch(
    ours: Any, bundle: Path, scheduler: str | None, seeds: Any
) -> None:
    generators = [torch.Generator().manual_seed(s) for s in np.atleast_1d(seeds).tolist()]
    given = {"batch_size": 2, "num_inference_steps": 7}
    expected = _original(bundle, scheduler)(
        generator=generators if isinstance(seeds, list) else generators[0], **given
    )
    call = {**given, "seed": seeds, "scheduler": scheduler}
    result = ours(output_type="np", **call)
    assert np.abs(result.images - expected.images).max() <= 2 / 255
    strips = ours.compute("denoised_strip", **call)
    assert relative_l2(strips, expected.strips.numpy()) < 1e-4
    assert strips.std() > 0.05


def test_a_strip_that_is_given_changes_the_image(ours: Any) -> None:
    values = {name: ours.compute(name, seed=1) for name in ("latents", "strip_latents")}
    again = ours(output_type="np", seed=9, **values)
    alone = ours(output_type="np", seed=1)
    np.testing.assert_array_equal(again.images, alone.images)
    other = ours(output_type="np", seed=9, **{**values, "strip_latents": -values["strip_latents"]})
    assert np.abs(other.images - alone.images).max() > 1e-3


def test_latents_that_a_callback_replaces_leave_the_strip(ours: Any) -> None:
    def halve(_: Any, index: int, __: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5} if index == 1 else {}

    changed = ours(seed=2, num_inference_steps=4, callback_on_step_end=halve)
    plain = ours(seed=2, num_inference_steps=4)
    assert relative_l2(changed.latents, plain.latents) > 1e-2


@pytest.mark.parametrize("scheduler", [None, "euler_a"])
def test_the_independent_reader_draws_the_same(bundle: Path, scheduler: str | None) -> None:
    call: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 7, "scheduler": scheduler}
    latents, _ = reader.Bundle(bundle)(seed=3, **call)
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        assert relative_l2(latents, pipe(seed=3, **call).latents) < 1e-5


def test_the_program_lists_both_states(bundle: Path) -> None:
    (program,) = latentc.load(bundle).manifest.programs
    assert [state.name for state in loop_of(program).states] == ["denoised", "denoised_strip"]
