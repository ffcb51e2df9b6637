"""This module says what an image may show: attributes, scenes, captions and the held-out rule.

A *spec* names what an image shows (colours, shapes, sizes, places); a *scene* adds exact
pixels; a *prompt* is a caption with the attributes it states.  Only numpy is needed here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

CANVAS = 64  # pixels, both ways
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "medium", "large")
PLACES = (
    "centre",
    "left",
    "right",
    "top",
    "bottom",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
)
RELATIONS = ("left of", "right of", "above", "below")

DIAMETERS = {"small": 15.0, "medium": 23.0, "large": 34.0}  # pixels across
DIAMETER_JITTER = 1.0  # pixels, either way
PLACE_OFFSET = {"small": 18.0, "medium": 16.0, "large": 12.0}  # pixels from the centre
PLACE_JITTER = 1.5  # pixels, either way
HELD_OUT_ONE_IN = 6

_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_TWO_PART_SIZES = tuple(
    (a, b) for a in SIZES for b in SIZES if not (a == "large" and b == "large")
)  # two large shapes do not fit side by side


@dataclass(frozen=True)
class Thing:
    """One shape.  ``None`` means *not stated* in a prompt; in a spec all fields are set."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Spec:
    """A spec says what an image shows: one thing with a place, or two things with a relation.

    Two things are kept as (left, right) or (upper, lower) with ``relation`` "left of" or
    "above", so each image has exactly one spec however its caption puts it.
    """

    things: tuple[Thing, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Placed:
    """A shape on the canvas; ``x``, ``y`` (middle of the bounding box) in pixels."""

    colour: str
    shape: str
    diameter: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """All that is drawn in one image."""

    things: tuple[Placed, ...]


@dataclass(frozen=True)
class Prompt:
    """A caption and what it states: the second thing and the relation only where given."""

    text: str
    things: tuple[Thing, ...]
    relation: str | None = None


def is_held_out(spec: Spec) -> bool:
    """Return whether images of ``spec`` are kept out of training.

    One thing: by colour, shape, size and place.  Two things: by both colours, both shapes and
    the relation, whatever the sizes, so that no variant of a held-out pair is trained on.
    """
    if len(spec.things) == 1:
        thing = spec.things[0]
        key = f"{thing.colour}|{thing.shape}|{thing.size}|{thing.place}"
    else:
        pair = "|".join(f"{thing.colour}|{thing.shape}" for thing in spec.things)
        key = f"{pair}|{spec.relation}"
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def one_thing_specs() -> list[Spec]:
    """Return every image of one shape, in a fixed order."""
    return [
        Spec((Thing(colour, shape, size, place),))
        for colour in COLOURS
        for shape in SHAPES
        for size in SIZES
        for place in PLACES
    ]


def random_spec(rng: np.random.Generator, objects: int | None = None) -> Spec:
    """Draw a spec; ``objects`` 1 or 2, or ``None`` for either (two a little more often)."""
    count = objects or (2 if rng.random() < 0.6 else 1)
    if count == 1:
        centred = rng.random() < 0.25
        place = PLACES[0] if centred else PLACES[1 + int(rng.integers(len(PLACES) - 1))]
        colour, shape = _random_kind(rng)
        return Spec((Thing(colour, shape, SIZES[int(rng.integers(3))], place),))
    first, second = _random_kind(rng), _random_kind(rng)
    while second == first:
        second = _random_kind(rng)
    sizes = ("medium", "medium")
    if rng.random() < 0.5:
        sizes = _TWO_PART_SIZES[int(rng.integers(len(_TWO_PART_SIZES)))]
    relation = "left of" if rng.random() < 0.5 else "above"
    return Spec((Thing(*first, sizes[0]), Thing(*second, sizes[1])), relation)


def training_spec(rng: np.random.Generator) -> Spec:
    """Draw a spec that is not held out."""
    spec = random_spec(rng)
    while is_held_out(spec):
        spec = random_spec(rng)
    return spec


def place_scene(spec: Spec, rng: np.random.Generator) -> Scene:
    """Choose exact pixels for ``spec``, with a little jitter in size and position."""
    spans = [
        DIAMETERS[thing.size or "medium"] + rng.uniform(-DIAMETER_JITTER, DIAMETER_JITTER)
        for thing in spec.things
    ]
    if len(spec.things) == 1:
        centres = [_single_centre(spec.things[0], rng)]
    else:
        centres = _pair_centres(spans, spec.relation == "above", rng)
    return Scene(
        tuple(
            Placed(thing.colour, thing.shape, float(span), float(x), float(y))
            for thing, span, (x, y) in zip(spec.things, spans, centres, strict=True)
        )
    )


def inverse(relation: str) -> str:
    """Return the same relation seen from the other thing: "above" gives "below"."""
    return _INVERSE[relation]


def _random_kind(rng: np.random.Generator) -> tuple[str, str]:
    return COLOURS[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(len(SHAPES)))]


def _single_centre(thing: Thing, rng: np.random.Generator) -> tuple[float, float]:
    offset = PLACE_OFFSET[thing.size or "medium"]
    words = (thing.place or "centre").split()
    x = offset * (("right" in words) - ("left" in words))
    y = offset * (("bottom" in words) - ("top" in words))
    dx, dy = rng.uniform(-PLACE_JITTER, PLACE_JITTER, size=2)
    return CANVAS / 2 + x + dx, CANVAS / 2 + y + dy


def _pair_centres(
    spans: list[float], upright: bool, rng: np.random.Generator
) -> list[tuple[float, float]]:
    # The free pixels are shared out evenly: before, between and after the two shapes.
    gap = (CANVAS - sum(spans)) / 3
    slack = min(PLACE_JITTER, max(gap - 1.5, 0.0) / 2)
    along = [gap + spans[0] / 2, CANVAS - gap - spans[1] / 2]
    along = [value + rng.uniform(-slack, slack) for value in along]
    across = [CANVAS / 2 + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for _ in spans]
    if upright:
        return list(zip(across, along, strict=True))
    return list(zip(along, across, strict=True))
