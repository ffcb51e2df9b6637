"""This module checks, before any work is done, that results can be written where they are to go."""

from __future__ import annotations

import os
from pathlib import Path

from latentc.runtimes.errors import InputError


def check_folder(folder: Path, label: str = "output") -> None:
    """Refuse a folder that is a file, or that cannot be written or made.

    Raises:
        InputError: it begins with `label`, the option that named the folder.
    """
    real = Path(os.path.realpath(folder))
    try:
        if real.exists() and not real.is_dir():
            raise InputError(f"{label} {folder}: is a file; give a folder")
        above = next(each for each in (real, *real.parents) if each.exists())
    except OSError as error:  # a name that is too long, a folder that cannot be looked into
        raise InputError(f"{label} {folder}: {error.strerror}; choose another") from None
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{label} {folder}: nothing can be written in {above}; choose another")


def check_file(file: Path, label: str = "output") -> None:
    """Refuse a file that is a folder, or whose folder is missing or cannot be written.

    Raises:
        InputError: it begins with `label`, the option that named the file.
    """
    if file.is_dir():
        raise InputError(f"{label} {file}: is a folder; give a file")
    parent = Path(os.path.realpath(file)).parent
    if not parent.is_dir():
        raise InputError(f"{label} {file}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{label} {file}: nothing can be written in {parent}; choose another")
