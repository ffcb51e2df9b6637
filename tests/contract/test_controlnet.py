"""ControlNets fused with the denoiser: the same as diffusers' ControlNet pipelines, one or two,
from noise, from an image and with a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
)
from PIL import Image

import latentc
from latentc.cli import run as command
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.errors import InputError, SourceError, UnsupportedPipeline
from latentc.runtimes.programs.statements import Image as ImageArgument
from tests.conftest import CONTROLLED
from tests.support.combinations import kept
from tests.support.loaded import EAGER, Ours, kept_open
from tests.support.sample_images import BACKENDS, CALL, assert_same, mask, sample_image
from tests.support.uncaptured import uncaptured

SIZE = {"height": 32, "width": 48}
STEPS = 4
AUTO = {
    "text-to-image": AutoPipelineForText2Image,
    "image-to-image": AutoPipelineForImage2Image,
    "inpainting": AutoPipelineForInpainting,
}


def outline(width: int, height: int, seed: int = 0) -> Image.Image:
    """White lines on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[5 + seed : -5, 8] = pixels[5 + seed : -5, -9] = 255
    pixels[5 + seed, 8:-8] = pixels[-6, 8:-8] = 255
    return Image.fromarray(pixels)


CASES = [(name, backend) for name in CONTROLLED for backend in (EAGER, *BACKENDS)]
# What every run tries: of several ControlNets the results are added in the same graph.
USUAL = (("sd", "onnxruntime"), ("sd", "openvino"), ("sd-two", EAGER))


