"""The manifest's part of the independent reader: it keeps to docs/bundle-format.md by reading it.

The types of the fields are those of the document's own tables; the rules beyond them that keep a
reader from harm are written out here. It imports nothing of latentc.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tests.docs.markdown import ROOT, section, table

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DOCUMENT = ROOT / "docs" / "bundle-format.md"
_LARGEST = 16 << 20  # bytes of a manifest (section 3)
_MOST_GROWTH = 64  # times as long as a text
_LONGEST_SAID, _MOST_BASE_MODELS = 200, 32  # characters and names in the source
_LARGEST_SIDE = 1 << 20  # of an image, in pixels


class Refused(Exception):
    """The bundle or the call breaks a rule of the document."""


def expect(condition: Any, message: str) -> None:
    """Raise Refused unless `condition` holds."""
    if not condition:
        raise Refused(message)


def refusing(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function raise Refused for whatever libraries raise on a bad bundle."""

    @wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}") from error

    return guarded


def read_inside(root: Path, path: Path, limit: int) -> bytes:
    """Return the content of a regular file in a bundle that has at most `limit` bytes."""
    try:
        real = os.path.realpath(path)
        inside = Path(real).is_relative_to(os.path.realpath(root))
        expect(inside, f"{path.name} leads out of the bundle")
        status = os.stat(real)
        expect(stat.S_ISREG(status.st_mode), f"{path.name} is no regular file")
        expect(status.st_size <= limit, f"{path.name}: {status.st_size} bytes")
        with open(real, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise Refused(f"{path.name}: {error}") from error
    expect(len(data) <= limit, f"{path.name}: more than {limit} bytes")
    return data


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the checked manifest (sections 2 to 5)."""
    data = read_inside(root, root / "manifest.json", _LARGEST)
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Refused(f"manifest.json: {error}") from error
    expect(isinstance(document, dict), "manifest.json is no object")
    version = document.get("format_version")
    expect(version == 1 and type(version) is int, f"unknown format_version {version!r}")
    _check(document, "Manifest", "manifest")
    for problem in _problems(document):
        raise Refused(problem)
    return document


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    expect(math.isfinite(float(text)), f"{text} is too large")
    return float(text)


def check_tokenizer(path: Path, max_length: int) -> None:
    """Refuse a tokenizer that pads or cuts in another way, or lets a text grow (sections 7, 13)."""
    try:
        document = json.loads(path.read_text("utf-8"))
        padding, cutting = document["padding"], document["truncation"]
        expect(padding["strategy"] == {"Fixed": max_length}, "ids: pads to another length")
        expect(not padding.get("pad_to_multiple_of"), "ids: pads to a multiple")
        expect(cutting["max_length"] == max_length and not cutting["stride"], "ids: cuts otherwise")
        expect(_growth(document.get("normalizer") or {}) <= _MOST_GROWTH, "lets a text grow")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise Refused(f"{path.name}: not a usable tokenizer: {error}") from error


def _growth(normalizer: Mapping[str, Any]) -> float:
    """Return how many times as long as it was a text may become."""
    parts = normalizer.get("normalizers", [normalizer])
    rules = [part for part in parts if part.get("type") == "Replace"]
    return math.prod(
        max(1.0, len(rule["content"]) / max(1, len(rule["pattern"].get("String", ""))))
        for rule in rules
    )


# The tables of section 3: each type has a table under its own heading


@cache
def _fields(structure: str) -> dict[str, tuple[str, bool]]:
    """Return type and whether it is required of each field of a structure."""
    rows = table(section(_DOCUMENT, structure), "Field")
    plain = [
        {k: re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", v) for k, v in row.items()} for row in rows
    ]
    return {row["Field"]: (row["Type"], row["Required"] == "yes") for row in plain}


@cache
def _structures() -> frozenset[str]:
    return frozenset(re.findall(r"^### ([A-Z]\w+)$", _DOCUMENT.read_text("utf-8"), re.MULTILINE))


def _check(value: Any, kind: str, where: str) -> None:
    """Check a value against a type as the document writes it."""
    expect(_fits(value, kind, where), f"{where}: expected {kind}, found {str(value)[:80]}")


def _fits(value: Any, kind: str, where: str) -> bool:
    if kind.startswith("(") and kind.endswith(")"):
        kind = kind[1:-1]
    for begin, container in (("array of ", list), ("map of ", dict)):
        if kind.startswith(begin) and not _alternatives(kind):
            if not isinstance(value, container):
                return False
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                _check(item, kind[len(begin) :], f"{where}.{key}")
            return True
    if alternatives := _alternatives(kind):
        return any(_may_be(value, each, where) for each in alternatives)
    if kind in _structures():
        return isinstance(value, dict) and _fits_structure(value, kind, where)
    if kind.startswith('"'):
        return bool(value == json.loads(kind))
    return _is_simple(value, kind)


def _may_be(value: Any, kind: str, where: str) -> bool:
    """Whether a value is of one of several types; what is wrong inside of it is told at once."""
    if value is None or kind == "null":
        return value is None and kind == "null"
    return _fits(value, kind, where)


def _alternatives(kind: str) -> list[str]:
    """Return the parts of "a or b", leaving parentheses alone."""
    parts = re.split(r" or (?![^(]*\))", kind)
    return parts if len(parts) > 1 else []


def _fits_structure(value: Mapping[str, Any], kind: str, where: str) -> bool:
    fields = _fields(kind)
    expect(
        value.keys() <= fields.keys(), f"{where}: unknown {sorted(value.keys() - fields.keys())}"
    )
    for name, (of, required) in fields.items():
        expect(name in value or not required, f"{where}: {name} is missing")
        if name in value:
            _check(value[name], of, f"{where}.{name}")
    return True


def _is_simple(value: Any, kind: str) -> bool:
    if kind == "object":
        return isinstance(value, dict)
    if kind == "string":
        return isinstance(value, str) and not any(0xD800 <= ord(sign) <= 0xDFFF for sign in value)
    if kind == "boolean":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind == "integer":
        return isinstance(value, int) and abs(value) <= 2**53
    return kind == "number" and isinstance(value, int | float)


# Rules beyond types


def _result_problems(document: Mapping[str, Any]) -> Iterator[str]:
    """The shapes of the prediction and of the image (section 5)."""
    roles = {each["role"]: each for each in document["components"]}
    if not {"denoiser", "decoder"} <= roles.keys():
        yield "no denoiser, or no decoder"
        return
    taken = roles.get("shallow", {"inputs": {}})["inputs"]
    denoiser, decoder = roles["denoiser"], roles["decoder"]
    predictions = [spec for name, spec in denoiser["outputs"].items() if name not in taken]
    latents, image = decoder["inputs"]["latents"], decoder["outputs"]["image"]
    factor = document["latents"]["factor"]
    sizes = [_times(each, factor) for each in latents["shape"][2:]]
    wanted = [_times(each, 1) for each in latents["shape"][:1]], sizes
    shape = [_times(each, 1) for each in image["shape"]]
    if (shape[:1], shape[2:]) != wanted or image["shape"][1] not in (1, 3, 4):
        yield "the image has not the size of the latents"
    if any(spec["shape"] != denoiser["inputs"]["sample"]["shape"] for spec in predictions):
        yield "the prediction has not the shape of the sample"
    if any(not spec["dtype"].startswith("float") for spec in (image, *predictions)):
        yield "the prediction or the image holds no floats"


def _times(dimension: int | str, factor: int) -> tuple[int, str]:
    if isinstance(dimension, int):
        return dimension * factor, ""
    own, _, symbol = dimension.rpartition("*")
    return int(own or 1) * factor, symbol


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    named = (("components", "name"), ("builds", "name"), ("schedules", "name"), ("tasks", "name"))
    for member, key in (*named, ("arguments", "name"), ("tokenizers", "input")):
        names = [each[key] for each in document[member]]
        if len(set(names)) < len(names):
            yield f"two {member} are named alike"
    source = document["source"]
    models = source.get("base_model", [])
    texts = [source.get("licence"), source.get("author"), *models]
    if len(models) > _MOST_BASE_MODELS or any(len(each or "") > _LONGEST_SAID for each in texts):
        yield "the source says too much of itself"
    sizes = [document["latents"][name] for name in ("default_height", "default_width")]
    if min(*sizes, *(document["latents"][n] for n in ("channels", "factor", "multiple"))) < 1:
        yield "latents must be positive"
    if document["latents"].get("minimum", 1) < 1:
        yield "latents.minimum must be positive"
    for each in document["latents"].get("bins") or []:
        if len(each) != 3 or not all(1 <= side <= 1 << 20 and side % 1 == 0 for side in each[1:]):
            yield "an entry of latents.bins is no ratio, height and width"
    if max(sizes) > _LARGEST_SIDE:
        yield "a default size is too large"
    if document["defaults"]["scheduler"] not in [each["name"] for each in document["schedules"]]:
        yield "an unknown default scheduler"
    yield from _result_problems(document)
    known = {each["name"] for each in document["arguments"]}
    if any(not set(vector["arguments"]) <= known for vector in document["vectors"]):
        yield "a vector of an unknown argument"
    names = {component["name"] for component in document["components"]}
    for build in document["builds"]:
        if build["artifacts"].keys() != names:
            yield f"{build['name']} has other components"
        for artifact in build["artifacts"].values():
            if artifact["entry"] not in [file["path"] for file in artifact["files"]]:
                yield f"{artifact['entry']} is not listed"
    for file in _files(document):
        yield from _file_problems(file)
    for each in document["tokenizers"]:
        if (words := each.get("vocabulary")) is not None and not 1 <= words <= 1 << 31:
            yield f"a vocabulary of {words}"
    for component in document["components"]:
        for spec in (*component["inputs"].values(), *component["outputs"].values()):
            if not all(map(_is_dimension, spec["shape"])):
                yield f"bad shape {spec['shape']}"


def _is_dimension(value: int | str) -> bool:
    if isinstance(value, int):
        return 1 <= value <= 1 << 20
    return bool(re.fullmatch(r"([1-9][0-9]{0,3}\*)?[a-z][a-z_]{0,31}", value))


def _file_problems(file: Mapping[str, Any]) -> Iterator[str]:
    text = file["path"]
    if any(part in ("", ".", "..") for part in text.split("/")):
        yield f"bad path {text!r}"
    if any(sign in text for sign in "\\:\0"):
        yield f"bad path {text!r}"
    if file["size"] < 0 or not re.fullmatch(r"[0-9a-f]{64}", file["sha256"]):
        yield f"{text}: bad size or hash"


def _files(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, dict):
        if node.keys() == {"path", "size", "sha256"}:
            yield node
        for value in node.values():
            yield from _files(value)
    elif isinstance(node, list):
        for value in node:
            yield from _files(value)
