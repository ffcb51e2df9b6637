"""This module tells which other files a graph's file makes its engine open, without the engine.

ONNX graphs name files in their tensors. Messages that can hold a tensor are entered, all else is
skipped, so that embedded weights are not read. An OpenVINO IR has its weights beside it.

OpenVINO goes by what a file holds, whatever its name: an ONNX graph that is called ``model.xml``
opens what it names, and an IR that hides in a field of ``model.onnx`` opens ``model.bin``.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from latentc.runtimes.errors import BundleError
from latentc.runtimes.storage.files import open_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.storage.wire import Kind, walk

# Messages of onnx.proto that can hold a tensor, and the fields in which others of them are.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
_OPERATOR = 4  # the field of a node that says what it does
_PLACE = 13  # the field of a tensor that says where its data is, as pairs of words
_KINDS = (
    Kind({7: _GRAPH, 20: _TRAINING, 25: _FUNCTION}),
    Kind({1: _NODE, 5: _TENSOR, 15: _SPARSE}),
    Kind({5: _ATTRIBUTE}, frozenset((_OPERATOR,))),
    Kind({5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE}),
    Kind({}, frozenset((_PLACE,))),
    Kind({1: _TENSOR, 2: _TENSOR}),
    Kind({7: _NODE, 11: _ATTRIBUTE}),
    Kind({1: _GRAPH, 2: _GRAPH}),
)
_PAIR = (Kind({}, frozenset((1, 2))),)
_XML = (b"<?xml", b"<net")
_DOCTYPE = b"<!DOCTYPE"
# A node of ONNX Runtime's that holds, or names the file of, what an engine has compiled.
_COMPILED = b"EPContext"


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
            locations = {*_locations(data, size)}
    named = [entry.parent / location.decode("utf-8") for location in sorted(locations)]
    return [*named, *_weights_beside(entry)]


@parser(BundleError, "entry", "an OpenVINO IR")
def _of_ir(entry: Path) -> list[Path]:
    with open_regular(entry) as file:
        if not file.read(len(_XML[0])).startswith(_XML):  # no other format begins like this
            raise ValueError(f"it does not begin with {' or '.join(map(bytes.decode, _XML))}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(_DOCTYPE) >= 0:
                raise ValueError("it declares a document type, which can name files and entities")
    return _weights_beside(entry)


def _weights_beside(entry: Path) -> list[Path]:
    """Return the file of weights beside an IR, if it is there: OpenVINO opens it then."""
    weights = entry.with_suffix(".bin")
    return [weights] if os.path.lexists(weights) else []


_READERS: Mapping[str, Callable[[Path], list[Path]]] = {".onnx": _of_onnx, ".xml": _of_ir}


def _locations(data: mmap.mmap, size: int) -> Iterator[bytes]:
    """Yield where tensors say that their data is; of a field that is there twice the last counts.

    Raises:
        ValueError: this is no message, or holds what an engine has compiled.
    """
    for kind, _, content in walk(data, size, _KINDS):
        if kind == _TENSOR:
            pair = {field: word for _, field, word in walk(content, len(content), _PAIR)}
            if pair.get(1) == b"location":
                yield pair.get(2, b"")
        elif content == _COMPILED:
            raise ValueError("it holds compiled code (EPContext)")
