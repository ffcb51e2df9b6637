"""Stable Diffusion 3 and FLUX.1 do with pictures and texts what diffusers' pipelines of these
models do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import latentc
from exporter.compile import export
from exporter.source import quiet_loading
from runtimes.manifest import Manifest
from runtimes.verify import relative_l2
from tests.conftest import KEPT, one_at_a_time
from tests.pictures import BACKENDS, assert_same, picture
from tests.transformers import STEPS, exported

SEED = 7
PIPELINES = {"sd3": "sd3-shifted", "flux-dev": "flux-dev"}
CLASSES = {
    ("sd3", "image-to-image"): "StableDiffusion3Img2ImgPipeline",
    ("flux-dev", "image-to-image"): "FluxImg2ImgPipeline",
}
SIZES = {"sd3": {"height": 24, "width": 40}, "flux-dev": {"height": 48, "width": 80}}
CALL: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def ours(
    pipeline_folder: Callable[[str], Path],
) -> Iterator[Callable[..., latentc.Pipeline]]:
    """A function: name in `BUNDLES` and backend → the loaded bundle."""
    loaded: dict[tuple[str, str], latentc.Pipeline] = {}

    def get(name: str, backend: str = "onnxruntime") -> latentc.Pipeline:
        if (name, backend) not in loaded:
            bundle = exported(name, pipeline_folder)
            loaded[name, backend] = latentc.load(bundle, backend=backend)
        return loaded[name, backend]

    yield get
    for pipe in loaded.values():
        pipe.close()


@pytest.fixture(scope="module")
def theirs(pipeline_folder: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """A function: name in `BUNDLES` and task → the diffusers pipeline."""
    loaded: dict[tuple[str, str], Any] = {}

    def get(name: str, task: str) -> Any:
        if (name, task) not in loaded:
            folder = pipeline_folder(PIPELINES[name])
            with quiet_loading():
                pipe = getattr(diffusers, CLASSES[name, task]).from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            loaded[name, task] = pipe
        return loaded[name, task]

    return get


def reference(pipe: Any, seed: int | list[int] = SEED, **call: Any) -> tuple[Any, Any]:
    """Final latents [batch, channels, height, width], and pictures from 0 to 1."""
    each = [torch.Generator().manual_seed(one) for one in np.atleast_1d(seed).tolist()]
    with torch.no_grad():
        latents = pipe(
            **call, generator=each if isinstance(seed, list) else each[0], output_type="latent"
        ).images
        if hasattr(pipe, "_unpack_latents"):
            size = call["height"], call["width"]
            latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
        config = pipe.vae.config
        image = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor)[0]
        images = pipe.image_processor.postprocess(image, output_type="np")
    return latents.numpy(), images


def given(name: str, **more: Any) -> dict[str, Any]:
    size = SIZES[name]
    image = picture(size["width"], size["height"])
    return {**CALL, **size, "image": image, "strength": 0.6, "guidance_scale": 3.0, **more}


# From a picture


@pytest.mark.support(family="name", task="image-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PIPELINES)
def test_image_to_image(name: str, backend: str, ours: Any, theirs: Any) -> None:
    """0.6 of four steps are three of them, where the UNets' pipelines run two."""
    call = given(name)
    latents, images = reference(theirs(name, "image-to-image"), **call)
    result = ours(name, backend)(**call, seed=SEED, output_type="np")
    assert_same(result, latents, images)
    assert len(result.timings.steps) == 3


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_strengths_and_sizes(name: str, strength: float, ours: Any, theirs: Any) -> None:
    """At another size, where the noise is another; however little is asked for, a step is run."""
    size = {"height": 64, "width": 48}
    call = given(name, strength=strength, image=picture(30, 50), **size)
    latents, images = reference(theirs(name, "image-to-image"), **call)
    assert_same(ours(name)(**call, seed=SEED, output_type="np"), latents, images)


