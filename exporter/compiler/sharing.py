"""Files that bundles have in common, stored once: hard links to those of other bundles, and to
those of the same one.

SDXL's refiner has the base model's second text encoder and VAE, fine-tuned models have the text
encoders of their original; two graphs of a bundle may have the same weights. Bundles are never
written in place, so neither can change the other's files; removing one leaves them to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import File
from latentc.runtimes.bundle.trust import checked
from latentc.runtimes.errors import BundleError, ExportError
from latentc.runtimes.storage.files import check_inside, replace_by_link

_SMALLEST = 1 << 12  # bytes: smaller ones take a block of the disk either way


def check(bundles: Sequence[Path], destination: Path) -> None:
    """Raises:
    BundleError: one of them cannot be read.
    ExportError: one is on another disk, where no link can lead, or is the destination itself.
    """
    place = next(each for each in (destination, *destination.absolute().parents) if each.exists())
    for bundle in bundles:
        Manifest.load(bundle)
        if bundle.resolve() == destination.resolve():
            raise ExportError(f"{bundle} cannot share files with itself")
        if bundle.stat().st_dev != place.stat().st_dev:
            raise ExportError(
                f"{destination} cannot share files with {bundle}: they are on different disks, and "
                "a hard link cannot lead from one to the other"
            )


def share(root: Path, manifest: Manifest, bundles: Sequence[Path]) -> int:
    """Put links to files of other bundles in the place of the same files under `root`.

    A file is the same if its digest is, as listed, and of the other bundle as read again before a
    link is made.

    Returns:
        how many bytes are stored once only.

    Raises:
        BundleError: one of the bundles cannot be read.
        ExportError: the links cannot be made.
    """
    known: dict[tuple[int, str], tuple[Path, File]] = {}
    for bundle in bundles:
        for file in Manifest.load(bundle).files():
            known.setdefault((file.size, file.sha256), (bundle, file))
    shared = 0
    for file in _distinct(manifest):
        other = known.get((file.size, file.sha256))
        if other is not None and file.size >= _SMALLEST and _linked(root, other, file):
            shared += file.size
    return shared


def store_once(root: Path, manifest: Manifest) -> None:
    """Put links in the place of files of graphs under `root` that are the same as others there, if
    this system has hard links."""
    first: dict[tuple[int, str], File] = {}
    artifacts = (each for build in manifest.builds for each in build.artifacts.values())
    for file in (file for artifact in artifacts for file in artifact.files):
        other = first.setdefault((file.size, file.sha256), file)
        if file.path == other.path or file.size < _SMALLEST:
            continue
        with suppress(OSError):
            check_inside(root, root / file.path)
            replace_by_link(root / other.path, root / file.path)


def _distinct(manifest: Manifest) -> list[File]:
    return list({file.path: file for file in manifest.files()}.values())


def _linked(root: Path, other: tuple[Path, File], file: File) -> bool:
    """Return whether the file under `root` is that of the other bundle now."""
    path = root / file.path
    try:
        existing = checked(*other, "always")
    except BundleError:
        return False  # altered: let the other bundle say so when it is loaded
    if path.samefile(existing):
        return True
    try:
        check_inside(root, path)
        replace_by_link(existing, path)
    except OSError as error:
        raise ExportError(
            f"cannot make a hard link to {existing}: {error.strerror}. Leave --share-with out"
        ) from error
    return True
