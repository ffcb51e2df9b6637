"""Drawing scenes with Pillow: flat colours, anti-aliased edges, plain background."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from latentc.benchmarks.shapes.scenes import CANVAS, Placed, Scene

BACKGROUND = (245, 244, 238)
RGB = {
    "red": (214, 40, 40),
    "orange": (240, 125, 20),
    "yellow": (250, 214, 40),
    "green": (40, 160, 75),
    "blue": (35, 90, 215),
    "purple": (140, 60, 190),
}
_OVERSAMPLE = 8
_STAR_WAIST = 0.46  # inner radius over outer: chunky enough to stay a star at 14 pixels


def render(scene: Scene) -> Image.Image:
    """Draw ``scene`` as an RGB image of 64 by 64 pixels."""
    image = np.empty((CANVAS, CANVAS, 3), dtype=np.float32)
    image[:] = BACKGROUND
    for thing in scene.things:
        cover = coverage(thing)[..., None]
        image = image * (1 - cover) + np.asarray(RGB[thing.colour], np.float32) * cover
    return Image.fromarray(np.rint(image).astype(np.uint8))


def coverage(thing: Placed) -> NDArray[np.float32]:
    """Return how much of each pixel ``thing`` covers: float32 [64, 64] from 0 to 1."""
    big = Image.new("L", (CANVAS * _OVERSAMPLE, CANVAS * _OVERSAMPLE), 0)
    pen = ImageDraw.Draw(big)
    points = [
        (
            (thing.x + u * thing.diameter) * _OVERSAMPLE - 0.5,
            (thing.y + v * thing.diameter) * _OVERSAMPLE - 0.5,
        )
        for u, v in outline(thing.shape)
    ]
    pen.polygon(points, fill=255)
    small = big.reduce(_OVERSAMPLE)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the outline of ``shape`` in a unit box about the origin, y downwards."""
    if shape == "square":
        points = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif shape == "triangle":
        points = _ring([1.0] * 3)
    elif shape == "circle":
        points = _ring([1.0] * 64)
    elif shape == "star":
        points = _ring([1.0, _STAR_WAIST] * 5)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    xs, ys = zip(*points, strict=True)
    span = max(max(xs) - min(xs), max(ys) - min(ys))
    mid_x, mid_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return [((x - mid_x) / span, (y - mid_y) / span) for x, y in points]


def _ring(radii: list[float]) -> list[tuple[float, float]]:
    # Points at even angles, the first one straight up.
    step = 2 * math.pi / len(radii)
    return [(r * math.sin(i * step), -r * math.cos(i * step)) for i, r in enumerate(radii)]
