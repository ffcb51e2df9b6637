"""Bundles of SDXL put the invisible watermark into their images, as diffusers does: into images of
any size that is large enough, and into those of one size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.components.watermark import Marker
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.verification import programs as program_check
from latentc.exporter.verification import reference
from latentc.runtimes.bundle.manifest import Manifest
from tests.docs import independent_loader as reader
from tests.support import tiny

CALL: dict[str, Any] = {"prompt": "red", "num_inference_steps": 2}
LARGE = {"height": 256, "width": 264}
SMALL = {"height": 96, "width": 64}


@pytest.fixture(scope="module")
def source(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pipeline whose images are large, and its latents small."""
    folder = tmp_path_factory.mktemp("large") / "pipeline"
    torch.manual_seed(11)
    with quiet_loading():
        pipe = StableDiffusionXLPipeline.from_pretrained(pipeline_folder("sdxl"))
        pipe.register_modules(vae=tiny.large_autoencoder())
        pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(source: Path, sdxl_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is verified as exports of one large size are: with the watermark in the image."""
    folder = tmp_path_factory.mktemp("watermark") / "bundle"
    options: dict[str, Any] = {"schedulers": [], "steps": [2], "watermark": True}
    options["share_with"] = sdxl_bundle
    size = (LARGE["height"], LARGE["width"])
    with pytest.MonkeyPatch.context() as patch:
        for module in (reference, program_check):
            patch.setattr(module, "loop_size", lambda _: size)
        return export(source, folder, targets=["onnx", "openvino"], **options).bundle


@pytest.fixture(scope="module")
def theirs(source: Path) -> Any:
    with quiet_loading():
        pipe = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.watermark = Marker()  # which test_watermark.py holds against the package itself
    return pipe


def expected_of(pipe: Any, **call: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    images: np.ndarray = pipe(**call, generator=generator, output_type="np").images
    return images


@pytest.mark.support(family="sdxl", task="watermark", target="onnxruntime")
@pytest.mark.support(family="sdxl", task="watermark", target="openvino")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_same_images(backend: str, bundle: Path, theirs: Any) -> None:
    """But where a coefficient is a hair off the end of its step, and lands in another one."""
    with latentc.load(bundle, backend=backend) as pipe:
        for size in (LARGE, SMALL):
            expected = expected_of(theirs, **CALL, **size)
            found = pipe(**CALL, **size, seed=3, output_type="np").images
            assert (np.abs(found - expected) > 2 / 255).mean() < 1e-3
            plain = pipe.decode(pipe(**CALL, **size, seed=3, output_type="latent").latents, "np")
            assert np.array_equal(plain, found)
    theirs.watermark = None
    try:
        unmarked = expected_of(theirs, **CALL, **LARGE)
    finally:
        theirs.watermark = Marker()
    assert np.abs(expected_of(theirs, **CALL, **LARGE) - unmarked).max() > 5 / 255


def test_what_is_verified(bundle: Path) -> None:
    """Images that are too small, one that is large enough, and the whole run."""
    manifest = Manifest.load(bundle)
    assert not manifest.left_out
    assert [each.name for each in manifest.of_role("postprocessor")] == ["watermark"]
    for build in manifest.builds:
        assert build.verification is not None
        checks = [each for each in build.verification.checks if each.subject == "watermark"]
        assert [each.probe for each in checks] == ["random", "random-1", "image"]
        assert build.verification.loop is not None
        assert build.verification.loop.image_psnr > 60


def test_the_other_reader(bundle: Path) -> None:
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        found = pipe(**CALL, **LARGE, seed=3, output_type="np").images
    _, images = reader.Bundle(bundle)(**{**CALL, "prompt": ["red"]}, **LARGE, seed=3)
    assert (np.abs(images / 255 - found) > 2 / 255).mean() < 1e-3
