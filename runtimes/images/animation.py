"""The frames of a video as files: an animated image of Pillow's, or a folder of numbered images.

There is no encoder of MP4 here: ``ffmpeg -framerate 16 -i FOLDER/%05d.png video.mp4`` makes one of
a folder. Pillow is imported when it is first needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentc.runtimes.errors import InputError
from latentc.runtimes.images import image
from latentc.runtimes.storage.outputs import check_folder

if TYPE_CHECKING:
    from PIL import Image

# File name extension to Pillow's format name: the ones that hold several frames.
FORMATS: Mapping[str, str] = {".webp": "WEBP", ".png": "PNG", ".gif": "GIF"}
USUAL_RATE = 8.0  # frames in a second, of a video that does not say how many
_UNITS: Mapping[str, int] = {"GIF": 10}  # milliseconds that times are counted in, where not 1
_SECOND = 1000  # milliseconds


def is_folder(path: str) -> bool:
    """Return whether a path names a folder, for numbered images: it ends in a separator, or there
    is one."""
    return path.endswith(("/", os.sep)) or os.path.isdir(path)


def check_path(path: str) -> Path:
    """Refuse a path that `save` could not write, before the work of making a video.

    Raises:
        InputError: an unknown extension, a folder that does not exist, cannot be written or holds
            something, or a file that is one.
    """
    target = Path(path)
    if is_folder(path):
        if target.suffix.lower() in FORMATS:
            raise InputError(f"output {target}: a folder with the extension of a file")
        check_folder(target)
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"output {target}: the folder is not empty; give another one")
        return target
    _format_of(target)
    return image.check_place(target)


def save(
    frames: Sequence[Image.Image],
    path: Path,
    rate: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a video: an animation where the path has one of the extensions, else a folder of PNG
    files ``00000.png``, ``00001.png`` and so on.

    Args:
        rate: frames in a second; None is `USUAL_RATE`.
        metadata: as `latentc.runtimes.images.image.save` writes it, into each file; a GIF has it as
        its comment.

    Returns:
        The path.

    Raises:
        InputError: a path that cannot be written to, or frames that the format cannot hold.
        LatentcError: the disk failed or is full.
    """
    if path.suffix.lower() not in FORMATS or path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate(frames):
            own = None if metadata is None else {**metadata, "frame": index}
            image.save(frame, path / f"{index:05}.png", own)
        return path
    name = _format_of(path)
    options = image.save_options(frames[0], path, name, metadata)
    options |= {
        "save_all": True,
        "append_images": list(frames[1:]),
        "duration": durations(len(frames), rate or USUAL_RATE, _UNITS.get(name, 1)),
        "loop": 0,  # for ever
    }
    return image.write(frames[0], path, options)


def durations(count: int, rate: float, unit: int = 1) -> list[int]:
    """Return how many milliseconds each of `count` frames is shown, in whole `unit`s: all together
    as long as the video is."""
    ends = [round(index * _SECOND / rate / unit) * unit for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def _format_of(target: Path) -> str:
    try:
        return FORMATS[target.suffix.lower()]
    except KeyError:
        known = ", ".join(FORMATS)
        raise InputError(
            f"cannot write a video to {target}: the extension {target.suffix!r} is none of "
            f"{known}; a name that ends in / is a folder for its frames"
        ) from None
