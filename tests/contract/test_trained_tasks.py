"""Models that were trained to follow instructions on an image, or to enlarge it: the same as
diffusers' pipelines for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentc.exporter.compiler.export import export
from latentc.runtimes.errors import InputError
from tests.support.combinations import kept
from tests.support.loaded import EAGER
from tests.support.sample_images import BACKENDS, STEPS, assert_same, sample_image

CALL = {"prompt": "a red circle", "negative_prompt": "blue", "guidance_scale": 4.0}
SIZES = {"pix2pix": (48, 32), "pix2pix-xl": (48, 32), "upscaler": (32, 16)}  # width, height
CASES = [(name, backend) for name in SIZES for backend in (EAGER, *BACKENDS)]
# What every run tries: upscalers are of a kind of graph of their own.
USUAL = (("pix2pix", EAGER), ("upscaler", "onnxruntime"), ("upscaler", "openvino"))


def reference(
    original: Callable[..., Any], name: str, **call: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Final latents, and images from 0 to 1."""
    pipe, seed, made = original(name), call.pop("seed"), []
    for kind in ("latent", "np"):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            found = pipe(generator=generator, output_type=kind, **{**CALL, **call}).images
        made.append(found.numpy() if kind == "latent" else found)
    return made[0], made[1]


def check(
    ours: Any, original: Callable[..., Any], name: str, backend: str = EAGER, **call: Any
) -> None:
    call = {"image": sample_image(*SIZES[name]), "num_inference_steps": STEPS, "seed": 7, **call}
    if name == "pix2pix-xl":  # the one that would take its own size
        call |= {"height": SIZES[name][1], "width": SIZES[name][0]}
    latents, images = reference(original, name, **call)
    assert_same(ours(name, backend)(**{**CALL, **call}, output_type="np"), latents, images)


@pytest.mark.support(family="name", task="name", target="backend")
@pytest.mark.parametrize(("name", "backend"), kept(CASES, *USUAL))
def test_every_model(name: str, backend: str, ours: Any, original: Callable[..., Any]) -> None:
    check(ours, original, name, backend)


@pytest.mark.parametrize(
    "scales",
    [
        {"image_guidance_scale": 2.5},
        {"image_guidance_scale": 1.0},
        {"image_guidance_scale": 0.5},  # guidance is off
        {"guidance_scale": 1.0},
    ],
)
def test_two_guidance_scales(
    scales: dict[str, float], ours: Any, original: Callable[..., Any]
) -> None:
    check(ours, original, "pix2pix", num_inference_steps=4, **scales)


@pytest.mark.parametrize("level", [0, 35, 50])
def test_noise_levels(level: int, ours: Any, original: Callable[..., Any]) -> None:
    check(ours, original, "upscaler", num_inference_steps=4, noise_level=level)


@pytest.mark.parametrize("name", ["pix2pix", "upscaler"])
def test_two_images(name: str, ours: Any, original: Callable[..., Any]) -> None:
    check(ours, original, name, num_inference_steps=4, num_images_per_prompt=2)
    two = [sample_image(*SIZES[name]), sample_image(*SIZES[name], seed=40)]
    call = {"prompt": ["a red circle", "blue"], "negative_prompt": ["", "red"]}
    check(ours, original, name, num_inference_steps=4, image=two, **call)


def test_sizes(ours: Any) -> None:
    pipe = ours("upscaler")
    made = pipe("red", image=sample_image(32, 16), num_inference_steps=4).images[0]
    assert made.size == (64, 32)  # this VAE has 2 pixels to a latent
    smaller = pipe("red", image=sample_image(35, 17), num_inference_steps=4).images[0]
    assert smaller.size == (68, 32)


def test_what_the_bundles_say(ours: Any) -> None:
    edited = ours("pix2pix").manifest
    assert [program.name for program in edited.programs] == ["instruct-pix2pix"]
    assert [branch.name for branch in edited.guidance.branches] == ["text", "image", "neither"]
    enlarged = ours("upscaler").manifest
    assert [program.name for program in enlarged.programs] == ["upscaling"]


def test_bad_input(ours: Any, pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives no image; this bundle takes 'image'"):
        ours("pix2pix").stream("red")
    for level in (-1, 51):
        with pytest.raises(InputError, match="'noise_level' must be from 0 to 50"):
            ours("upscaler").stream("red", image=sample_image(32, 16), noise_level=level)
    with pytest.raises(InputError, match="no use for strength"):
        ours("upscaler").stream("red", image=sample_image(32, 16), strength=0.5)
    with pytest.raises(InputError, match="has no task inpainting; it has: upscaling"):
        export(pipeline_folder("upscaler"), tmp_path / "b", tasks=["inpainting"])
