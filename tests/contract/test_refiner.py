"""Two models in turn: a base model up to a part of the schedule, and the refiner from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentc
from latentc.cli import run as command
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS
from latentc.exporter.schedulers.tables import build
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError
from tests.conftest import KEPT, one_at_a_time
from tests.support.combinations import kept
from tests.support.loaded import EAGER
from tests.support.sample_images import BACKENDS, CALL, STEPS, assert_same, sample_image


def use(pipe: Any, scheduler: str) -> Any:
    with quiet_loading():
        pipe.scheduler = build(scheduler, pipe.own_scheduler_config)
    return pipe


def draw(pipe: Any, kind: str, **call: Any) -> Any:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(call.pop("seed"))
        return pipe(generator=generator, output_type=kind, **{**CALL, **call}).images


@pytest.mark.support(family="refiner", task="image-to-image", target="backend")
@pytest.mark.parametrize("backend", kept([EAGER, *BACKENDS], EAGER))
def test_alone(backend: str, ours: Any, original: Callable[..., Any]) -> None:
    call = {"image": sample_image(48, 32), "num_inference_steps": STEPS, "strength": 0.6, "seed": 7}
    pipe = use(original("refiner"), "euler")
    latents = draw(pipe, "latent", **call).numpy()
    images = draw(pipe, "np", **call)
    result = ours("refiner", backend)(**CALL, **call, scheduler="euler", output_type="np")
    assert_same(result, latents, images)
    scores = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    latents = draw(pipe, "latent", **call, **scores).numpy()
    images = draw(pipe, "np", **call, **scores)
    result = ours("refiner", backend)(**CALL, **call, **scores, scheduler="euler", output_type="np")
    assert_same(result, latents, images)


@pytest.mark.support(family="refiner", task="base and refiner in turn", target="backend")
@pytest.mark.parametrize(
    ("scheduler", "backend"),
    [
        *((name, EAGER) for name in DEFAULT_SCHEDULERS),
        *kept([(name, backend) for name in ("euler", "unipc") for backend in BACKENDS]),
    ],
)
def test_ensembles(scheduler: str, backend: str, ours: Any, original: Callable[..., Any]) -> None:
    """Every scheduler makes ensembles, the multistep ones included."""
    size = {"height": 32, "width": 48}
    call = {"num_inference_steps": STEPS, "seed": 7}
    base = use(original("sdxl"), scheduler)
    half = draw(base, "latent", **call, **size, denoising_end=0.6)
    pipe = use(original("refiner"), scheduler)
    latents = draw(pipe, "latent", **call, image=half, denoising_start=0.6).numpy()
    images = draw(pipe, "np", **call, image=half, denoising_start=0.6)
    call |= {**CALL, "scheduler": scheduler}
    found = ours("sdxl", backend)(**call, **size, denoising_end=0.6, output_type="latent")
    assert np.linalg.norm(found.latents - half.numpy()) <= 1e-4 * np.linalg.norm(half.numpy())
    result = ours("refiner", backend)(
        **call, image=found.latents, denoising_start=0.6, output_type="np"
    )
    assert_same(result, latents, images)


def test_latents_as_an_image(ours: Any, original: Callable[..., Any]) -> None:
    """With noise added, as for an image."""
    clean = np.random.default_rng(0).standard_normal((1, 4, 16, 24)).astype(np.float32)
    call = {"num_inference_steps": STEPS, "strength": 0.5, "seed": 3}
    pipe = use(original("refiner"), "ddim")
    latents = draw(pipe, "latent", **call, image=torch.tensor(clean)).numpy()
    images = draw(pipe, "np", **call, image=torch.tensor(clean))
    result = ours("refiner")(**CALL, **call, image=clean, scheduler="ddim", output_type="np")
    assert_same(result, latents, images)


def test_what_the_bundle_says(ours: Any) -> None:
    manifest = ours("refiner").manifest
    assert [program.name for program in manifest.programs] == ["image-to-image"]
    assert [each.name for each in manifest.tokenizers] == ["tokenizer_2"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"denoising_start": 0.5, "image": sample_image(32, 32)}, "another run's latents"),
        ({"denoising_end": 1.5}, "above 0 and at most 1"),
        ({"denoising_end": 0.01}, "leaves no step"),
        ({"denoising_start": 0.999, "image": np.zeros((1, 4, 16, 16))}, "cannot begin there"),
        (
            {"denoising_start": 0.5, "denoising_end": 0.4, "image": np.zeros((1, 4, 16, 16))},
            "must be below",
        ),
        ({"image": np.full((1, 4, 16, 16), np.nan)}, "NaN"),
        ({"image": np.zeros((2, 4, 16, 16))}, "2 latents in 'image' for 1"),
    ],
)
def test_bad_input(call: dict[str, Any], says: str, ours: Any) -> None:
    given = {"image": sample_image(32, 32), **call}
    with pytest.raises(InputError, match=says):
        ours("refiner").stream("red", num_inference_steps=4, **given)


@pytest.mark.combinations
def test_the_command(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    start = [
        "generate",
        str(bundles("sdxl")),
        "red",
        "--steps",
        "4",
        "--seed",
        "1",
        "--height",
        "32",
    ]
    refiner = ["--refiner", str(bundles("refiner")), "-o", str(tmp_path / "a.png")]
    assert command([*start, "--width", "32", *refiner, "--denoising-end", "0.5"]) == 0
    assert command([*start, "--width", "32", *refiner[:2], "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.combinations
def test_what_both_have_is_stored_once(
    pipeline_folder: Callable[[str], Path], bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    """The second text encoder and the VAE, on every engine; each bundle does without the other."""
    base, refined = KEPT / "shared" / "base", KEPT / "shared" / "refiner"
    with one_at_a_time("shared"):
        shutil.rmtree(KEPT / "shared", ignore_errors=True)
        shutil.copytree(bundles("sdxl"), base)
        shutil.copytree(bundles("refiner"), refined)
        call = ["export", str(pipeline_folder("refiner")), "-o", str(refined), "-t", "onnx"]
        call += ["-t", "openvino", "--steps", "4", "--steps", str(STEPS), "-q"]
        assert command([*call, "--share-with", str(base)]) == 0
        size = {"height": 32, "width": 48}
        before = latentc.load(bundles("refiner"), backend="onnxruntime")
        given = {**CALL, "image": sample_image(**size), "num_inference_steps": STEPS, "seed": 1}
        manifest = Manifest.load(refined)
        for build in manifest.builds:
            for name in ("text_encoder_2", "vae_decoder", "vae_encoder"):
                largest = max(build.artifacts[name].files, key=lambda file: file.size)
                assert (refined / largest.path).stat().st_nlink > 1, (build.name, name)
            largest = max(build.artifacts["denoiser"].files, key=lambda file: file.size)
            assert (refined / largest.path).stat().st_nlink == 1
        shutil.rmtree(base)
        with latentc.load(refined, backend="onnxruntime", verify=True) as pipe:
            assert np.array_equal(pipe(**given).latents, before(**given).latents)
        before.close()
