"""Depth-to-image: the same as diffusers' pipeline, whose depth estimator is a component here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentc.cli import run as command
from latentc.exporter.components.tasks.depth import _size
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, UnsupportedPipeline
from tests.support.loaded import EAGER
from tests.support.sample_images import BACKENDS, CALL, STEPS, assert_same, sample_image


def check(ours: Any, original: Any, backend: str = EAGER, **call: Any) -> None:
    given = {**CALL, "image": sample_image(48, 32), "num_inference_steps": STEPS, **call}
    seeds = given.pop("seed", 7)
    expected = []
    for kind in ("latent", "np"):
        several = isinstance(seeds, list)
        made = [torch.Generator().manual_seed(each) for each in (seeds if several else [seeds])]
        with torch.no_grad():
            generator = made if several else made[0]
            found = original("depth")(generator=generator, output_type=kind, **given).images
        expected.append(found.numpy() if kind == "latent" else found)
    result = ours("depth", backend)(**given, seed=seeds, output_type="np")
    assert_same(result, *expected)


@pytest.mark.support(family="depth", task="depth-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"strength": 1.0, "num_inference_steps": 4},
        {"image": sample_image(68, 48), "strength": 0.5, "num_inference_steps": 4},
    ],
)
def test_from_an_image(
    call: dict[str, Any], backend: str, ours: Any, original: Callable[..., Any]
) -> None:
    check(ours, original, backend, **call)


def test_several(ours: Any, original: Callable[..., Any]) -> None:
    call = {"num_inference_steps": 4, "negative_prompt": "blue"}
    check(ours, original, num_images_per_prompt=2, **call)
    check(ours, original, num_images_per_prompt=2, seed=[3, 4], guidance_scale=1.0, **call)
    two = [sample_image(48, 32), sample_image(48, 32, 60)]
    call = {**call, "prompt": ["red", "blue"], "negative_prompt": ["", "green"]}
    check(ours, original, image=two, **call)


def test_the_depth_counts(ours: Any) -> None:
    """An image of another depth is not made into the same from the same start."""
    pipe = ours("depth")
    call = {**CALL, "num_inference_steps": 4, "strength": 1.0, "seed": 3, "output_type": "latent"}
    one, other = (pipe(**call, image=sample_image(48, 32, seed)).latents for seed in (0, 60))
    assert np.abs(one - other).max() > 1e-2


def test_what_the_bundle_says(bundles: Callable[[str], Path]) -> None:
    manifest = Manifest.load(bundles("depth"))
    assert [program.name for program in manifest.programs] == ["depth-to-image"]
    assert {each.name for each in manifest.of_role("image_encoder")} == {
        "vae_encoder",
        "depth_estimator",
    }
    assert manifest.component("denoiser").inputs["depth"].shape[1] == 1
    assert all(build.verification and build.verification.passed for build in manifest.builds)


def test_bad_input(ours: Any) -> None:
    pipe = ours("depth")
    with pytest.raises(InputError, match="gives no image; this bundle takes 'image'"):
        pipe.stream("red")
    with pytest.raises(InputError, match="'strength' must be above 0"):
        pipe.stream("red", image=sample_image(48, 32), strength=0)
    with pytest.raises(InputError, match="'image': expected a Pillow image"):
        pipe.stream("red", image=np.zeros((1, 4, 16, 24), np.float32))  # no depth in latents


def test_processors(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Published pipelines name the processor as transformers did once; others are refused."""
    folder = tmp_path / "depth"
    shutil.copytree(pipeline_folder("depth"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "DPTFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    processor = load(resolve(folder)).feature_extractor
    assert _size(processor) == (32, 32)
    for name, value in (("keep_aspect_ratio", True), ("do_normalize", False), ("resample", 0)):
        usual = getattr(processor, name)
        setattr(processor, name, value)
        with pytest.raises(UnsupportedPipeline, match=f"processor with {name} {value}"):
            _size(processor)
        setattr(processor, name, usual)


def test_the_command(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    sample_image(48, 32).save(tmp_path / "in.png")
    start = ["generate", str(bundles("depth")), "red", "--steps", "4"]
    given = [*start, "--image", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]
    assert command([*given, "--strength", "0.6"]) == 0
    with Image.open(tmp_path / "out.png") as made:
        assert made.size == (48, 32)
