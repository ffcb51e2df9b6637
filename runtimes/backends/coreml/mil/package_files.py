"""This module tells which files Core ML opens for a component: its packages, and what they name."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

from latentc.runtimes.backends.coreml.mil.session import packages_of
from latentc.runtimes.bundle.rules import is_inside
from latentc.runtimes.errors import BundleError
from latentc.runtimes.storage.files import open_regular, read_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.storage.wire import Kind, walk

_MOST_BYTES = 1 << 20  # of a document
_MODEL = ".mlmodel"
_IN_PACKAGE = b"@model_path/"  # where a model's weights are: beside it
# Messages of Core ML's Model.proto and MIL.proto on the way to the name of a file of weights, by
# their names there: the fields that are messages.
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {502: "Program"},
    "Program": {2: "FunctionsEntry", 4: "AttributesEntry"},
    "FunctionsEntry": {2: "Function"},
    "Function": {1: "NamedValueType", 3: "BlockSpecializationsEntry", 4: "AttributesEntry"},
    "BlockSpecializationsEntry": {2: "Block"},
    "Block": {1: "NamedValueType", 3: "Operation", 4: "AttributesEntry"},
    "Operation": {2: "InputsEntry", 3: "NamedValueType", 4: "Block", 5: "AttributesEntry"},
    "InputsEntry": {2: "Argument"},
    "Argument": {1: "Binding"},
    "Binding": {2: "Value"},
    "AttributesEntry": {2: "Value"},
    "Value": {2: "ValueType", 3: "ImmediateValue", 5: "BlobFileValue"},
    "ImmediateValue": {2: "TupleValue", 3: "ListValue", 4: "DictionaryValue"},
    "TupleValue": {1: "Value"},
    "ListValue": {1: "Value"},
    "DictionaryValue": {1: "KeyValuePair"},
    "KeyValuePair": {1: "Value", 2: "Value"},
    "BlobFileValue": {},
    "NamedValueType": {2: "ValueType"},
    "ValueType": {1: "TensorType", 2: "ListType", 3: "TupleType", 4: "DictionaryType"}
    | {5: "StateType"},
    "TensorType": {4: "AttributesEntry"},
    "ListType": {1: "ValueType"},
    "TupleType": {1: "ValueType"},
    "DictionaryType": {1: "ValueType", 2: "ValueType"},
    "StateType": {1: "ValueType"},
}
# A model is an ML Program and nothing else: others hold models, or name their files.
_OF_A_PROGRAM = frozenset((1, 2, 10, 502))
_PLACES = {name: place for place, name in enumerate(MESSAGES)}
_KINDS = tuple(
    Kind(
        {number: _PLACES[inner] for number, inner in fields.items()},
        frozenset((1,) if name == "BlobFileValue" else ()),
        _OF_A_PROGRAM if name == "Model" else None,
    )
    for name, fields in MESSAGES.items()
)


def files_of(entry: Path) -> list[Path]:
    """Return what Core ML may open because of a ``model.json``: all that lies in its packages, and
    what these name. Links to folders are not followed, they count as files.

    Raises:
        BackendError: `entry` is no list of packages.
        BundleError: a package is damaged, or names something outside of it.
    """
    found: list[Path] = []
    for package in packages_of(entry):
        found += [package / name for name in _items(package)]
        for folder, folders, files in os.walk(package):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            found += [Path(folder, name) for name in (*files, *links)]
    for model in {path for path in found if path.suffix == _MODEL and path.exists()}:
        found += _weights(model)
    return list(dict.fromkeys(found))


@parser(BundleError, "package", "a Core ML package")
def _items(package: Path) -> list[str]:
    """Return the files that a package's manifest names, relative to the package."""
    document = json.loads(read_regular(package / "Manifest.json", _MOST_BYTES))
    names = [f"Data/{each['path']}" for each in document["itemInfoEntries"].values()]
    for name in names:
        if not is_inside(name):
            raise ValueError(f"it names {name!r:.80}, which is not inside of it")
    return ["Manifest.json", *(name for name in names if not (package / name).is_dir())]


@parser(BundleError, "model", "an ML Program")
def _weights(model: Path) -> list[Path]:
    """Return the files of weights that a model names."""
    with open_regular(model) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return []
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            names = {content for _, _, content in walk(data, size, _KINDS)}
    for name in names:
        if not name.startswith(_IN_PACKAGE) or not is_inside(name.decode("utf-8")):
            raise ValueError(f"it names {name!r:.80}, which is not inside of its package")
    return [model.parent / name.removeprefix(_IN_PACKAGE).decode("utf-8") for name in names]
