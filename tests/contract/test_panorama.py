"""Panoramas are denoised in views that overlap, as in diffusers: the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPanoramaPipeline,
)

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.verification.reference import watched
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, UnsupportedPipeline
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.programs.listing import listing
from latentc.runtimes.sampling.views import cut, put_together, views_of
from latentc.runtimes.verification.verify import relative_l2
from tests.docs import independent_loader as reader
from tests.support import tiny
from tests.support.combinations import kept
from tests.support.loaded import EAGER
from tests.support.sample_images import BACKENDS
from tests.support.uncaptured import uncaptured

STEPS = 3
TEXTS = {"prompt": ["a red circle", "blue"], "negative_prompt": ["", "a square"]}
# Views of 512 pixels: two by two of them, and a single one that is smaller.
SIZES = ({"height": 576, "width": 576}, {"height": 256, "width": 384})
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
}


@pytest.fixture(scope="module")
def bundle(
    pipeline_folder: Callable[[str], Path],
    sd_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("panorama") / "bundle"
    options: dict[str, Any] = {"schedulers": [*SCHEDULERS], "steps": [2, STEPS]}
    options["share_with"] = sd_bundle
    targets = ["onnx", "openvino"]
    return export(pipeline_folder("panorama"), folder, targets=targets, **options).bundle


@pytest.fixture(scope="module")
def original(pipeline_folder: Callable[[str], Path]) -> Any:
    with quiet_loading():
        pipe = StableDiffusionPanoramaPipeline.from_pretrained(pipeline_folder("panorama"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def modules(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pipeline]:
    """Panoramas over PyTorch's modules: their graphs are those of Stable Diffusion."""
    folder = tmp_path_factory.mktemp("panorama") / "uncaptured"
    schedulers = [*SCHEDULERS]
    with uncaptured(
        pipeline_folder("panorama"), folder, steps=[2, STEPS], schedulers=schedulers
    ) as pipe:
        yield pipe


