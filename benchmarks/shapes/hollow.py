"""Hollow shapes: the style that the built-in model's LoRA draws. How they look, and whether an
image shows them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentc.benchmarks.shapes.captions import read
from latentc.benchmarks.shapes.draw import BACKGROUND, RGB, coverage
from latentc.benchmarks.shapes.judge import MIN_CONTRAST, agrees
from latentc.benchmarks.shapes.scenes import CANVAS, Scene

HOLE = 0.5  # diameter of the hole over that of the shape
LEAST_HOLE = 0.08  # share of what lies inside an outline that has to be empty


def render(scene: Scene) -> Image.Image:
    """Draw `scene` with a hole of its own outline in every shape: RGB, 64 by 64 pixels."""
    image = np.empty((CANVAS, CANVAS, 3), dtype=np.float32)
    image[:] = BACKGROUND
    for thing in scene.things:
        hole = coverage(replace(thing, diameter=thing.diameter * HOLE))
        cover = np.clip(coverage(thing) - hole, 0, 1)[..., None]
        image = image * (1 - cover) + np.asarray(RGB[thing.colour], np.float32) * cover
    return Image.fromarray(np.rint(image).astype(np.uint8))


def hollow(image: Image.Image, prompt: str) -> bool:
    """Return whether the image shows the prompt's shapes, and each of them is hollow."""
    filled, shares = fill(image)
    wanted = read(prompt)
    enough = [share for share in shares if share >= LEAST_HOLE]
    return len(enough) == len(shares) == len(wanted.things) and agrees(filled, wanted)


def fill(image: Image.Image) -> tuple[Image.Image, list[float]]:
    """Return the image with holes filled, and for each shape the share of it that was empty.

    Holes get the colour around them.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    ink = np.linalg.norm(pixels - np.asarray(BACKGROUND, np.float32), axis=-1) > MIN_CONTRAST
    outside = _reached(~ink)
    shares = []
    for part in _parts(~outside):
        holes = part & ~ink
        shares.append(float(holes.sum() / part.sum()))
        if holes.any():
            pixels[_grown(_grown(holes)) & part] = _colour(pixels, part & ink)
    return Image.fromarray(pixels.astype(np.uint8)), shares


def _colour(pixels: NDArray[np.float32], ink: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the colour of a shape.

    Its edges, blends with the background, may be most of it: the colour is that of the quarter of
    its pixels that are most unlike the background.
    """
    values = pixels[ink]
    contrast = np.linalg.norm(values - np.asarray(BACKGROUND, np.float32), axis=-1)
    colour: NDArray[np.float32] = np.median(values[contrast >= np.quantile(contrast, 0.75)], axis=0)
    return colour


def _reached(free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the part of `free` that is connected with the image's border."""
    front = np.zeros_like(free)
    front[[0, -1], :] = free[[0, -1], :]
    front[:, [0, -1]] = free[:, [0, -1]]
    while True:
        more = _grown(front) & free
        if (more == front).all():
            return front
        front = more


def _parts(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Return the connected parts of at least ten pixels."""
    left, parts = mask.copy(), []
    while left.any():
        part = np.zeros_like(mask)
        part.flat[int(np.flatnonzero(left)[0])] = True
        while True:
            more = _grown(part) & mask
            if (more == part).all():
                break
            part = more
        left &= ~part
        if part.sum() >= 10:
            parts.append(part)
    return parts


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


class HollowJudge:
    """The judge as latentc asks it (`latentc.runtimes.verification.judges`)."""

    def prompts(self, count: int) -> list[str]:
        """Return the prompts of the built-in model's judge."""
        from latentc.benchmarks.shapes.judge import ShapesJudge

        return ShapesJudge().prompts(count)

    def agrees(self, image: Image.Image, prompt: str) -> bool:
        """Return whether `image` shows what the caption states, hollow, and no further shapes."""
        return hollow(image, prompt)