@pytest.fixture(scope="module")
def made(
    controlled: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
    nets: Callable[[str], list[Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ours]:
    def modules(name: str) -> latentc.Pipeline:
        return uncaptured(
            pipeline_folder(name.partition("-")[0]),
            tmp_path_factory.mktemp("uncaptured") / name,
            tasks=["image-to-image", "inpainting"] if name == "sd" else (),
            steps=[STEPS],
            schedulers=["ddim", "euler_a"],
            asked={"controlnet": [str(folder) for folder in nets(name)]},
        )

    with kept_open(controlled, modules) as get:
        yield get


@pytest.fixture(scope="module")
def theirs(
    pipeline_folder: Callable[[str], Path], nets: Callable[[str], list[Path]]
) -> Callable[[str, str], Any]:
    loaded: dict[tuple[str, str], Any] = {}

    def get(name: str, task: str) -> Any:
        if (name, task) not in loaded:
            with quiet_loading():
                pipe = DiffusionPipeline.from_pretrained(pipeline_folder(name.partition("-")[0]))
                models = [ControlNetModel.from_pretrained(folder) for folder in nets(name)]
                own = models if len(models) > 1 else models[0]
                loaded[name, task] = AUTO[task].from_pipe(pipe, controlnet=own)
            loaded[name, task].set_progress_bar_config(disable=True)
        return loaded[name, task]

    return get


def check(made: Any, theirs: Any, name: str, task: str, backend: str = EAGER, **call: Any) -> None:
    pipe, seed, expected = theirs(name, task), call.pop("seed", 7), []
    call = {**CALL, "num_inference_steps": STEPS, **call}
    given = dict(call)
    if task == "text-to-image":  # diffusers calls it otherwise where there is no other image
        given["image"] = given.pop("control_image")
    if task == "image-to-image" or task == "inpainting":
        given |= SIZE
    for kind in ("latent", "np"):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            found = pipe(generator=generator, output_type=kind, **given).images
        expected.append(found.numpy() if kind == "latent" else found)
    assert_same(made(name, backend)(**call, seed=seed, output_type="np"), *expected)


@pytest.mark.support(family="name", task="ControlNet", target="backend")
@pytest.mark.parametrize(("name", "backend"), kept(CASES, *USUAL))
def test_from_noise(name: str, backend: str, made: Any, theirs: Any) -> None:
    images = [outline(48, 32, seed) for seed in range(CONTROLLED[name])]
    image: Any = images if len(images) > 1 else images[0]
    scale = [0.7, 1.2][: len(images)]
    check(
        *(made, theirs, name, "text-to-image", backend),
        control_image=image,
        controlnet_conditioning_scale=scale if len(scale) > 1 else scale[0],
    )


@pytest.mark.support(family="sd", task="ControlNet, task", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
def test_with_other_images(task: str, backend: str, made: Any, theirs: Any) -> None:
    given = {"mask_image": mask(48, 32)} if task == "inpainting" else {}
    check(
        *(made, theirs, "sd", task, backend),
        image=sample_image(48, 32),
        control_image=outline(48, 32),
        strength=0.8,
        **given,
    )


@pytest.mark.parametrize(
    "window",
    [
        {"control_guidance_end": 0.5},
        {"control_guidance_start": 0.3, "control_guidance_end": 0.8},
        {"guidance_scale": 1.0, "control_guidance_start": 0.5},
    ],
)
def test_windows(window: dict[str, float], made: Any, theirs: Any) -> None:
    check(made, theirs, "sd", "text-to-image", control_image=outline(48, 32), **window)


def test_windows_of_two(made: Any, theirs: Any) -> None:
    check(
        *(made, theirs, "sd-two", "text-to-image"),
        control_image=[outline(48, 32), outline(48, 32, 3)],
        control_guidance_start=[0.0, 0.5],
        control_guidance_end=[0.5, 1.0],
        num_images_per_prompt=2,
    )


def test_what_goes_on_as_ever(made: Any, controlled: Callable[[str], Path]) -> None:
    """Windows of the guidance beside those of the ControlNet, low memory, a scale of zero."""
    call = {**CALL, "control_image": outline(48, 32), "num_inference_steps": STEPS, "seed": 5}
    call |= {"output_type": "latent", "control_guidance_end": 0.6, "guidance_stop": 0.5}
    expected = made("sd", "onnxruntime")(**call).latents
    with latentc.load(controlled("sd"), backend="onnxruntime", low_memory=True) as pipe:
        assert np.array_equal(pipe(**call).latents, expected)
    off = {**call, "control_guidance_end": None, "guidance_stop": None}
    none = made("sd")(**off, controlnet_conditioning_scale=0.0).latents
    other = {**off, "control_image": outline(48, 32, 4)}
    assert np.array_equal(made("sd")(**other, controlnet_conditioning_scale=0.0).latents, none)
    assert not np.array_equal(made("sd")(**off).latents, none)


def test_a_pipeline_that_has_one(
    pipeline_folder: Callable[[str], Path], theirs: Any, tmp_path: Path
) -> None:
    """Saved as diffusers' ControlNet pipeline."""
    theirs("sd", "text-to-image").save_pretrained(tmp_path / "saved")
    with uncaptured(tmp_path / "saved", tmp_path / "b", steps=[STEPS]) as pipe:
        manifest = pipe.manifest
    assert manifest.source.pipeline_class == "StableDiffusionControlNetPipeline"
    assert "control_image" in manifest.component("denoiser").inputs
    with quiet_loading():
        theirs("sd-two", "text-to-image").save_pretrained(tmp_path / "two")
    with pytest.raises(UnsupportedPipeline, match="give each with --controlnet"):
        export(tmp_path / "two", tmp_path / "c")


def test_what_went_in(made: Any) -> None:
    manifest = made("sd-two").manifest
    assert [each.kind for each in manifest.source.ingredients] == ["controlnet"] * 2
    images = [each for each in manifest.programs[0].arguments if isinstance(each, ImageArgument)]
    assert [(each.name, each.count) for each in images] == [("control_image", 2)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "gives no image; this bundle takes 'control_image'"),
        ({"control_image": outline(48, 32)}, "expected a list of 2"),
        ({"control_image": [outline(48, 32)] * 3}, "expected a list of 2"),
        ({"control_image": [outline(48, 32), "x.png"]}, "expected a Pillow image"),
        (
            {
                "control_image": [outline(48, 32)] * 2,
                "controlnet_conditioning_scale": [1.0, 1.0, 1.0],
            },
            "takes 2 numbers",
        ),
    ],
)
def test_bad_input(call: dict[str, Any], says: str, made: Any) -> None:
    with pytest.raises(InputError, match=says):
        made("sd-two").stream("red", **call)


def test_bad_sources(
    pipeline_folder: Callable[[str], Path],
    nets: Callable[[str], list[Path]],
    sd_bundle: Path,
    tmp_path: Path,
) -> None:
    for pipeline, net, error, says in (
        ("sdxl", nets("sd")[0], SourceError, "is for another family"),
        ("unconditional", nets("sd")[0], SourceError, "is for another family"),
        ("sd", pipeline_folder("sd") / "vae", SourceError, "it is a AutoencoderKL"),
        ("sd", tmp_path, SourceError, "is no ControlNet"),
        ("sd", tmp_path / "none", InputError, "no such ControlNet"),
    ):
        with pytest.raises(error, match=says):
            export(pipeline_folder(pipeline), tmp_path / "b", controlnet=net)
    assert not (tmp_path / "b").exists()
    with latentc.load(sd_bundle) as pipe, pytest.raises(InputError, match="--controlnet"):
        pipe("red", control_image=outline(48, 32))


def test_the_command(controlled: Callable[[str], Path], tmp_path: Path) -> None:
    outline(48, 32).save(tmp_path / "lines.png")
    start = ["generate", str(controlled("sd")), "red", "--steps", str(STEPS)]
    given = [*start, "--control-image", str(tmp_path / "lines.png"), "-o", str(tmp_path / "o.png")]
    assert command([*given, "--arg", "controlnet_conditioning_scale=0.8"]) == 0
    with Image.open(tmp_path / "o.png") as image_made:
        assert image_made.size == (48, 32)
    (tmp_path / "o.png").unlink()
    assert command([*start, "-o", str(tmp_path / "o.png")]) == 2
    assert not (tmp_path / "o.png").exists()
