"""Sizes that cannot be halved evenly in each block of the UNet: the same as of diffusers.

The tiny pipelines have 2 pixels to a latent and halve once, so sides that are no multiples of 4
pixels, of pictures that diffusers' pipelines take as they are, are what 8 and 600 are to Stable
Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from exporter.capture import capture, example_inputs, symbol_values
from exporter.families import family_of
from exporter.source import load, resolve
from runtimes.verify import relative_l2
from tests.pictures import BACKENDS, CALL, assert_same, picture

# Width and height in pixels; latents of 35 by 22 for the first.
SIZES = (
    *((70, 45), (18, 14), (34, 50), (22, 32), (32, 22), (6, 10), (26, 26), (46, 38), (54, 30)),
    (14, 62),
)
# By pipeline, whether diffusers has another class for this task, and sizes for each engine: all of
# them for one, three for the other.
PICTURED = {"sd": True, "sdxl": True, "refiner": False, "pix2pix": False, "depth": False}


@pytest.mark.fault("3.8", "every size that diffusers takes: tasks with an image")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PICTURED)
def test_images_of_any_size(
    name: str, backend: str, ours: Any, original: Callable[..., Any]
) -> None:
    pipe = original(name, AutoPipelineForImage2Image if PICTURED[name] else None)
    for width, height in SIZES if backend == "onnxruntime" else SIZES[:3]:
        call = {"image": picture(width, height), "num_inference_steps": 4}
        call |= {} if name == "pix2pix" else {"strength": 0.5}
        made = []
        for kind in ("latent", "np"):
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                found = pipe(generator=generator, output_type=kind, **{**CALL, **call}).images
            made.append(found.numpy() if kind == "latent" else found)
        result = ours(name, backend)(**CALL, **call, seed=7, output_type="np")
        assert result.images.shape[1:3] == (height // 2 * 2, width // 2 * 2)
        assert_same(result, *made)


@pytest.mark.fault("3.8", "every size that diffusers takes: text to image")
def test_latents_of_any_size(ours: Any, original: Callable[..., Any]) -> None:
    """Of a text alone diffusers takes multiples of 8 pixels only, whatever the VAE; latents that
    are given have any size."""
    for width, height in SIZES:
        given = np.random.default_rng(width).standard_normal((1, 4, height // 2, width // 2))
        given = given.astype(np.float32)
        call = {**CALL, "num_inference_steps": 4}
        made = []
        for kind in ("latent", "np"):
            with torch.no_grad():
                pipe = original("sd")
                found = pipe(latents=torch.from_numpy(given), output_type=kind, **call).images
            made.append(found.numpy() if kind == "latent" else found)
        result = ours("sd", "onnxruntime")(**call, latents=given, output_type="np")
        assert_same(result, *made)


@pytest.mark.fault("3.8", "the small picture of an upscaler is shrunk as diffusers does")
def test_the_upscalers_rule(ours: Any, original: Callable[..., Any]) -> None:
    processor = original("upscaler").image_processor
    for width, height in SIZES[:4]:
        shrunk = processor.preprocess(picture(width, height)).shape[2:]
        made = ours("upscaler", "onnxruntime")(
            "red", image=picture(width, height), num_inference_steps=4, output_type="np"
        )
        assert made.images.shape[1:3] == (shrunk[0] * 2, shrunk[1] * 2)


@pytest.mark.fault("3.8", "every size that diffusers takes: each UNet's own graph")
@pytest.mark.parametrize("name", ["inpaint", "lcm"])
def test_graphs_at_any_size(name: str, pipeline_folder: Callable[..., Any]) -> None:
    """The captured program against diffusers' UNet."""
    source = resolve(pipeline_folder(name))
    pipe = load(source)
    description = family_of(source.pipeline_class).describe(pipe)
    graph = next(each for each in description.graphs if each.component.role == "denoiser")
    traced = symbol_values(description, traced=True)
    program = capture(graph, description.latents.multiple, traced).module()
    for width, height in SIZES:
        sides = {"height": height // 2, "width": width // 2}
        inputs = example_inputs(graph, traced | sides, seed=3)
        parts = [inputs[n] for n in ("sample", "mask", "masked_image_latents") if n in inputs]
        scale = inputs.get("guidance_scale")
        embedding = (
            pipe.get_guidance_scale_embedding(scale[:, 0] - 1, 25) if name == "lcm" else None
        )
        with torch.no_grad():
            (found,) = program(**inputs)
            expected = pipe.unet(
                torch.cat(parts, 1),
                inputs["timestep"],
                inputs["encoder_hidden_states"],
                timestep_cond=embedding,
            )[0]
        assert relative_l2(found.numpy(), expected.numpy()) <= 1e-5
