"""This module tells how near images are to those of fp32 PyTorch with the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentc.benchmarks.bench.model import Fidelity
from latentc.runtimes.arrays import Array
from latentc.runtimes.calls import given_images
from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.files import open_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.verification.verify import NOT_COMPARABLE, psnr, relative_l2

_WINDOW = 7  # pixels, of the SSIM


@dataclass(frozen=True)
class Images:
    """An `Images` holds what one case drew: uint8 [images, height, width, 3], and the final
    latents.
    """

    images: Array
    latents: Array | None

    @classmethod
    @parser(InputError, "path", "what a worker saved")
    def load(cls, path: Path) -> Images:
        """Read what a worker saved."""
        with open_regular(path) as file, np.load(file) as found:
            return cls(found["images"], found["latents"])

    @classmethod
    @parser(InputError, "path", "an image that can be read")
    def of_file(cls, path: Path) -> Images:
        """Return the images of a file, which holds one."""
        with open_regular(path, given_images.LARGEST_FILE) as file, Image.open(file) as image:
            return cls(np.asarray(image.convert("RGB"))[None], None)


def compare(found: Images, expected: Images) -> Fidelity | None:
    """Compare all images of a case with the reference's; return None where their sizes differ."""
    if found.images.shape[1:] != expected.images.shape[1:]:
        return None
    count = min(len(found.images), len(expected.images))
    images, wanted = found.images[:count], expected.images[:count]
    latents = None
    if found.latents is not None and expected.latents is not None:
        error = relative_l2(found.latents, expected.latents)
        latents = error if error < NOT_COMPARABLE else None
    return Fidelity(
        psnr=psnr(images, wanted),
        ssim=float(np.mean([ssim(a, b) for a, b in zip(images, wanted, strict=True)])),
        latents_relative_l2=latents,
        max_difference=int(np.abs(images.astype(np.int16) - wanted.astype(np.int16)).max()),
    )


def ssim(found: Array, expected: Array) -> float:
    """Return the structural similarity of two uint8 images [height, width, 3], mean over the
    channels.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            found,
            expected,
            channel_axis=2,
            data_range=255,
            win_size=_WINDOW,
            gaussian_weights=False,
        )
    )


def save_image(images: Array, path: Path) -> None:
    """Write the first image, as PNG."""
    Image.fromarray(images[0]).save(path)


def save_difference(found: Array, expected: Array, path: Path) -> int:
    """Write a map of where two images differ, as PNG.

    White is no difference, the largest one is black.

    Returns:
        the largest difference, of 255.
    """
    apart = np.abs(found[0].astype(np.int16) - expected[0].astype(np.int16)).max(axis=2)
    largest = int(apart.max())
    shade = 255 - np.rint(apart * (255 / max(largest, 1))).astype(np.uint8)
    Image.fromarray(shade.astype(np.uint8)).save(path)
    return largest
