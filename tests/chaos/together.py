"""Several writers of one bundle at once, and a reader while a writer replaces what it reads."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import processes
from tests.chaos.operations import OPERATIONS, Place, check_bundle, leftovers

_NO_BUNDLE = 4  # exit codes: the bundle cannot be read
_REFUSED = (2, 7)  # an argument, or an export, that is refused


@dataclass(frozen=True)
class Together:
    """A `Together` says what several processes at once gave: how many of them, and how many rounds;
    of the runs how many went through and how many were refused with a clear line.
    """

    what: str
    processes: int
    rounds: int
    went_through: int
    refused: int
    faults: tuple[str, ...] = ()


def writers(count: int, rounds: int, good: Path, source: Path, base: Path) -> Together:
    """Let `count` exports write into one new folder at once."""
    export = OPERATIONS[0]
    through = refused = 0
    faults: list[str] = []
    for number in range(rounds):
        place = Place(Path(tempfile.mkdtemp(prefix="writers-", dir=base)), good, source)
        place.make(False)
        logs = [f"writer-{index}.txt" for index in range(count)]
        children = [
            processes.start(place, processes.command(export.arguments(place)), log) for log in logs
        ]
        codes = [processes.wait(child) for child in children]
        for code, log in zip(codes, logs, strict=True):
            said = (place.root / log).read_text(errors="replace")
            through += code == 0
            refused += code in _REFUSED
            if code not in (0, *_REFUSED) or "Traceback" in said:
                faults.append(f"round {number}: ends with {code}: {said.strip()[-300:]}")
        try:
            processes.checked(place, lambda place: check_bundle(place.output))
            if left := leftovers(place):
                raise AssertionError(f"left behind: {left}")
        except AssertionError as error:
            faults.append(f"round {number}: {error} (in {place.root})")
            continue
        shutil.rmtree(place.root)
    return Together("exports into one folder", count, rounds, through, refused, tuple(faults))


def reader(rounds: int, good: Path, source: Path, base: Path) -> Together:
    """Read a bundle again and again while another process replaces it again and again."""
    place = Place(Path(tempfile.mkdtemp(prefix="reader-", dir=base)), good, source)
    place.make(True)
    counts = os.pipe()

    def replace() -> int:
        from latentc.exporter.artifacts.store import Store
        from latentc.runtimes.bundle.manifest import Manifest

        for _ in range(rounds):
            manifest = Manifest.load(place.output)
            store = Store(place.output, manifest)
            for key in _keys(manifest):
                if store.keep(key) is None:
                    return 3
            shutil.copytree(place.output / "probes", store.staging / "probes", dirs_exist_ok=True)
            _copy_tokenizers(manifest, place.output, store.staging)
            store.publish(manifest)
        return 0

    def read() -> int:
        from latentc.runtimes.errors import BundleError

        whole = refused = 0
        while not (place.root / "over").exists():
            try:
                check_bundle(place.output)
                whole += 1
            except BundleError:
                refused += 1
        os.write(counts[1], f"{whole} {refused}\n".encode())
        return 0

    reading = processes.start(place, read, "reader.txt")
    writing = processes.wait(processes.start(place, replace, "writer.txt"))
    (place.root / "over").touch()
    faults = []
    if writing != 0:
        faults.append(f"the writer ends with {writing} (in {place.root})")
    if processes.wait(reading) != 0:
        said = (place.root / "reader.txt").read_text(errors="replace").strip()[-300:]
        faults.append(f"the reader fails: {said}")
        return Together("a reader beside a writer", 2, rounds, 0, 0, tuple(faults))
    whole, refused = os.read(counts[0], 100).split()
    if not faults:
        shutil.rmtree(place.root)
    return Together("a reader beside a writer", 2, rounds, int(whole), int(refused), tuple(faults))


def _keys(manifest: object) -> set[str]:
    from latentc.exporter.artifacts.store import _items_of

    return {key for key, _ in _items_of(manifest)}  # type: ignore[arg-type]


def _copy_tokenizers(manifest: object, bundle: Path, staging: Path) -> None:
    for tokenizer in manifest.tokenizers:  # type: ignore[attr-defined]
        target = staging / tokenizer.file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle / tokenizer.file.path, target)
