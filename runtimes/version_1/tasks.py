"""This module says as data what a bundle can be asked for.

A task lists the pictures that a call gives, and what becomes of them before the first step.

A call is the task whose pictures it gives: a prompt alone, a picture, a picture and a mask.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from latentc.runtimes.strict import Strict

START = "start"  # what a preparation's output becomes: the clean latents that a call starts from
NOISE = "noise"  # the input of an image encoder that takes a draw
STEPS = "num_inference_steps"  # of `Task.defaults`


class Feed(Strict, frozen=True):
    """A picture of the call for one input, as large as that input.

    Where the picture `mask` (of a call, of kind "mask") is white, all channels are `fill`. `fit`:
    its sides become those of the input, or what is too long is cut off at both ends.
    """

    picture: str
    mask: str | None = None
    fill: float = 0.5
    resample: Literal["lanczos", "bilinear", "bicubic"] = "lanczos"
    fit: Literal["stretch", "crop"] = "stretch"


class Preparation(Strict, frozen=True):
    """One run of an image encoder before the first step.

    `feeds`: which pictures its inputs take; an input called `NOISE` takes a draw. `gives`: what
    becomes of its outputs, `START` or a denoiser input; where there is nothing, only the noise is
    drawn. `branches`: those of the guidance that get them, the others get zeros; () is all.
    `others`: outputs that the others get for a denoiser input, in the place of zeros.

    `late`: it draws after the initial noise, not before. `each`: where every picture that is made
    has a seed of its own, there is a draw for each of those, not for each that was given.
    `below_full_strength`: it is left out at strength 1.
    """

    component: str
    feeds: dict[str, Feed]
    gives: dict[str, str]
    branches: tuple[str, ...] = ()
    late: bool = False
    each: bool = False
    below_full_strength: bool = False
    others: dict[str, str] = msgspec.field(default_factory=dict)


class Task(Strict, frozen=True):
    """One kind of call.

    `pictures`: the arguments that it takes, all of them, and their kinds; ``"control_image[1]"`` is
    the second of an argument that is a list of several. `preparations`: in the order of their
    draws. `inputs`: of the denoiser, that pictures feed as they are. `blend`: a mask; after each
    step what is black in it is put back to the start, with the noise of that step.
    `strength`: the default; None where calls start from noise alone. `noise_at_full_strength`: so
    do those of strength 1. `rounds`: which way, where the strength is no whole number of steps.
    `size_of`: the picture whose size, `enlarges` times, a call has that asks for none. `defaults`:
    of arguments made of numbers, of guidance scales and of the step count, where a task has its
    own.

    `branch_arguments`: the arguments made of numbers that a guidance branch may have of its own, by
    name, its prefix included, and those that each must be given with to count. None, of bundles
    made before this was known, is any. `sides_together`: a call gives height and width, or none.
    """

    name: str
    pictures: dict[str, Literal["image", "mask"]] = msgspec.field(default_factory=dict)
    preparations: tuple[Preparation, ...] = ()
    inputs: dict[str, Feed] = msgspec.field(default_factory=dict)
    blend: str | None = None
    strength: float | None = None
    noise_at_full_strength: bool = False
    rounds: Literal["down", "up"] = "down"
    size_of: str | None = None
    enlarges: int = 1
    defaults: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    branch_arguments: dict[str, tuple[str, ...]] | None = None
    sides_together: bool = False

    def start_picture(self) -> str | None:
        """Return the picture that nothing but the start is made of, which latents may stand for."""
        if self.masks():
            return None
        for run in self.preparations:
            fed = [feed.picture for feed in run.feeds.values()]
            if set(run.gives.values()) == {START} and len(fed) == 1:
                return None if self._uses(fed[0]) > 1 else fed[0]
        return None

    def _uses(self, picture: str) -> int:
        """Return how many inputs a picture feeds."""
        every = [feed for run in self.preparations for feed in run.feeds.values()]
        return sum(feed.picture == picture for feed in (*every, *self.inputs.values()))

    def masks(self) -> list[str]:
        """Return the names of those pictures that are masks."""
        return [name for name, kind in self.pictures.items() if kind == "mask"]


def argument(picture: str) -> str:
    """Return the call's argument that holds a picture: ``"control_image[1]"`` →
    ``"control_image"``.
    """
    return picture.partition("[")[0]
