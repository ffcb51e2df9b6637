"""A part of an image anew: the same as diffusers' inpainting pipelines, with denoisers that were
trained for it and with those that were not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting
from PIL import Image

import latentc
from latentc.cli import run as command
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS
from latentc.exporter.schedulers.tables import build
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError
from latentc.runtimes.verification.verify import relative_l2
from tests.support.combinations import kept
from tests.support.loaded import EAGER
from tests.support.sample_images import BACKENDS, CALL, STEPS, assert_same, mask, sample_image

SIZE = {"height": 32, "width": 48}
TRAINED = {"sd": False, "sdxl": False, "inpaint": True, "inpaint-xl": True}
CASES = [(name, backend) for name in TRAINED for backend in (EAGER, *BACKENDS)]
USUAL = (("sd", "onnxruntime"), ("sd", "openvino"), ("sdxl", "openvino"), ("inpaint", EAGER))


def reference(
    original: Callable[..., Any], name: str, scheduler: str | None, **call: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Final latents, and images from 0 to 1."""
    pipe = original(name, AutoPipelineForInpainting)
    if scheduler is not None:
        with quiet_loading():
            pipe.scheduler = build(scheduler, pipe.own_scheduler_config)
    seeds = call.pop("seed")
    made = []
    for kind in ("latent", "np"):
        each = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
        generator = each if isinstance(seeds, list) else each[0]
        with torch.no_grad():
            found = pipe(generator=generator, output_type=kind, **{**CALL, **SIZE, **call}).images
        made.append(found.numpy() if kind == "latent" else found)
    return made[0], made[1]


def given(**more: Any) -> dict[str, Any]:
    call = {"image": sample_image(48, 32), "mask_image": mask(48, 32), "num_inference_steps": STEPS}
    return {**call, "strength": 0.7, "seed": 7, **more}


@pytest.mark.support(family="name", task="inpainting", target="backend")
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize(("name", "backend"), kept(CASES, *USUAL))
def test_both_kinds(
    name: str, strength: float, backend: str, ours: Any, original: Callable[..., Any]
) -> None:
    call = given(strength=strength)
    latents, images = reference(original, name, "ddim", **call)
    result = ours(name, backend)(**CALL, **SIZE, **call, scheduler="ddim", output_type="np")
    assert_same(result, latents, images)


@pytest.mark.support(family="sd", task="inpainting", target="coreml-reference")
def test_coreml(coreml_bundle: Path, original: Callable[..., Any]) -> None:
    """The reference evaluator reads the packages back."""
    call = given(num_inference_steps=4)
    latents, images = reference(original, "sd", "pndm", **call)
    with latentc.load(coreml_bundle, backend="coreml-reference", precision="fp32") as pipe:
        result = pipe(**CALL, **SIZE, **call, scheduler="pndm", output_type="np")
    assert_same(result, latents, images)


@pytest.mark.parametrize("scheduler", DEFAULT_SCHEDULERS)
@pytest.mark.parametrize("name", ["sd", "inpaint"])
def test_every_scheduler(
    name: str, scheduler: str, ours: Any, original: Callable[..., Any]
) -> None:
    call = given(num_inference_steps=4)
    latents, images = reference(original, name, scheduler, **call)
    result = ours(name)(**CALL, **SIZE, **call, scheduler=scheduler, output_type="np")
    assert_same(result, latents, images)


@pytest.mark.parametrize("name", ["sd", "inpaint"])
@pytest.mark.parametrize("seed", [5, [5, 9]])
def test_two_images_of_one(
    name: str, seed: int | list[int], ours: Any, original: Callable[..., Any]
) -> None:
    """With one generator for both, and with one for each."""
    call = given(num_inference_steps=4, seed=seed, num_images_per_prompt=2)
    latents, images = reference(original, name, "euler_a", **call)
    result = ours(name)(**CALL, **SIZE, **call, scheduler="euler_a", output_type="np")
    assert_same(result, latents, images)


