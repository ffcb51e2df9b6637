"""Which other files a graph's file makes its engine open, told without the engine.

ONNX graphs name files in their tensors. They are messages of Protocol Buffers, and their wire
format is walked here: messages that can hold a tensor are entered, all else is skipped by its
length, so that embedded weights are not read. An OpenVINO IR has its weights beside it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from runtimes.errors import BundleError
from runtimes.files import open_regular
from runtimes.parsing import parser

# Messages of onnx.proto that can hold a tensor, and the fields in which others of them are.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING, _PLACE = range(9)
_FIELDS: tuple[Mapping[int, int], ...] = (
    {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    {5: _ATTRIBUTE},
    {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    {13: _PLACE},
    {1: _TENSOR, 2: _TENSOR},
    {7: _NODE, 11: _ATTRIBUTE},
    {1: _GRAPH, 2: _GRAPH},
    {},
)
_OPERATOR = 4  # the field of a node that says what it does
_KEY, _VALUE = 1, 2  # of a tensor's place
# A node of ONNX Runtime's that holds, or names the file of, what an engine has compiled.
_COMPILED = b"EPContext"
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 70  # bits


def references(entry: Path) -> list[Path]:
    """Return the files that an engine opens because of `entry`, as the file says them: they need
    not be there. A file of a kind that is not known here names none.

    Raises:
        BundleError: the file is damaged, or no regular file.
    """
    reader = _READERS.get(entry.suffix)
    return [] if reader is None else reader(entry)


@parser(BundleError, "entry", "an ONNX graph")
def _of_onnx(entry: Path) -> list[Path]:
    with open_regular(entry) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return []
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            locations = {bytes(each) for each in _locations(data, size)}
    return [entry.parent / location.decode("utf-8") for location in sorted(locations)]


def _of_ir(entry: Path) -> list[Path]:
    """OpenVINO opens the file of weights wherever there is one."""
    weights = entry.with_suffix(".bin")
    return [weights] if os.path.lexists(weights) else []


_READERS: Mapping[str, Callable[[Path], list[Path]]] = {".onnx": _of_onnx, ".xml": _of_ir}


def _locations(data: mmap.mmap, size: int) -> Iterator[bytes]:
    """Yield where tensors say that their data is.

    Every field is looked at once, so that the work is at most in proportion to the size.

    Raises:
        ValueError: this is no message, or holds what an engine has compiled.
    """
    waiting = [(0, size, _MODEL)]
    while waiting:
        start, end, kind = waiting.pop()
        fields = _FIELDS[kind]
        key = value = b""
        for field, begin, stop in _fields(data, start, end):
            inner = fields.get(field)
            if inner is not None:
                waiting.append((begin, stop, inner))
            elif kind == _PLACE:
                if field == _KEY:
                    key = data[begin:stop]
                elif field == _VALUE:
                    value = data[begin:stop]
            elif kind == _NODE and field == _OPERATOR and data[begin:stop] == _COMPILED:
                raise ValueError("it holds compiled code (EPContext)")
        if key == b"location":
            yield value


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of a message that have a length: number, begin and end of the content."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _LENGTH:
            length, at = _varint(data, at)
            if length > end - at:
                raise ValueError("a field that is longer than what it is in")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FOUR_BYTES:
            at += 4
        elif kind == _EIGHT_BYTES:
            at += 8
        else:
            raise ValueError(f"a field of the kind {kind}")
    if at > end:
        raise ValueError("a field that is longer than what it is in")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return a number of seven bits for each byte, the lowest first, and where it ends."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while shift < _LONGEST_VARINT:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    raise ValueError("a number that does not end")
