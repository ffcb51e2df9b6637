"""Units of memory and disk, and what of them there is."""

from __future__ import annotations

import shutil
from pathlib import Path

GIB, MIB = 1 << 30, 1 << 20
LARGE_BUILD = 2 << 30  # bytes of a build that is verified one component at a time


def free_disk(output: Path) -> int:
    """Return the bytes that are free where `output` is or will be."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