@pytest.mark.parametrize("name", ["sd", "inpaint"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("blur", [0, 4])
def test_crops_and_blurred_masks(
    name: str, padding: int, blur: int, ours: Any, original: Callable[..., Any]
) -> None:
    """The whole image comes back, in its own size."""
    image, where = sample_image(70, 50), mask(70, 50)
    pipe = original(name, AutoPipelineForInpainting)
    with quiet_loading():
        pipe.scheduler = build("ddim", pipe.own_scheduler_config)
    blurred = pipe.mask_processor.blur(where, blur) if blur else where
    options = {**CALL, **SIZE, "num_inference_steps": 4, "strength": 0.9}
    with torch.no_grad():
        (expected,) = pipe(
            image=image,
            mask_image=blurred,
            padding_mask_crop=padding,
            generator=torch.Generator().manual_seed(3),
            **options,
        ).images
    result = ours(name)(
        image=image,
        mask_image=where,
        padding_mask_crop=padding,
        mask_blur=blur,
        seed=3,
        scheduler="ddim",
        **options,
    )
    assert result.images[0].size == expected.size == (70, 50)
    difference = np.asarray(result.images[0]).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 2
    assert result.settings["padding_mask_crop"] == padding


def test_what_stays(ours: Any) -> None:
    """The part that is black in the mask has the image's latents in the end, to the last bit."""
    pipe = ours("sd", "onnxruntime")
    call = given(num_inference_steps=4, strength=1.0, output_type="latent", scheduler="ddim")
    one = pipe(**CALL, **SIZE, **call).latents
    other = pipe(**{**CALL, "prompt": "blue"}, **SIZE, **call).latents
    white = np.asarray(mask(48, 32))[::2, ::2] > 127
    assert np.array_equal(one[..., ~white], other[..., ~white])
    assert not np.array_equal(one[..., white], other[..., white])


def test_what_a_mask_may_be(ours: Any) -> None:
    pipe = ours("inpaint")
    call = {**CALL, **SIZE, **given(num_inference_steps=4, output_type="latent")}
    where = mask(48, 32)
    expected = pipe(**call).latents
    for other in (
        where.convert("RGB"),
        np.asarray(where),
        np.asarray(where) > 127,
        np.asarray(where)[..., np.newaxis],
        np.asarray(where, np.float32)[np.newaxis] / 255,
        [where],
    ):
        assert np.array_equal(pipe(**{**call, "mask_image": other}).latents, expected)
    edited = pipe(
        **call, callback_on_step_end=lambda *step: {"latents": step[3]["latents"] * 1.0}
    ).latents
    assert np.array_equal(edited, expected)


def test_latents_and_a_callback(ours: Any, original: Callable[..., Any]) -> None:
    """Noise of the caller's own at full strength; the callback sees blended latents."""
    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 24)).astype(np.float32)
    call = given(num_inference_steps=4, strength=1.0)
    expected, _ = reference(original, "inpaint", "ddim", **call, latents=torch.tensor(noise))
    pipe = ours("inpaint")
    found = pipe(**CALL, **SIZE, **call, latents=noise, scheduler="ddim", output_type="latent")
    assert relative_l2(found.latents, expected) <= 1e-4
    pipe, seen = ours("sd", "onnxruntime"), []
    result = pipe(
        **{**CALL, **SIZE, **call},
        scheduler="ddim",
        output_type="latent",
        callback_on_step_end=lambda *step: seen.append(step[3]["latents"]),
    )
    assert np.array_equal(seen[-1], result.latents)


def test_a_bundle_of_its_class(ours: Any) -> None:
    """One of a denoiser trained for it does nothing else."""
    manifest = ours("inpaint").manifest
    assert [program.name for program in manifest.programs] == ["inpainting"]
    assert manifest.latents.channels == 4
    with pytest.raises(InputError, match="no image"):
        ours("inpaint")("red")


@pytest.mark.combinations
def test_a_bundle_of_its_class_is_verified_with_an_image(bundles: Callable[[str], Path]) -> None:
    manifest = Manifest.load(bundles("inpaint"))
    assert all(build.verification and build.verification.passed for build in manifest.builds)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"mask_image": None}, "takes 'image' and 'mask_image'"),
        ({"mask_image": np.zeros((32, 48), np.uint8)}, "all black"),
        ({"mask_image": Image.new("L", (48, 32)), "padding_mask_crop": 2}, "all black"),
        ({"mask_image": np.zeros((32, 48, 3))}, "not an array"),
        ({"mask_image": [mask(48, 32)] * 2}, "2 images in 'mask_image' for 1"),
        ({"strength": 1.5}, "above 0 and at most 1"),
        ({"mask_blur": -1}, "at least 0"),
        ({"padding_mask_crop": -1}, "at least 0"),
        ({"padding_mask_crop": 1.5}, "must be an integer"),
        ({"padding_mask_crop": 2, "output_type": "np"}, "output_type must be 'pil'"),
        ({"padding_mask_crop": 2, "mask_image": mask(24, 16)}, "of one size"),
    ],
)
def test_bad_input(ours: Any, call: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ours("inpaint").stream("red", **SIZE, **{**given(), **call})


def test_other_bundles(sd_bundle: Path, ours: Any) -> None:
    where = mask(48, 32)
    with latentc.load(sd_bundle) as pipe, pytest.raises(InputError, match="--task inpainting"):
        pipe("red", image=sample_image(48, 32), mask_image=where)
    pipe = ours("sd", "onnxruntime")
    with pytest.raises(InputError, match="this bundle takes no image"):
        pipe.stream("red", mask_image=where)
    with pytest.raises(InputError, match="no mask was given"):
        pipe.stream("red", image=sample_image(48, 32), mask_blur=3)


def test_the_command(
    bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_image(48, 32).save(tmp_path / "in.png")
    mask(48, 32).save(tmp_path / "mask.png")
    Image.new("L", (48, 32)).save(tmp_path / "black.png")
    start = ["generate", str(bundles("sd")), "red", "--steps", "4", "-o", str(tmp_path / "o.png")]
    given = [*start, "--image", str(tmp_path / "in.png"), "--height", "32", "--width", "48"]
    options = ["--mask", str(tmp_path / "mask.png"), "--mask-blur", "2"]
    assert command([*given, *options, "--padding-mask-crop", "4"]) == 0
    with Image.open(tmp_path / "o.png") as made:
        assert made.size == (48, 32)
        assert '"padding_mask_crop": 4' in made.text["parameters"]  # type: ignore[attr-defined]
    (tmp_path / "o.png").unlink()
    assert command([*given, "--mask", str(tmp_path / "black.png")]) == 2
    assert "all black" in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()
