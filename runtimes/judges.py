"""Judges: do the pictures show what their prompts say?

A judge knows one kind of picture, such as those of one model, and needs no reference to compare
with. latentc finds judges in installed packages through the entry-point group ``latentc.judges``;
the manifest of a bundle says which one its pictures are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from runtimes.errors import InputError
from runtimes.manifest import JudgeProbe
from runtimes.session import first_line

if TYPE_CHECKING:
    from PIL import Image

    Draw = Callable[[list[str], list[int]], Sequence[Image.Image]]

ENTRY_POINTS = "latentc.judges"
BATCH = 10  # pictures at a time


class Judge(Protocol):
    """What an entry point names: a class without arguments, or a function that returns one."""

    def prompts(self, count: int) -> Sequence[str]:
        """What to draw: `count` prompts, always the same ones."""
        ...

    def agrees(self, image: Image.Image, prompt: str) -> bool:
        """Whether the picture shows what was asked for."""
        ...


def names() -> list[str]:
    """The judges of the packages that are installed here."""
    return sorted(_entry_points())


def get(name: str) -> Judge:
    """Import and make a judge.

    Raises:
        InputError: none of that name is installed, or it does not work.
    """
    reference = _entry_points().get(name)
    if reference is None:
        raise InputError(f"no judge named {name!r} is installed; there are: {names() or 'none'}")
    from importlib import import_module

    module, _, attribute = reference.partition(":")
    try:
        judge: Judge = getattr(import_module(module), attribute)()
    except Exception as error:  # whatever another package does on import
        raise InputError(f"judge {name!r}: {reference} fails: {first_line(error)}") from error
    return judge


def count_right(probe: JudgeProbe, draw: Draw) -> int:
    """Have all the prompts of a probe drawn and judged.

    Args:
        draw: prompts and their seeds, `BATCH` of them at most → a picture for each.

    Raises:
        InputError: the judge is not installed.
    """
    judge, right = get(probe.judge), 0
    for start in range(0, len(probe.prompts), BATCH):
        prompts = list(probe.prompts[start : start + BATCH])
        seeds = [probe.seed + start + index for index in range(len(prompts))]
        drawn = draw(prompts, seeds)
        right += sum(judge.agrees(*pair) for pair in zip(drawn, prompts, strict=True))
    return right


def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
