"""Images that are made in the size of a list whose proportions are nearest, and resized to the one
that was asked for: what PixArt's pipelines do unless a call says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma

from latentc.exporter.families.pixart import bins_of
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.sizes import fixed
from latentc.runtimes.errors import InputError
from latentc.runtimes.images.image import resized
from latentc.runtimes.pipeline.pipeline import Pipeline
from tests.conftest import KEPT, one_at_a_time
from tests.support import tiny_transformers
from tests.support.sample_images import assert_same
from tests.support.uncaptured import uncaptured

CALL = {"prompt": "a red circle", "num_inference_steps": 2}
# In the place of the lists for 512 and 1024 pixels, which take seconds: diffusers reads it, too.
SMALL = {"0.5": [32.0, 64.0], "0.8": [48.0, 64.0], "1.0": [48.0, 48.0], "2.0": [64.0, 32.0]}
# Height and width in pixels: wider, higher and longer than any of the list, nearly square.
SIZES = ((50, 75), (200, 30), (71, 45), (48, 48))


@pytest.fixture(autouse=True, scope="module")
def small_sizes() -> Iterator[None]:
    with (
        mock.patch.object(pipeline_pixart_alpha, "ASPECT_RATIO_1024_BIN", SMALL),
        mock.patch.object(pipeline_pixart_sigma, "ASPECT_RATIO_512_BIN", SMALL),
    ):
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Pipeline, Any]]:
    """A function: a class and the latents of its default side → a tiny pipeline of it, by way of a
    bundle and in diffusers."""
    made: dict[Any, tuple[Pipeline, Any]] = {}

    def get(cls: Any, side: int) -> tuple[Pipeline, Any]:
        if (cls, side) not in made:
            folder = KEPT / "pipelines" / f"{cls.__name__}-{side}"
            with one_at_a_time(f"pipeline-{folder.name}"):
                torch.manual_seed(5)
                tiny_transformers.pixart(folder, cls, side, 4)
            with quiet_loading():
                theirs = DiffusionPipeline.from_pretrained(folder)
            theirs.set_progress_bar_config(disable=True)
            bundle = tmp_path_factory.mktemp("binned") / "bundle"
            made[cls, side] = uncaptured(folder, bundle, steps=(2,)), theirs
        return made[cls, side]

    return get


def reference(pipe: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents and images of diffusers' call."""
    latents: list[torch.Tensor] = []
    with torch.no_grad():
        images = pipe(
            **CALL,
            **call,
            clean_caption=False,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
            callback=lambda index, timestep, sample: latents.append(sample),
        ).images
    return latents[-1].numpy(), images


@pytest.mark.fault("3.8", "PixArt: sizes that it makes in another one, and resizes")
@pytest.mark.parametrize(
    ("side", "height", "width"), [(32, 150, 225), *((64, *size) for size in SIZES)]
)
def test_binned_sizes(side: int, height: int, width: int, pair: Any) -> None:
    ours, theirs = pair(PixArtSigmaPipeline, side)
    size = {"height": height, "width": width}
    result = ours(**CALL, **size, seed=7, output_type="np")
    latents, images = reference(theirs, **size)
    assert images.shape[1:3] == (height, width)
    assert_same(result, latents, images)
    again = {n: result.settings[n] for n in ("prompt", "num_inference_steps", "seed", *size)}
    assert again == {**CALL, "seed": 7, **size}


@pytest.mark.fault("3.8", "PixArt: sizes that it makes in another one, and resizes")
def test_the_default_size_and_the_size_itself(pair: Any) -> None:
    ours, theirs = pair(PixArtSigmaPipeline, 64)
    size = {"height": 512, "width": 512}
    assert ours.stream(**CALL).request.sizes == ours.stream(**CALL, **size).request.sizes
    assert ours.stream(**CALL).request.sizes.image == (512, 512)
    call = {"height": 80, "width": 48, "use_resolution_binning": False}
    result = ours(**CALL, **call, seed=7, output_type="np")
    assert_same(result, *reference(theirs, **call))
    assert {n: result.settings[n] for n in call} == call
    assert np.asarray(ours(**CALL, height=100, width=60, seed=7).images[0]).shape == (100, 60, 3)
    run = ours.stream(**CALL, height=100, width=60, seed=7)
    assert next(run).preview()[0].size == (60, 100)
    assert run.request.image_sizes() == {(60, 100)}


