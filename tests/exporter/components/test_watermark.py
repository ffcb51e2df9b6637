"""SDXL's invisible watermark, held against what the package invisible-watermark itself makes: as a
record of that, and directly where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from latentc.exporter.compiler.export import export
from latentc.exporter.components.watermark import BITS, MESSAGE, Watermark
from latentc.exporter.source.left_out import takes_watermark
from latentc.runtimes.errors import InputError
from tests.exporter.components.watermark_record import RECORD, SIZES, image_of, parts_of
from tests.support.uncaptured import uncaptured


def marked(image: np.ndarray) -> np.ndarray:
    """Return an image float32 [height, width, 3], numbers from 0 to 255, with the watermark."""
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    found: torch.Tensor = Watermark()(tensor)[0][0].permute(1, 2, 0) * 255
    return found.numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_in_the_record(size: tuple[int, int]) -> None:
    """The record has 8 bits: half a level is how far they are off themselves."""
    image = image_of(*size)
    with np.load(RECORD) as record:
        expected = record["{}x{}".format(*size)]
    found = parts_of(marked(image))
    assert np.abs(found - expected).max() < 0.501
    assert np.abs(parts_of(image * 255).clip(0, 255) - expected).max() > 5  # it is there


def test_as_the_package_does() -> None:
    package = pytest.importorskip("imwatermark")
    encoder = package.WatermarkEncoder()
    encoder.set_watermark("bits", [int(bit) for bit in f"{MESSAGE:0{BITS}b}"])
    noise = np.random.default_rng(0).normal(0, 0.1, (512, 768, 3))
    image = image_of(512, 768) + noise.astype(np.float32)
    expected = encoder.encode(image[:, :, ::-1] * np.float32(255), "dwtDct")[:, :, ::-1]
    assert np.abs(marked(image) - expected.clip(0, 255)).max() < 1e-3


@pytest.mark.parametrize("size", [(256, 248), (512, 128), (248, 256)], ids=str)
def test_small_images_are_left_alone(size: tuple[int, int]) -> None:
    """Images narrower than 256 pixels are left alone, as in diffusers, and where it fails."""
    image = image_of(*size)
    assert np.array_equal(marked(image), image * np.float32(255))


def test_which_pipelines_may_have_it(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    assert takes_watermark("StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(InputError, match="StableDiffusionPipeline puts no watermark into images"):
        export(pipeline_folder("sd"), tmp_path / "b", watermark=True)
    with pytest.raises(InputError, match="--watermark and --without watermark: give one of them"):
        export(pipeline_folder("sdxl"), tmp_path / "b", watermark=True, without=["watermark"])


def test_without_it_a_bundle_says_so(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = uncaptured(pipeline_folder("sdxl"), tmp_path / "bundle")
    (left,) = pipe.manifest.left_out
    assert left.name == "watermark"
    assert "--watermark" in left.why
    assert not pipe.manifest.of_role("postprocessor")
