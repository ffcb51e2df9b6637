"""Says what an image shows, by plain image analysis: no network, only numpy and Pillow.

Pixels unlike the background are grouped into connected parts.  Each part takes the colour
nearest to that of its inner pixels, and the shape whose drawing, given the same area and
centre of mass, overlaps it best.  The judge is strict: a part of mixed colour or unclear
shape, or any part too many, fails the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentc.benchmarks.shapes.captions import held_out_prompts, read
from latentc.benchmarks.shapes.draw import BACKGROUND, RGB, coverage
from latentc.benchmarks.shapes.scenes import CANVAS, DIAMETERS, SHAPES, Placed, Prompt, Thing

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]

MIN_CONTRAST = 60.0  # RGB distance from the background at which a pixel belongs to a part
MIN_AREA = 10.0  # pixels; smaller parts are specks
MAX_COLOUR_ERROR = 45.0  # RGB distance from the named colour
MIN_PURITY = 0.8  # share of a part's inner pixels that have its colour
MIN_OVERLAP = 0.8  # intersection over union with the best fitting shape
PLACE_EDGE = 5.0  # pixels off the centre line from which "left", "top" and so on hold
MIN_APART = 6.0  # pixels between two centres for a relation to hold

_SIZE_EDGES = (
    (DIAMETERS["small"] + DIAMETERS["medium"]) / 2,
    (DIAMETERS["medium"] + DIAMETERS["large"]) / 2,
)


@dataclass(frozen=True)
class SeenObject:
    """A shape found in an image; colour or shape is ``None`` where it is unclear.

    ``diameter`` and ``x``, ``y`` (middle of the bounding box) are in pixels; ``overlap`` is
    the intersection over union with a clean drawing of the shape.
    """

    colour: str | None
    shape: str | None
    size: str
    place: str
    diameter: float
    x: float
    y: float
    overlap: float

    def __str__(self) -> str:
        return f"{self.size} {self.colour or '?'} {self.shape or '?'} ({self.place})"


def look(image: Image.Image) -> list[SeenObject]:
    """Return the shapes in a 64 by 64 image, largest first."""
    if image.size != (CANVAS, CANVAS):
        raise ValueError(f"the judge reads images of {CANVAS} by {CANVAS}, not {image.size}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    contrast = np.linalg.norm(pixels - np.asarray(BACKGROUND, np.float32), axis=-1)
    parts = _connected_parts(contrast > MIN_CONTRAST)
    seen = [_describe(pixels, part) for part in parts if part.sum() >= MIN_AREA]
    return sorted(seen, key=lambda thing: -thing.diameter)


class ShapesJudge:
    """The judge as latentc's verification and benchmarks ask it
    (`latentc.runtimes.verification.judges`)."""

    def prompts(self, count: int) -> list[str]:
        """Return held-out prompts, half of them of one shape, the others of two."""
        half = count // 2
        chosen = [*held_out_prompts(count - half, 1), *held_out_prompts(half, 2)]
        return [prompt.text for prompt in chosen]

    def agrees(self, image: Image.Image, prompt: str) -> bool:
        """Return whether ``image`` shows all that the caption states, and no further shapes."""
        return agrees(image, read(prompt))


def agrees(image: Image.Image, prompt: Prompt) -> bool:
    """Return whether ``image`` shows all that ``prompt`` states, and no further shapes."""
    return not reasons(image, prompt)


def reasons(image: Image.Image, prompt: Prompt) -> list[str]:
    """Return what keeps ``image`` from agreeing with ``prompt``: empty where it agrees."""
    seen = look(image)
    if len(seen) != len(prompt.things):
        shown = ", ".join(map(str, seen)) or "nothing"
        return [f"{len(prompt.things)} shapes asked for, {len(seen)} seen: {shown}"]
    orders = [seen] if len(seen) == 1 else [seen, seen[::-1]]
    return min((_differences(order, prompt) for order in orders), key=len)


def _differences(seen: list[SeenObject], prompt: Prompt) -> list[str]:
    found = [
        f"{name} should be {wanted}, is {got}"
        for thing, stated in zip(seen, prompt.things, strict=True)
        for name, wanted, got in _pairs(thing, stated)
        if wanted is not None and wanted != got
    ]
    if prompt.relation is not None and not _related(seen[0], seen[1], prompt.relation):
        found.append(f"the first should be {prompt.relation} the second")
    return found


def _pairs(seen: SeenObject, stated: Thing) -> list[tuple[str, str | None, str | None]]:
    return [
        ("colour", stated.colour, seen.colour),
        ("shape", stated.shape, seen.shape),
        ("size", stated.size, seen.size),
        ("place", stated.place, seen.place),
    ]


def _related(first: SeenObject, second: SeenObject, relation: str) -> bool:
    right, down = second.x - first.x, second.y - first.y
    along, across = {
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[relation]
    return along >= MIN_APART and along > abs(across)


def _describe(pixels: Pixels, part: Mask) -> SeenObject:
    colour, inner = _colour(pixels, part)
    area = _grow(part) & ~_other_parts_near(pixels, part)
    cover = np.where(area, _cover(pixels, inner), 0).astype(np.float32)
    overlap, shape, fit = max(
        (_fit(cover, shape) for shape in SHAPES), key=lambda result: result[0]
    )
    return SeenObject(
        colour=colour,
        shape=shape if overlap >= MIN_OVERLAP else None,
        size=("small", "medium", "large")[sum(fit.diameter >= edge for edge in _SIZE_EDGES)],
        place=_place(fit.x, fit.y),
        diameter=fit.diameter,
        x=fit.x,
        y=fit.y,
        overlap=overlap,
    )


def _colour(pixels: Pixels, part: Mask) -> tuple[str | None, Pixels]:
    """Return the colour's name and the mean RGB [3] of the part's inner pixels."""
    inner = _shrink(part)
    values = pixels[inner if inner.sum() >= 8 else part]
    names = list(RGB)
    palette = np.asarray([RGB[name] for name in names], dtype=np.float32)
    distance = np.linalg.norm(values[:, None] - palette, axis=-1)
    nearest = distance.argmin(axis=1)
    best = int(np.bincount(nearest, minlength=len(names)).argmax())
    mine = (nearest == best) & (distance[:, best] <= MAX_COLOUR_ERROR)
    middle: Pixels = np.median(values, axis=0)
    return (names[best] if mine.mean() >= MIN_PURITY else None), middle


def _cover(pixels: Pixels, colour: Pixels) -> Pixels:
    # How far each pixel lies on the way from the background to the colour, from 0 to 1.
    background = np.asarray(BACKGROUND, np.float32)
    way = colour - background
    share = (pixels - background) @ way / max(float(way @ way), 1.0)
    clipped: Pixels = share.clip(0, 1)
    return clipped


def _other_parts_near(pixels: Pixels, part: Mask) -> Mask:
    contrast = np.linalg.norm(pixels - np.asarray(BACKGROUND, np.float32), axis=-1)
    others: Mask = (contrast > MIN_CONTRAST) & ~part
    return others


def _fit(cover: Pixels, shape: str) -> tuple[float, str, Placed]:
    """Return the overlap of ``cover`` with ``shape`` drawn at the same area and centre of mass."""
    area_share, mid_x, mid_y = _moments(shape)
    area = float(cover.sum())
    rows, columns = np.mgrid[0:CANVAS, 0:CANVAS] + 0.5
    diameter = (area / area_share) ** 0.5
    x = float((cover * columns).sum()) / area - mid_x * diameter
    y = float((cover * rows).sum()) / area - mid_y * diameter
    drawn = coverage(placed := Placed("", shape, diameter, x, y))
    overlap = np.minimum(cover, drawn).sum() / np.maximum(cover, drawn).sum()
    return float(overlap), shape, placed


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Return area over squared diameter, and the centre of mass in diameters from the middle."""
    middle, span = CANVAS / 2, 48.0
    drawn = coverage(Placed("", shape, span, middle, middle))
    rows, columns = np.mgrid[0:CANVAS, 0:CANVAS] + 0.5
    area = float(drawn.sum())
    x = float((drawn * columns).sum()) / area - middle
    y = float((drawn * rows).sum()) / area - middle
    return area / span**2, x / span, y / span


def _place(x: float, y: float) -> str:
    middle = CANVAS / 2
    down = "top" if y < middle - PLACE_EDGE else "bottom" if y > middle + PLACE_EDGE else ""
    along = "left" if x < middle - PLACE_EDGE else "right" if x > middle + PLACE_EDGE else ""
    return f"{down} {along}".strip() or "centre"


def _connected_parts(mask: Mask) -> list[Mask]:
    """Return the 4-connected parts of ``mask`` [64, 64]."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    parts = []
    while left:
        front = [left.pop()]
        part = np.zeros_like(mask)
        while front:
            y, x = front.pop()
            part[y, x] = True
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            front.extend(near)
        parts.append(part)
    return parts


def _shifted(mask: Mask) -> list[Mask]:
    padded = np.pad(mask, 1)
    moves = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return [padded[y : y + CANVAS, x : x + CANVAS] for y, x in moves]


def _grow(mask: Mask) -> Mask:
    grown: Mask = np.logical_or.reduce(_shifted(mask))
    return grown


def _shrink(mask: Mask) -> Mask:
    shrunk: Mask = np.logical_and.reduce(_shifted(mask))
    return shrunk