@pytest.mark.parametrize("several", [1, 2])
@pytest.mark.parametrize("seed", [5, [5, 9]])
@pytest.mark.parametrize("name", PIPELINES)
def test_batches(name: str, seed: int | list[int], several: int, ours: Any, theirs: Any) -> None:
    """Two pictures of one, and one of each; with one generator for both, and one for each."""
    if (name, several) == ("sd3", 1) and isinstance(seed, list):
        pytest.skip("diffusers fails there: it encodes no picture for the second generator")
    size = SIZES[name]
    two = [picture(size["width"], size["height"], seed=each) for each in (0, 40)]
    call = given(name, image=two[:several])
    call |= {"prompt": ["a red circle", "blue"]} if several == 2 else {"num_images_per_prompt": 2}
    latents, images = reference(theirs(name, "image-to-image"), seed, **call)
    assert_same(ours(name)(**call, seed=seed, output_type="np"), latents, images)


def test_defaults_of_calls_with_a_picture(ours: Any, theirs: Any) -> None:
    """FLUX.1's guidance is another there than for texts alone; the strength is 0.6."""
    pipe = ours("flux-dev")
    call = given("flux-dev", strength=None, guidance_scale=None)
    latents, _ = reference(
        theirs("flux-dev", "image-to-image"), **{n: v for n, v in call.items() if v is not None}
    )
    found = pipe(**call, seed=SEED, output_type="latent")
    assert relative_l2(found.latents, latents) <= 1e-4
    assert found.settings["strength"] == 0.6
    plain = {**CALL, **SIZES["flux-dev"], "seed": SEED, "output_type": "latent"}
    usual = pipe(**plain).latents
    assert np.array_equal(usual, pipe(**plain, guidance_scale=3.5).latents)
    assert relative_l2(pipe(**plain, guidance_scale=7.0).latents, usual) > 1e-4


def test_a_picture_has_the_models_size(ours: Any) -> None:
    """As in diffusers, where these pipelines do not take the picture's own."""
    run = ours("sd3").stream(**CALL, image=picture(24, 40), seed=1)
    assert run.finish().latents.shape == (1, 16, 16, 16)


def test_latents_in_the_place_of_a_picture(ours: Any, theirs: Any) -> None:
    start = np.random.default_rng(0).standard_normal((1, 16, 12, 20)).astype(np.float32)
    call = given("sd3", image=start)
    expected, _ = reference(
        theirs("sd3", "image-to-image"), **{**call, "image": torch.from_numpy(start)}
    )
    found = ours("sd3")(**call, seed=SEED, output_type="latent")
    assert relative_l2(found.latents, expected) <= 1e-4


def renamed(source: Path, target: Path, class_name: str) -> Path:
    """The pipeline's folder as diffusers saves it from another class of the same parts."""
    shutil.copytree(source, target)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name}))
    return target


@pytest.mark.parametrize(("name", "target"), [("sd3", "onnx"), ("flux-dev", "openvino")])
def test_exports_of_the_class_itself(
    name: str,
    target: str,
    pipeline_folder: Callable[[str], Path],
    theirs: Any,
    tmp_path: Path,
) -> None:
    class_name = CLASSES[name, "image-to-image"]
    folder = renamed(pipeline_folder(PIPELINES[name]), tmp_path / "pipeline", class_name)
    bundle = KEPT / "bundles" / f"transformers-{class_name}"
    with one_at_a_time(f"bundle-transformers-{class_name}"):
        quick = name != "sd3"  # one of them is verified too
        export(folder, bundle, targets=(target,), steps=(STEPS,), overwrite=True, verify=not quick)
    manifest = Manifest.load(bundle)
    assert [task.name for task in manifest.tasks] == ["text-to-image", "image-to-image"]
    call = given(name)
    latents, images = reference(theirs(name, "image-to-image"), **call)
    with latentc.load(bundle) as pipe:
        assert_same(pipe(**call, seed=SEED, output_type="np"), latents, images)
