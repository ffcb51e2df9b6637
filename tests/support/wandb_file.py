"""Reads back what a run of Weights & Biases has written while offline.

A ``.wandb`` file is a log in LevelDB's form (blocks of 32 KiB; each record: CRC, length, type)
of protobuf messages, which wandb itself defines. wandb has no public reader for it.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FILE_HEADER = 7  # ":W&B", a magic number, a version
_FULL, _LAST = 1, 4
_WAITS, _WAIT = 600, 0.05  # seconds


@dataclass
class Read:
    """A run: its configuration, what was logged step by step, and its artifacts' files."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)  # name → inside → file
    artifact_types: dict[str, str] = field(default_factory=dict)
    files: Path = Path()
    ended: bool = False

    def values(self, key: str) -> list[Any]:
        """Return what was logged under a key, one entry per step that has it."""
        return [step[key] for step in self.history if key in step]

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of all increments of a table; images are their paths in the artifact."""
        rows = []
        for files in self.artifacts.values():
            for inside, file in files.items():
                # "rows.table.json", or of an increment "1-1795252345541.rows.table.json"
                if inside.endswith(f"{key}.table.json"):
                    found = json.loads(file.read_text())
                    columns = [str(name) for name in found["columns"]]
                    rows += [dict(zip(columns, row, strict=True)) for row in found["data"]]
        return rows

    def artifact_file(self, inside: str) -> Path:
        """The file that an artifact holds under this path."""
        return next(files[inside] for files in self.artifacts.values() if inside in files)


def read(path: Path) -> Read:
    """A ``.wandb`` file, once its run has ended: its last records are written behind us."""
    for _ in range(_WAITS):
        found = _read(path)
        if found.ended:
            break
        time.sleep(_WAIT)
    return found


def _read(path: Path) -> Read:
    from wandb.proto import wandb_internal_pb2 as messages

    found = Read(files=path.parent / "files")
    for data in records(path.read_bytes()):
        record: Any = messages.Record.FromString(data)
        _take(found, record)
    return found


def records(data: bytes) -> Iterator[bytes]:
    """The records of a log, those that are split over blocks put together.

    The file may still be written to: what has only come in part is left for the next look.
    """
    assert data[:4] == b":W&B"
    place, held = _FILE_HEADER, b""
    while place < len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:  # padding
            place += left
            continue
        if len(data) - place < 7:
            return
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0 or len(data) - place - 7 < length:
            return
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (_FULL, _LAST):
            yield held
            held = b""


def _take(found: Read, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        _configure(found.config, record.run.config)
    elif kind == "config":
        _configure(found.config, record.config)
    elif kind == "history":
        step: dict[str, Any] = {}
        for item in record.history.item:
            *parents, name = item.nested_key or [item.key]
            into = step
            for parent in parents:
                into = into.setdefault(parent, {})
            into[name] = json.loads(item.value_json)
        found.history.append(step)
    elif kind == "artifact":
        name = record.artifact.name
        files = found.artifacts.setdefault(f"{name}:{len(found.artifacts)}", {})
        found.artifact_types[name] = record.artifact.type
        for entry in _entries(record.artifact.manifest):
            files[entry.path] = Path(entry.local_path)
    elif kind == "exit":
        found.ended = True


def _entries(manifest: Any) -> Iterator[Any]:
    assert not manifest.manifest_file_path
    yield from manifest.contents


def _configure(config: dict[str, Any], record: Any) -> None:
    for item in record.update:
        config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
