"""The manifest: the only contract between the exporter and the runtime.

`manifest.json` is decoded into the frozen structures below; msgspec checks every type and
refuses unknown fields, `Manifest.load` checks what types cannot say. The document is
specified for other languages in docs/bundle-format.md.

What may be left out by readers that do not know it stands in `Manifest.optional`, under names of
its own; what they must know to make the right images is listed in `Manifest.needs`.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import msgspec

from latentc.runtimes.bundle.rules import problems
from latentc.runtimes.bundle.structures import Document
from latentc.runtimes.errors import BundleError
from latentc.runtimes.storage.files import UnreadableFile, read_regular
from latentc.runtimes.storage.parsing import parser, parsing
from latentc.runtimes.storage.places import INDEX, is_hub_id, names_weights

FORMAT_VERSION = 2
NEEDS: tuple[str, ...] = ()  # what this reader knows of what documents may need
MANIFEST = "manifest.json"
LARGEST = 16 << 20  # bytes of a manifest; that of a large bundle has some 100,000


class Manifest(Document, frozen=True, dict=True):
    """A manifest that is read from a bundle, and checked."""

    @classmethod
    def load(cls, bundle: Path) -> Manifest:
        """Read and check `bundle`/manifest.json (not the files that it names).

        Raises:
            BundleError: missing, not JSON, an unknown version, or anything inconsistent.
        """
        return cls.decode(read_document(bundle), str(bundle / MANIFEST))

    @classmethod
    @parser(BundleError, "origin", "a manifest")
    def decode(cls, data: bytes, origin: str = MANIFEST) -> Manifest:
        """Decode and check the document. Raises BundleError."""
        head = msgspec.json.decode(data, type=_Head)
        _check_readable(head, origin)
        manifest = msgspec.json.decode(data, type=cls)
        problem = next(problems(manifest), None)
        if problem:
            raise BundleError(f"{origin}: {problem}")
        return manifest

    def checked(self) -> bytes:
        """Return the document for writers: its own reader takes it.

        Raises:
            BundleError: the reader would refuse it.
        """
        data = self.encode()
        type(self).decode(data, "the manifest that was to be written")
        return data


def read_document(bundle: Path) -> bytes:
    """Return `bundle`/manifest.json. Raises BundleError where it is missing or no plain file."""
    try:
        return read_regular(bundle / MANIFEST, LARGEST, root=bundle)
    except OSError as error:
        raise BundleError(_not_a_bundle(bundle, error)) from error


def version_of(data: bytes, origin: str) -> int:
    """Return the version of a document. Raises BundleError for what has none."""
    with parsing(origin, BundleError, "a manifest"):
        return msgspec.json.decode(data, type=_Head).format_version


class _Head(msgspec.Struct):
    """A `_Head` holds what is read first: a document of another version has other members."""

    format_version: int
    needs: tuple[str, ...] = ()


def _bundle_of(origin: str) -> str:
    """Return the folder of a manifest, as a command line names it."""
    folder, _, name = origin.rpartition("/")
    return shlex.quote(folder) if folder and name == MANIFEST else "BUNDLE"


def _check_readable(head: _Head, origin: str) -> None:
    """Raise BundleError for a document of another version, or one that needs a later reader."""
    if head.format_version == 1:
        raise BundleError(
            f"{origin}: format_version 1, but this latentc reads {FORMAT_VERSION}; bring the "
            f"bundle up to date with: latentc upgrade {_bundle_of(origin)}"
        )
    if head.format_version != FORMAT_VERSION:
        raise BundleError(
            f"{origin}: format_version {head.format_version}, but this latentc reads "
            f"{FORMAT_VERSION}; upgrade latentc or export the bundle again"
        )
    unknown = [name for name in head.needs if name not in NEEDS]
    if unknown:
        raise BundleError(
            f"{origin}: the bundle needs {', '.join(map(repr, unknown))}, which this latentc does "
            "not know; upgrade latentc"
        )


def schema() -> dict[str, Any]:
    """Return the JSON Schema of manifest.json, made from the structures above."""
    return msgspec.json.schema(Manifest)


def _may_be_id(place: Path) -> bool:
    """Return whether what is not there may be an id on the Hub: no folder has its owner's name."""
    return is_hub_id(place.as_posix()) and not os.path.exists(place.parent)


def _not_a_bundle(bundle: Path, error: OSError) -> str:
    if isinstance(error, UnreadableFile):
        return f"{bundle / MANIFEST}: {error.strerror}"
    export = f"latentc export {shlex.quote(os.fspath(bundle))} -o BUNDLE"
    if not os.path.exists(bundle):  # Path.exists raises where no file can have the name
        if names_weights(os.fspath(bundle)):
            return f"no such file: {bundle}; a bundle is the folder that latentc export makes of it"
        hub = f"; for the model of this name on the Hub: {export}" if _may_be_id(bundle) else ""
        return f"no bundle at {bundle}: no such folder{hub}"
    if os.path.isfile(bundle / INDEX):
        return f"{bundle} is a diffusers pipeline, not a bundle yet: {export}"
    if os.path.isfile(bundle) and names_weights(os.fspath(bundle)):
        return f"{bundle} is a file of weights, not a bundle yet: {export}"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{bundle} is not a bundle: it has no {MANIFEST}"
    return f"{bundle / MANIFEST}: {error.strerror}"