@pytest.fixture(params=kept([EAGER, *BACKENDS], EAGER))
def ours(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    if request.param == EAGER:
        yield request.getfixturevalue("modules")
        return
    with latentc.load(request.getfixturevalue("bundle"), backend=request.param) as pipe:
        yield pipe


def latents_of(pipe: Any, **call: Any) -> np.ndarray:
    with watched(pipe, pipe.unet), torch.no_grad():
        latents: torch.Tensor = pipe(output_type="latent", **call).images
    return latents.numpy()


@pytest.mark.support(family="panorama", task="panorama", target="onnxruntime")
@pytest.mark.support(family="panorama", task="panorama", target="openvino")
@pytest.mark.parametrize("size", SIZES)
def test_the_same_latents(ours: Pipeline, original: Any, size: Any) -> None:
    """Each image of several as diffusers makes it alone: of several its class feeds views of one
    image with the texts of another."""
    call = {**size, "num_inference_steps": STEPS}
    several = ours(**TEXTS, **call, seed=[5, 6], output_type="latent").latents
    for place, found in enumerate(several):
        texts = {name: own[place] for name, own in TEXTS.items()}
        generator = torch.Generator().manual_seed(5 + place)
        expected = latents_of(original, **texts, **call, generator=generator)
        assert relative_l2(found, expected[0]) < 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_view_has_a_scheduler_of_its_own(
    scheduler: str, modules: Pipeline, original: Any
) -> None:
    """One that remembers, and one that draws: a view at a time."""
    call = {"prompt": "a red circle", **SIZES[0], "num_inference_steps": STEPS}
    usual = original.scheduler
    original.scheduler = SCHEDULERS[scheduler].from_config(usual.config)
    try:
        generator = torch.Generator().manual_seed(3)
        expected = latents_of(original, **call, generator=generator)
    finally:
        original.scheduler = usual
    found = modules(**call, scheduler=scheduler, seed=3, output_type="latent").latents
    assert relative_l2(found, expected) < 1e-4


def test_the_same_image(ours: Pipeline, original: Any) -> None:
    call: dict[str, Any] = {"prompt": "a red circle", "height": 512, "width": 576}
    call |= {"num_inference_steps": 2, "output_type": "np"}
    expected = original(**call, generator=torch.Generator().manual_seed(1)).images
    assert np.abs(ours(**call, seed=1).images - expected).max() < 2 / 255


def test_steps_and_callbacks_see_the_whole(modules: Pipeline) -> None:
    call: dict[str, Any] = {"prompt": "red", **SIZES[0], "num_inference_steps": 2, "seed": 1}
    pipe = modules
    run = pipe.stream(**call, output_type="latent")
    assert {step.latents.shape for step in run} == {(1, 4, 72, 72)}
    plain = run.finish().latents

    def changed(_: Any, index: int, __: float, values: dict[str, Any]) -> Any:
        return {"latents": values["latents"] * 0.5} if index == 0 else None

    halved = pipe(**call, output_type="latent", callback_on_step_end=changed).latents
    assert not np.array_equal(plain, halved)
    run = pipe.stream(**call, output_type="latent")
    for step in run:
        step.latents[...] = 0  # a copy: the caller's own
    assert np.array_equal(run.finish().latents, plain)
    given = pipe.compute("latents", **call)
    assert np.array_equal(pipe(**call, latents=given, output_type="latent").latents, plain)


@pytest.mark.combinations
def test_the_other_reader(bundle: Path) -> None:
    call: dict[str, Any] = {"prompt": ["red", "blue"], **SIZES[0], "num_inference_steps": 2}
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        for scheduler in ("ddim", "euler_a"):
            found = pipe(**call, seed=[3, 4], scheduler=scheduler, output_type="latent").latents
            latents, _ = reader.Bundle(bundle)(**call, seed=[3, 4], scheduler=scheduler)
            assert relative_l2(latents, found) < 1e-5


def test_the_program_says_so(modules: Pipeline) -> None:
    (program,) = modules.manifest.programs
    assert program.stands_for == "StableDiffusionPanoramaPipeline"
    assert "    views of 64 every 8\n" in listing(program)
    sizes = {name: (each.default * each.unit) for name, each in program.symbols.items()}
    assert sizes == {"height": 512, "width": 2048}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"width": 520}, "width 520 is not a multiple of 64"),
        ({"height": 64 * 600, "width": 64 * 600}, "views, each of which is denoised in every step"),
        ({"circular_padding": True}, "unknown argument 'circular_padding'"),
    ],
)
def test_bad_input(call: dict[str, Any], says: str, ours: Pipeline) -> None:
    with pytest.raises(InputError, match=says):
        ours("red", **call)


def test_what_cannot_be_exported(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = pipeline_folder("panorama")
    with pytest.raises(UnsupportedPipeline, match="step-cache: a denoiser that looks at views"):
        export(source, tmp_path / "b", passes=["step-cache"])
    tiny.stable_diffusion(tmp_path / "two", pipeline=StableDiffusionPanoramaPipeline)
    with pytest.raises(UnsupportedPipeline, match="whose VAE makes 2 pixels of a latent"):
        export(tmp_path / "two", tmp_path / "b")


@pytest.mark.combinations
def test_one_size(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedulers": [], "steps": [2], "verify": False}
    fixed = export(
        pipeline_folder("panorama"), tmp_path / "b", height=512, width=640, **options
    ).bundle
    manifest = Manifest.load(fixed)
    assert manifest.of_role("denoiser")[0].inputs["sample"].shape == ("batch", 4, 64, 64)
    with latentc.load(fixed) as pipe:
        assert pipe("red", num_inference_steps=2).images[0].size == (640, 512)
    with latentc.load(fixed, static={}) as pipe:  # for its one size, which is not square
        assert pipe("red", num_inference_steps=2).images[0].size == (640, 512)


@pytest.mark.parametrize("sides", [(8, 8), (8, 24), (20, 12), (4, 6)])
def test_views_cover_everything_once_put_together(sides: tuple[int, int]) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 3, *sides)).astype(np.float32)
    views = views_of(sides, 8, 4)
    parts = cut(latents, views)
    assert parts.shape == (2 * len(views), 3, min(8, sides[0]), min(8, sides[1]))
    np.testing.assert_allclose(put_together(parts, views, latents.shape), latents, rtol=1e-6)
