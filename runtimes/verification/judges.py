"""Judges: do the images show what their prompts say?

A judge knows one kind of image, such as those of one model, and needs no reference to compare
with. latentc finds judges in installed packages through the entry-point group ``latentc.judges``;
the manifest of a bundle says which one its images are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from latentc.runtimes import plugins
from latentc.runtimes.errors import InputError, first_line
from latentc.runtimes.unknown_names import suggestion

if TYPE_CHECKING:
    from PIL import Image

    Draw = Callable[[list[str], list[int]], Sequence[Image.Image]]

ENTRY_POINTS = "latentc.judges"
BATCH = 10  # images at a time


class Judge(Protocol):
    """A judge is what an entry point names: a class without arguments, or a function that returns
    one.
    """

    def prompts(self, count: int) -> Sequence[str]:
        """Return the prompts to draw: `count` of them, always the same ones."""
        ...

    def agrees(self, image: Image.Image, prompt: str) -> bool:
        """Return whether the image shows what was asked for."""
        ...


def names() -> list[str]:
    """The judges of the packages that are installed here."""
    return sorted(plugins.entry_points(ENTRY_POINTS))


def get(name: str) -> Judge:
    """Import and make a judge.

    Raises:
        InputError: none of that name is installed, or it does not work.
    """
    reference = plugins.entry_points(ENTRY_POINTS).get(name)
    if reference is None:
        raise InputError(f"no judge named {name!r} is installed; {suggestion(name, names())}")
    try:
        with plugins.started(reference):
            judge: Judge = plugins.resolve(reference)()
        if not hasattr(judge, "prompts") or not hasattr(judge, "agrees"):
            raise InputError(f"judge {name!r}: {reference} is no Judge")
    except (plugins.BrokenPlugin, ImportError) as error:
        raise InputError(f"judge {name!r}: {first_line(error)}") from error
    return judge


def count_right(judge: Judge, prompts: Sequence[str], seed: int, draw: Draw) -> int:
    """Have prompts drawn and judged; how many images are right.

    Args:
        seed: of the first image; each has the next one.
        draw: prompts and their seeds, `BATCH` of them at most → an image for each.
    """
    right = 0
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        drawn = draw(part, [seed + start + index for index in range(len(part))])
        right += sum(judge.agrees(*pair) for pair in zip(drawn, part, strict=True))
    return right
