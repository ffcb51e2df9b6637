"""A copy of a good bundle that a case of the corpus spoils, and the table of the cases.

A case is a function with the decorator `case`: it takes the copy and makes it bad. Everything that
the manifest says of the files stays true unless the case itself says otherwise (`BadBundle.put`
notes sizes and hashes), because who can write a bundle's files can write its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from latentc.runtimes.errors import BundleError, LatentcError

MANIFEST = "manifest.json"
SECRET = "not for readers of bundles\n"

# The parts of a bundle that a case may spoil. A reader says which parts it reads, and must refuse a
# bundle where one of those is bad; it need not notice the others.
#   manifest            the document itself, and its rules
#   files               presence, kind, size and hash of the files that it lists
#   tokenizer, plans    their content
#   onnx, openvino, torch               graphs of that target, before they run
#   onnx results, openvino results      what those graphs give when they run
#   probes              what `verify` compares with
#   anything            no part that a reader needs: every reader must do no harm
PARTS = (
    *("manifest", "files", "tokenizer", "plans", "probes"),
    *("onnx", "openvino", "torch", "onnx results", "openvino results", "anything"),
)


class BadBundle:
    """A copy of a good bundle, made of hard links: `put` never writes into the original.

    `outside` is a folder beside the bundle with a file that no reader may touch.
    """

    def __init__(self, good: Path, folder: Path) -> None:
        self.root = folder / "bundle"
        self.outside = folder / "outside"
        shutil.copytree(good, self.root, copy_function=os.link)
        self.outside.mkdir()
        (self.outside / "secret").write_text(SECRET, encoding="utf-8")

    def document(self) -> Any:
        """Return the manifest as JSON values."""
        return json.loads((self.root / MANIFEST).read_bytes())

    def edit(self, change: Callable[[Any], object]) -> None:
        """Write the manifest anew after `change` altered its JSON values."""
        document = self.document()
        change(document)
        self.put(MANIFEST, json.dumps(document).encode())

    def set(self, where: str, value: Any) -> None:
        """Set a member of the manifest by its path, such as ``builds.0.name``."""
        *parents, last = where.split(".")

        def change(node: Any) -> None:
            for key in parents:
                node = node[int(key) if isinstance(node, list) else key]
            node[int(last) if isinstance(node, list) else last] = value

        self.edit(change)

    def put(self, path: str, data: bytes) -> None:
        """Replace a file; the manifest tells its new size and hash wherever it lists it."""
        self.remove(path)
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        if path != MANIFEST:
            self._list(path, data)

    def spoil(self, path: str, data: bytes) -> None:
        """Replace a file without a word in the manifest."""
        self.remove(path)
        (self.root / path).write_bytes(data)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        (self.root / path).unlink(missing_ok=True)

    def fifo(self, path: str) -> None:
        """Put a named pipe in a file's place: a reader that opens it waits forever."""
        self.remove(path)
        os.mkfifo(self.root / path)

    def link(self, path: str, to: str | os.PathLike[str]) -> None:
        """Put a symbolic link in a file's place."""
        self.remove(path)
        (self.root / path).symlink_to(to)

    def read(self, path: str) -> bytes:
        """Return a file's content."""
        return (self.root / path).read_bytes()

    def build(self, target: str) -> Any:
        """Return the manifest's build for a target, as JSON values."""
        return next(build for build in self.document()["builds"] if build["target"] == target)

    def entry(self, target: str, component: str) -> str:
        """Return the path of the file that an engine loads for a component."""
        return str(self.build(target)["artifacts"][component]["entry"])

    def tokenizer(self) -> str:
        """Return the path of the tokenizer's file."""
        return str(self.document()["tokenizers"][0]["file"]["path"])

    def plans(self) -> str:
        """Return the path of the default scheduler's table."""
        return str(self.document()["schedules"][0]["file"]["path"])

    def only(self, target: str) -> None:
        """Keep the builds of one target, so that no reader looks at others."""
        self.edit(
            lambda document: document.update(
                builds=[build for build in document["builds"] if build["target"] == target]
            )
        )

    def _list(self, path: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()

        def change(document: Any) -> None:
            for record in file_records(document):
                if record["path"] == path:
                    record.update(size=len(data), sha256=digest)

        self.edit(change)


def file_records(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every record of a file in a manifest."""
    if isinstance(node, dict):
        if {"path", "size", "sha256"} == node.keys():
            yield node
        for value in node.values():
            yield from file_records(value)
    elif isinstance(node, list):
        for value in node:
            yield from file_records(value)


@dataclass(frozen=True)
class Case:
    """One way to spoil a bundle. `error` is the class that a reader must raise, `said` a part of
    its message; `part` is one of `PARTS`. Where `error` is None the bundle may be used, and must
    do no harm."""

    name: str
    part: str
    error: type[LatentcError] | None
    said: str
    make: Callable[[BadBundle], object]

    @property
    def what(self) -> str:
        """Return what the case does, in a sentence."""
        return (self.make.__doc__ or "").strip()


CASES: dict[str, Case] = {}


def case(
    part: str, said: str, error: type[LatentcError] | None = BundleError
) -> Callable[[Callable[[BadBundle], object]], Callable[[BadBundle], object]]:
    """Enter a function into `CASES`, under its name with hyphens."""

    def enter(make: Callable[[BadBundle], object]) -> Callable[[BadBundle], object]:
        name = make.__name__.replace("_", "-")
        if name in CASES or part not in PARTS or not make.__doc__:
            raise ValueError(f"{name}: named twice, of no known part, or without a sentence")
        CASES[name] = Case(name, part, error, said, make)
        return make

    return enter


def import_cases() -> None:
    """Import every file of cases, which fills `CASES`."""
    for path in sorted(Path(__file__).parent.glob("*_cases.py")):
        import_module(f"tests.hostile.{path.stem}")
