"""The safety checker of Stable Diffusion's pipelines: the same images are made black as in
diffusers, on every engine and in every task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.components import safety_checker
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source.resolving import resolve
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, VerificationError
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.programs.listing import listing
from tests.conftest import Run
from tests.docs import independent_loader as reader
from tests.support import tiny
from tests.support.sample_images import mask, sample_image
from tests.support.uncaptured import uncaptured

FLAGS = "nsfw_content_detected"
SEEDS = list(range(8))
CALL: dict[str, Any] = {"prompt": "red", "num_images_per_prompt": len(SEEDS)}
CALL |= {"height": 48, "width": 32, "num_inference_steps": 3}
CLASSES = {
    "image-to-image": StableDiffusionImg2ImgPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
}


@pytest.fixture(scope="module")
def source(pipeline_folder: Callable[[str], Path]) -> Path:
    return pipeline_folder("sd-checked")


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked") / "bundle"
    options: dict[str, Any] = {"schedulers": [], "steps": [2, 3]}
    return export(source, folder, targets=["onnx", "openvino"], **options).bundle


@pytest.fixture(scope="module")
def with_images(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """PyTorch's own modules, for calls with images."""
    folder = tmp_path_factory.mktemp("uncaptured") / "bundle"
    return uncaptured(source, folder, tasks=[*CLASSES])


@pytest.fixture(scope="module")
def theirs(source: Path) -> Any:
    with quiet_loading():
        pipe = StableDiffusionPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["onnxruntime", "openvino"])
