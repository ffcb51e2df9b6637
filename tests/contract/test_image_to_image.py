"""From an image: the same as diffusers' image-to-image pipelines, for every scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
)
from PIL import Image

import latentc
from latentc.cli import run as command
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS
from latentc.exporter.schedulers.tables import build
from latentc.exporter.verification.reference import watched
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError
from latentc.runtimes.verification.verify import relative_l2
from tests.support.sample_images import BACKENDS, CALL, STEPS, assert_same, sample_image
from tests.support.tiny import tiny_autoencoder

SIZES = {"sd": (64, 48), "sdxl": (64, 48)}  # width, height


@pytest.fixture(scope="module")
def theirs(original: Callable[..., Any]) -> Callable[[str], Any]:
    return lambda name: original(name, AutoPipelineForImage2Image)


def reference(pipe: Any, scheduler: str | None, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    """Final latents, and images from 0 to 1."""
    if scheduler is not None:
        with quiet_loading():
            pipe.scheduler = build(scheduler, pipe.own_scheduler_config)
    seeds = call.pop("seed")
    made = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
    generator = made if isinstance(seeds, list) else made[0]
    with watched(pipe, pipe.unet) as seen, torch.no_grad():
        images = pipe(generator=generator, output_type="np", **{**CALL, **call}).images
    assert seen.latents is not None
    return seen.latents.numpy(), images


@pytest.mark.support(family="name", task="image-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheduler", DEFAULT_SCHEDULERS)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_scheduler(
    name: str, scheduler: str, backend: str, ours: Any, theirs: Callable[[str], Any]
) -> None:
    image = sample_image(*SIZES[name])
    call = {"image": image, "strength": 0.6, "num_inference_steps": STEPS, "seed": 7}
    latents, images = reference(theirs(name), scheduler, **call)
    result = ours(name, backend)(**CALL, **call, scheduler=scheduler, output_type="np")
    assert_same(result, latents, images)


@pytest.mark.support(family="sd", task="image-to-image", target="coreml-reference")
def test_coreml(coreml_bundle: Path, theirs: Callable[[str], Any]) -> None:
    """The reference evaluator reads the packages back."""
    call = {
        "image": sample_image(*SIZES["sd"]),
        "strength": 0.6,
        "num_inference_steps": 4,
        "seed": 7,
    }
    latents, images = reference(theirs("sd"), "pndm", **call)
    with latentc.load(coreml_bundle, backend="coreml-reference", precision="fp32") as pipe:
        assert_same(pipe(**CALL, **call, scheduler="pndm", output_type="np"), latents, images)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["pndm", "heun", "unipc", "dpmpp_2m"])
def test_strengths(
    scheduler: str, strength: float, ours: Any, theirs: Callable[[str], Any]
) -> None:
    call = {
        "image": sample_image(32, 32),
        "strength": strength,
        "num_inference_steps": 4,
        "seed": 3,
    }
    latents, images = reference(theirs("sd"), scheduler, **call)
    result = ours("sd", "onnxruntime")(**CALL, **call, scheduler=scheduler, output_type="np")
    assert_same(result, latents, images)
    assert result.settings["strength"] == strength


@pytest.mark.parametrize("seed", [5, [5, 9]])
def test_two_images_of_one(seed: int | list[int], ours: Any, theirs: Callable[[str], Any]) -> None:
    """With one generator for both, and with one for each."""
    call = {"image": sample_image(32, 32), "num_inference_steps": 4, "seed": seed}
    call |= {"num_images_per_prompt": 2, "strength": 0.5}
    latents, images = reference(theirs("sd"), "euler_a", **call)
    result = ours("sd", "onnxruntime")(**CALL, **call, scheduler="euler_a", output_type="np")
    assert_same(result, latents, images)


def test_an_image_for_each_prompt(ours: Any, theirs: Callable[[str], Any]) -> None:
    two = [sample_image(32, 32), sample_image(32, 32, seed=40)]
    call = {"image": two, "num_inference_steps": 4, "seed": 5, "strength": 0.5}
    prompts = {"prompt": ["a red circle", "blue"]}
    latents, images = reference(theirs("sd"), "ddim", **call, **prompts)
    result = ours("sd", "onnxruntime")(
        **{**CALL, **prompts}, **call, scheduler="ddim", output_type="np"
    )
    assert_same(result, latents, images)


def test_what_an_image_may_be(ours: Any, theirs: Callable[[str], Any]) -> None:
    """Resized as diffusers does; arrays, greys and transparency too."""
    pipe = ours("sd", "onnxruntime")
    call = {"num_inference_steps": 4, "seed": 5, "strength": 0.5, "scheduler": "ddim"}
    given = sample_image(32, 32)

    def latents(image: Any, **size: int) -> np.ndarray:
        found: np.ndarray = pipe(**CALL, **call, image=image, output_type="latent", **size).latents
        return found

    expected = latents(given)
    assert np.array_equal(latents(np.asarray(given)), expected)
    assert np.array_equal(latents(np.asarray(given, np.float32) / 255), expected)
    assert np.array_equal(latents(np.asarray(given)[None]), expected)
    assert latents(sample_image(33, 33)).shape == expected.shape
    assert latents(given.convert("L")).shape == expected.shape
    assert latents(given.convert("RGBA")).shape == expected.shape
    assert latents(given, height=16, width=48).shape == (1, 4, 8, 24)
    processor = theirs("sd").image_processor
    resized = processor.resize(sample_image(50, 70), height=32, width=32)
    assert np.array_equal(latents(sample_image(50, 70), height=32, width=32), latents(resized))


def test_with_what_else_there_is(bundles: Callable[[str], Path]) -> None:
    """Fixed sizes, low memory and step by step; calls without an image go on as ever."""
    call = {**CALL, "num_inference_steps": 4, "seed": 5, "output_type": "latent"}
    image = sample_image(32, 32)
    with latentc.load(bundles("sd"), backend="openvino") as pipe:
        expected = pipe(**call, image=image, strength=0.5).latents
        plain = pipe(**call).latents
        run = pipe.stream(**call, image=image, strength=0.5)
        assert len([step.timestep for step in run]) == run.num_timesteps < 5
        assert np.array_equal(run.finish().latents, expected)
    with latentc.load(bundles("sd"), backend="openvino", low_memory=True) as pipe:
        assert relative_l2(pipe(**call, image=image, strength=0.5).latents, expected) < 1e-5
        assert relative_l2(pipe(**call).latents, plain) < 1e-5
    with latentc.load(bundles("sd"), backend="openvino", static=True) as pipe:
        assert relative_l2(pipe(**call, image=image, strength=0.5).latents, expected) < 1e-5
    with latentc.load(bundles("sd"), backend="onnxruntime") as pipe:
        assert "vae_encoder" not in pipe.sessions._opened
        pipe(**call, image=image)
        assert "vae_encoder" in pipe.sessions._opened


def test_a_tiny_autoencoder_draws_no_noise(
    pipeline_folder: Callable[[str], Path], sd_bundle: Path, tmp_path: Path
) -> None:
    tiny = tiny_autoencoder()
    tiny.save_pretrained(tmp_path / "tiny")
    export(
        pipeline_folder("sd"),
        tmp_path / "b",
        vae=tmp_path / "tiny",
        tasks=["image-to-image"],
        schedulers=["ddim"],
        steps=[4],
        share_with=sd_bundle,
    )
    (encoder,) = Manifest.load(tmp_path / "b").of_role("image_encoder")
    assert list(encoder.inputs) == ["image"]
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder("sd"), vae=tiny)
    redraw = AutoPipelineForImage2Image.from_pipe(pipe)
    redraw.set_progress_bar_config(disable=True)
    redraw.own_scheduler_config = dict(pipe.scheduler.config)
    call = {"image": sample_image(32, 32), "strength": 0.5, "num_inference_steps": 4, "seed": 3}
    latents, images = reference(redraw, "ddim", **call)
    with latentc.load(tmp_path / "b") as made:
        assert_same(made(**CALL, **call, scheduler="ddim", output_type="np"), latents, images)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"strength": 0.5}, "changes nothing in text-to-image"),
        ({"image": "cat.png"}, "expected a Pillow image"),
        ({"image": []}, "expected a Pillow image"),
        ({"image": np.zeros((32, 32))}, "not an array"),
        ({"image": np.full((32, 32, 3), 2.0)}, "numbers from 0 to 1"),
        (
            {"image": np.zeros((32, 32, 3)), "height": 48},
            "an array of 32x32 pixels, expected 32x48",
        ),
        ({"image": sample_image(32, 32), "strength": 0}, "above 0 and at most 1"),
        ({"image": sample_image(32, 32), "strength": 1.5}, "above 0 and at most 1"),
        ({"image": sample_image(32, 32), "strength": 0.1}, "leaves none"),
        ({"image": [sample_image(32, 32)] * 2}, "2 images in 'image' for 1"),
        (
            {"image": [sample_image(32, 32), sample_image(16, 32)], "num_images_per_prompt": 2},
            "2 sizes",
        ),
        (
            {"image": sample_image(32, 32), "latents": np.zeros((1, 4, 16, 16), np.float32)},
            "give one of them",
        ),
    ],
)
def test_bad_input(ours: Any, call: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ours("sd", "onnxruntime").stream("red", num_inference_steps=4, **call)


def test_bundles_without_it(
    sd_bundle: Path, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with latentc.load(sd_bundle) as pipe, pytest.raises(InputError, match="--task image-to-image"):
        pipe("red", image=sample_image(32, 32))
    with pytest.raises(InputError, match="DDPMPipeline has no task image-to-image"):
        export(pipeline_folder("unconditional"), tmp_path / "b", tasks=["image-to-image"])
    with pytest.raises(InputError, match="unknown task 'painting'; did you mean 'inpainting'"):
        export(pipeline_folder("sd"), tmp_path / "b", tasks=["painting"])
    assert not (tmp_path / "b").exists()


def generate(bundle: Path, output: Path, *arguments: str) -> Sequence[str]:
    return ["generate", str(bundle), "red", "--steps", "4", "-o", str(output), *arguments]


@pytest.mark.fault("2.3", "the command ignores the orientation of a file")
def test_the_command(
    bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = Image.Exif()
    upright[0x0112] = 6  # a quarter turn
    sample_image(32, 48).rotate(90, expand=True).save(tmp_path / "in.png", exif=upright)
    (tmp_path / "text.png").write_text("no image")
    output, given = tmp_path / "out.png", ["--image", str(tmp_path / "in.png")]
    assert command(generate(bundles("sd"), output, *given, "--strength", "0.5")) == 0
    with Image.open(output) as made:
        assert made.size == (32, 48)
        assert '"strength": 0.5' in made.text["parameters"]  # type: ignore[attr-defined]
    for wrong, says in (
        (["--image", str(tmp_path / "none.png")], "no such file"),
        (["--image", str(tmp_path / "text.png")], "not an image that can be read"),
        ([*given, "--strength", "2"], "above 0 and at most 1"),
    ):
        assert command(generate(bundles("sd"), tmp_path / "no.png", *wrong)) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()
