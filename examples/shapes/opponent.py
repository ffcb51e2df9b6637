"""Where the latents of an image should lie: one axis for each pair of opponent colours.

An autoencoder left to itself puts the six colours of the images close together, nearly on one
line, and a denoiser trained on such latents mixes them up.  Here each colour has a direction of
its own, all of them equally far apart: three axes (red and green, blue and yellow, orange and
purple; opponent colours in the sense of Hering, 1878), and a fourth that says how much of a cell
is covered at all.  The background is zero on the colour axes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentc.benchmarks.shapes.draw import coverage
from latentc.benchmarks.shapes.scenes import CANVAS, Scene

AXES = (("red", "green"), ("blue", "yellow"), ("orange", "purple"))
# A fifth of a typical image is covered.  With these spans each channel has a spread near one.
COLOUR_SPAN = 4.0
COVER_SPAN = 2.5
COVER_MIDDLE = 0.2
_CELL = 4  # pixels of the image to a latent, either way


def opponent_layout(scene: Scene) -> NDArray[np.float32]:
    """Return what the latents of ``scene`` should be near: float32 [4, 16, 16]."""
    layers = np.zeros((4, CANVAS, CANVAS), dtype=np.float32)
    for thing in scene.things:
        cover = coverage(thing)
        layers = layers * (1 - cover) + _code(thing.colour)[:, None, None] * cover
    side = CANVAS // _CELL
    cells: NDArray[np.float32] = layers.reshape(4, side, _CELL, side, _CELL).mean(axis=(2, 4))
    cells[3] -= COVER_SPAN * COVER_MIDDLE
    return cells


def _code(colour: str) -> NDArray[np.float32]:
    code = np.zeros(4, dtype=np.float32)
    for axis, (one, other) in enumerate(AXES):
        code[axis] = COLOUR_SPAN * ((colour == one) - (colour == other))
    code[3] = COVER_SPAN
    return code