def ours(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with latentc.load(bundle, backend=request.param) as pipe:
        yield pipe


def expected_of(pipe: Any, **call: Any) -> Any:
    """Return what diffusers makes, with a generator for each image."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with quiet_loading():
        return pipe(**call, generator=generators)


def check(found: Any, expected: Any) -> None:
    """Check that images and flags are the same, and that some flags are set and some are not."""
    assert any(expected.nsfw_content_detected)
    assert not all(expected.nsfw_content_detected)
    assert found.values[FLAGS].tolist() == expected.nsfw_content_detected
    black = [not image.any() for image in found.images]
    assert black == expected.nsfw_content_detected
    assert np.abs(found.images - expected.images).max() < 2 / 255


@pytest.mark.support(family="sd-checked", task="safety checker", target="onnxruntime")
@pytest.mark.support(family="sd-checked", task="safety checker", target="openvino")
def test_the_same_images_are_black(ours: Pipeline, theirs: Any) -> None:
    expected = expected_of(theirs, **CALL, output_type="np")
    check(ours(**CALL, seed=SEEDS, output_type="np"), expected)


def test_from_an_image(with_images: Pipeline, theirs: Any) -> None:
    pipe = CLASSES["image-to-image"].from_pipe(theirs)
    pipe.set_progress_bar_config(disable=True)
    call = {name: value for name, value in CALL.items() if name not in ("height", "width")}
    call |= {"image": sample_image(48, 32), "strength": 0.9, "output_type": "np"}
    check(with_images(**call, seed=SEEDS), expected_of(pipe, **call))


def test_an_overlay_comes_after(with_images: Pipeline, theirs: Any) -> None:
    """The checker sees what was made; around it the image is the caller's own."""
    pipe = CLASSES["inpainting"].from_pipe(theirs)
    pipe.set_progress_bar_config(disable=True)
    call = {
        **CALL,
        "image": sample_image(64, 64),
        "mask_image": mask(64, 64),
        "padding_mask_crop": 4,
    }
    call |= {"height": 32, "width": 32, "strength": 1.0}
    expected, found = expected_of(pipe, **call), with_images(**call, seed=SEEDS)
    flags = expected.nsfw_content_detected
    assert any(flags)
    assert not all(flags)
    assert found.values[FLAGS].tolist() == flags
    for image, other in zip(found.images, expected.images, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 2
        assert np.asarray(image).any()


def test_of_a_controlnet(source: Path, theirs: Any, tmp_path: Path) -> None:
    net = tiny.controlnet(theirs.unet, seed=4)
    net.save_pretrained(tmp_path / "net")
    ours = uncaptured(source, tmp_path / "bundle", asked={"controlnet": [str(tmp_path / "net")]})
    pipe = StableDiffusionControlNetPipeline(**theirs.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    control, call = sample_image(32, 48), {**CALL, "output_type": "np"}
    expected = expected_of(pipe, **call, image=control)
    check(ours(**call, control_image=control, seed=SEEDS), expected)


def test_of_latent_consistency_models(theirs: Any, tmp_path: Path) -> None:
    unchanged = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    torch.manual_seed(6)
    LatentConsistencyModelPipeline(
        **{name: theirs.components[name] for name in unchanged},
        unet=tiny.conditional_unet(time_cond_proj_dim=25),
        scheduler=LCMScheduler(**tiny.BETAS),
    ).save_pretrained(tmp_path / "pipeline")
    with quiet_loading():
        pipe = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "output_type": "np"}
    ours = uncaptured(tmp_path / "pipeline", tmp_path / "bundle")
    check(ours(**call, seed=SEEDS), expected_of(pipe, **call))


def test_flags_may_be_asked_for_alone(bundle: Path, theirs: Any) -> None:
    expected = expected_of(theirs, **CALL, output_type="np").nsfw_content_detected
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        assert pipe.compute(FLAGS, **CALL, seed=SEEDS).tolist() == expected
        latents = pipe(**CALL, seed=SEEDS, output_type="latent")
        assert latents.values == {}
        decoded = pipe.decode(latents.latents, "np")
        assert [not image.any() for image in decoded] == expected
        with pytest.raises(InputError, match=f"unknown argument '{FLAGS}'"):
            pipe("red", **{FLAGS: np.zeros(1, np.float32)})


def test_the_other_reader(bundle: Path) -> None:
    call = {**CALL, "prompt": ["red"]}
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        found = pipe(**CALL, seed=SEEDS, output_type="np")
    _, images, arrays = reader.Bundle(bundle).results(**call, seed=SEEDS)
    assert arrays.keys() == {FLAGS}
    assert np.array_equal(arrays[FLAGS], found.values[FLAGS])
    assert np.abs(images - found.images * 255).max() < 1


def test_a_bundle_says_so(bundle: Path, tmp_path: Path, run: Run) -> None:
    manifest = Manifest.load(bundle)
    assert not manifest.left_out
    assert [each.name for each in manifest.of_role("postprocessor")] == ["safety_checker"]
    for program in manifest.programs:
        text = listing(program)
        assert "run safety_checker(image: _image).(checked, flag)\n  emit images" in text
        assert text.endswith(f"\n  emit arrays {FLAGS}\n")
    path = tmp_path / "image-{index}.png"
    size = ("--height", 48, "--width", 32, "--steps", 3)
    seeds = [part for seed in (0, 2) for part in ("--seed", seed)]
    call = ("generate", bundle, "-p", "red", "-p", "red", "-o", path, *size, *seeds)
    code, out, err = run(*call)
    assert code == 0, err
    said = [line for line in out.splitlines() if ".png" in line]
    assert [f"{FLAGS} (made black)" in line for line in said] == [True, False]
    code, out, _ = run(*call, "--json")
    assert json.loads(out)["values"] == {FLAGS: [1.0, 0.0]}


def test_without_it(source: Path, theirs: Any, tmp_path: Path) -> None:
    """Neither its weights nor those numbers of images that it needs are looked at."""
    folder = tmp_path / "pipeline"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("safety_checker"))
    assert resolve(source).fingerprint != resolve(folder, without=["safety_checker"]).fingerprint
    pipe = uncaptured(folder, tmp_path / "bundle", without=["safety_checker"])
    assert {each.name: each.chosen for each in pipe.manifest.left_out} == {"safety_checker": True}
    assert "safety_checker" not in {each.name for each in pipe.manifest.components}
    found = pipe(**CALL, seed=SEEDS, output_type="np")
    assert found.left_out == ("safety_checker",)
    assert found.values == {}
    assert all(image.any() for image in found.images)


def test_an_export_compares_the_images(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose checker finds nothing is no bundle."""
    monkeypatch.setattr(safety_checker, "_above", torch.zeros_like)
    with pytest.raises(VerificationError, match="does not do what StableDiffusionPipeline does"):
        export(source, tmp_path / "bundle", schedulers=[], steps=[2])
    assert not (tmp_path / "bundle").exists()
