"""This module checks, before anything is read or computed, that a bundle can be written at all."""

from __future__ import annotations

import os
from pathlib import Path

from latentc.runtimes.bundle.manifest import MANIFEST
from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.outputs import check_folder


def check_output(output: Path) -> None:
    """Refuse a folder that an export could not write when everything is done.

    A bundle is published by a rename in the place of the one before, which takes a folder with a
    name of its own, and one that may be written into beside it.

    Raises:
        InputError: the folder is a link, the working folder or one above it, holds something else
            than a bundle, or stands where nothing can be written.
    """
    if output.is_symlink():
        raise InputError(
            f"output {output}: is a link; give the folder that it leads to, {output.resolve()}"
        )
    real = Path(os.path.realpath(output))
    if Path.cwd().is_relative_to(real):
        raise InputError(
            f"output {output}: the working folder or one above it cannot be replaced by a bundle; "
            "give a folder inside of it"
        )
    check_folder(output)
    if real.is_dir() and any(real.iterdir()) and not (real / MANIFEST).is_file():
        raise InputError(
            f"{output} exists and is not a bundle; it is left alone. Choose another output"
        )
    check_folder(real.parent)
