"""Files and folders that an export is given beside its source: those that cannot be there are
refused before anything is read or downloaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentc.exporter.source import hub
from latentc.exporter.source.weight_files import PICKLES, SAFE
from latentc.runtimes.errors import InputError, shown

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# What each kind is called, and whether it may be a file inside of a repository on the Hub.
_KINDS: Mapping[str, tuple[str, bool]] = {
    "vae": ("VAE", False),
    "lora": ("LoRA", True),
    "textual-inversion": ("textual inversion", True),
    "controlnet": ("ControlNet", False),
    "t2i-adapter": ("T2I-Adapter", False),
    "ip-adapter": ("IP-Adapter", True),
    "image-encoder": ("image encoder", True),
    "config": ("folder of a configuration", False),
}
_FOLDERS = frozenset({"vae", "controlnet", "t2i-adapter", "image-encoder", "config"})


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


def check(asked: Mapping[str, Sequence[str]]) -> None:
    """Refuse what is neither a file or folder here, nor may be an id on the Hub.

    Args:
        asked: by kind, as for `latentc.exporter.source.adapters.kinds.find`, with ``image-encoder``
        and ``config``.

    Raises:
        InputError: naming it.
    """
    if asked.get("image-encoder") and not asked.get("ip-adapter"):
        raise InputError("--image-encoder is that of IP-Adapters: give --ip-adapter too")
    for kind, places in asked.items():
        for each in places:
            try:
                _check(kind, each)
            except (OSError, ValueError) as error:  # such as a name that is too long
                said = getattr(error, "strerror", None) or error
                raise InputError(f"{_KINDS[kind][0]} {shown(each)}: {said}") from error


def _check(kind: str, given: str) -> None:
    what, inside = _KINDS[kind]
    place = _place(kind, given)
    here = Path(place).expanduser()
    if here.is_file() and kind in _FOLDERS:
        raise InputError(f"{what} {place}: is a file; give a folder")
    if here.is_dir() and kind == "ip-adapter":
        raise InputError(f"{what} {place}: is a folder; give its file of weights")
    if here.exists():
        return
    path, colon, scale = place.rpartition(":")
    if kind == "lora" and colon and path[1:]:  # not the letter of a drive
        raise InputError(f"LoRA {given}: expected a number after the colon, not {scale!r}")
    a_file = place.count("/") == 1 and place.lower().endswith((SAFE, *PICKLES))
    if a_file or not hub.is_id(place, inside):
        raise InputError(f"no such {what}: {place}")


def _place(kind: str, asked: str) -> str:
    if kind == "lora":
        return scaled(asked)[0]
    return worded(asked)[0] if kind == "textual-inversion" else asked
