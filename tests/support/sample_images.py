"""This module holds what tests of tasks with images share: images, masks, comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from latentc.runtimes.verification.verify import relative_l2
from tests.conftest import STEPS_WITH_IMAGES

STEPS = STEPS_WITH_IMAGES[1]
BACKENDS = ("onnxruntime", "openvino")
CALL: dict[str, Any] = {"prompt": "a red circle", "guidance_scale": 5.0}


def sample_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours and an edge."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * a + y * b + seed) / 9.0) * 100 + 127 for a, b in ((1, 2), (3, 1), (2, 3))]
    pixels = np.stack(waves, axis=-1).astype(np.uint8)
    pixels[: height // 3] = (250, 20, 30 + seed)
    return Image.fromarray(pixels)


def mask(width: int, height: int) -> Image.Image:
    """White in the middle, with an edge that is no multiple of a latent's size."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[height // 4 + 1 : height - height // 4, width // 3 : width - 3] = 255
    return Image.fromarray(pixels)


def assert_same(
    result: Any, latents: np.ndarray, images: np.ndarray, tolerance: float = 1e-4
) -> None:
    assert relative_l2(result.latents, latents) <= tolerance
    assert np.abs(result.images - images).max() <= 2 / 255