@pytest.mark.fault("3.8", "PixArt: the size that a model is told is the one of the list")
def test_what_the_model_is_told(pair: Any) -> None:
    ours, theirs = pair(PixArtAlphaPipeline, 128)
    call = {"height": 53, "width": 100, "guidance_scale": 3.0}
    result = ours(**CALL, **call, seed=7, output_type="np")
    assert_same(result, *reference(theirs, **call))
    assert result.latents.shape[2:] == (4, 8)


@pytest.mark.fault("3.8", "PixArt: sizes that it makes in another one, and resizes")
@pytest.mark.parametrize("side", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("cls", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_lists_of_the_classes(cls: type, side: int) -> None:
    """None where the class's call says "Invalid sample size"."""
    module = {
        PixArtAlphaPipeline: pipeline_pixart_alpha,
        PixArtSigmaPipeline: pipeline_pixart_sigma,
    }
    none = side == 16 or (side == 256 and cls is PixArtAlphaPipeline)
    lists = {} if none else vars(module[cls])[f"ASPECT_RATIO_{8 * side}_BIN"]
    found = bins_of(cls, side)
    assert found == tuple((float(ratio), *sizes) for ratio, sizes in lists.items())


@pytest.mark.fault("3.8", "PixArt: calls that cannot be made in a size of the list are refused")
def test_what_is_refused(pair: Any) -> None:
    ours, _ = pair(PixArtSigmaPipeline, 64)
    without, _ = pair(PixArtSigmaPipeline, 16)
    latents = np.zeros((1, 4, 6, 10), np.float32)
    cases: tuple[tuple[Pipeline, Mapping[str, Any], str], ...] = (
        (ours, {"use_resolution_binning": "no"}, "must be True or False, not 'no'"),
        (ours, {"height": 0}, "height 0: expected 1 to"),
        (
            ours,
            {"latents": latents},
            "does not fit 'latents', which are for 80; .*=False",
        ),
        (ours, {"height": 71, "width": 45, "use_resolution_binning": False}, "not a multiple"),
        (without, {"use_resolution_binning": True}, "no list of sizes for a model of 128 by 128"),
    )
    for pipe, call, says in cases:
        with pytest.raises(InputError, match=says):
            pipe.stream(**CALL, **call)
    assert without.stream(**CALL).request.sizes.image == (128, 128)
    given = {"latents": latents, "use_resolution_binning": False}
    assert ours.stream(**CALL, **given).request.sizes.image == (48, 80)


@pytest.mark.fault("3.8", "PixArt: sizes that it makes in another one, and resizes")
def test_graphs_of_one_size(pair: Any) -> None:
    manifest: Manifest = pair(PixArtSigmaPipeline, 64)[0].manifest
    for static, sides in (
        ({"height": 50, "width": 75}, (6, 8)),
        ({"height": 80, "width": 48, "use_resolution_binning": False}, (10, 6)),
    ):
        found = fixed(manifest, static)["denoiser"]
        assert (found["height"], found["width"]) == sides


@pytest.mark.fault("3.8", "PixArt: resized and cropped as diffusers does")
@pytest.mark.parametrize("size", [(20, 31), (64, 96), (7, 90), (90, 7), (32, 48), (33, 48)])
def test_resizing(size: tuple[int, int]) -> None:
    images = np.random.default_rng(2).normal(size=(2, 3, 32, 48)).astype(np.float32)
    expected = PixArtImageProcessor.resize_and_crop_tensor(torch.from_numpy(images), *size[::-1])
    found = resized(images, *size)
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() <= 2e-5


def test_sides_that_diffusers_loses() -> None:
    """diffusers makes 640 by 1600 pixels a strip one pixel wide where 78 by 207 are asked for."""
    images = np.linspace(0, 1, 640 * 1600, dtype=np.float32).reshape(1, 1, 640, 1600)
    theirs = PixArtImageProcessor.resize_and_crop_tensor(torch.from_numpy(images), 207, 78)
    assert theirs.shape[3] == 1
    found = resized(images, 78, 207)
    assert found.shape[2:] == (78, 207)
    assert np.ptp(found[0, 0, 40]) < 0.01 < np.ptp(found)
