"""An adapter is given as a file, folder or id, and with it a scale or a word."""

from __future__ import annotations

import math
import re

from latentc.runtimes.errors import InputError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def scaled(asked: str) -> tuple[str, float]:
    """Return the place and the scale of ``PLACE:SCALE``; the scale is 1 where there is none.

    Raises:
        InputError: a scale that is too large for a number.
    """
    place, colon, scale = asked.rpartition(":")
    if not colon or not _NUMBER.fullmatch(scale):
        return asked, 1.0
    if not math.isfinite(float(scale)):
        raise InputError(f"LoRA {asked}: expected a finite scale after the colon")
    return place, float(scale)


def worded(asked: str) -> tuple[str, str]:
    """Return the place and the word of ``PLACE:WORD``; the word is empty where there is none."""
    place, colon, word = asked.rpartition(":")
    if not colon or "/" in word or "\\" in word:
        return asked, ""
    return place, word


def scaled_place(asked: str) -> str:
    """Return the place of ``PLACE:SCALE``."""
    return scaled(asked)[0]


def worded_place(asked: str) -> str:
    """Return the place of ``PLACE:WORD``."""
    return worded(asked)[0]
