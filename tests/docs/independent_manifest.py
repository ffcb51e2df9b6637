"""The manifest's part of the independent reader: it checks a document by the tables of
docs/bundle-format.md themselves, and fills in their defaults. It imports nothing of latentc."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tests.docs.independent_program import Refused, expect, loops_of, problems, types_of

_P = ParamSpec("_P")
_R = TypeVar("_R")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "bundle-format.md"
_LARGEST = 16 << 20  # bytes of a manifest (section 3)
_DEVICES = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(\.|\Z)")
_NAMES = {"components", "builds", "schedules", "programs", "tokenizers"}


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
    real = os.path.realpath(path)
    expect(Path(real).is_relative_to(os.path.realpath(root)), f"{path.name} leads out")
    status = os.stat(real)
    expect(stat.S_ISREG(status.st_mode), f"{path.name} is no regular file")
    expect(status.st_size <= limit, f"{path.name}: {status.st_size} bytes")
    return Path(real).read_bytes()


@refusing
def checked(root: Path, file: Mapping[str, Any]) -> Path:
    """Return the path of a listed file after all checks (section 4)."""
    data = read_inside(root, root / file["path"], file["size"])
    expect(len(data) == file["size"], f"{file['path']}: {len(data)} bytes")
    expect(hashlib.sha256(data).hexdigest() == file["sha256"], f"{file['path']}: another hash")
    return Path(os.path.realpath(root / file["path"]))


def _no_number(text: str) -> float:
    raise Refused(f"{text} is no JSON")


def read_json(data: bytes) -> Any:
    """Return a document that has no numbers beyond float64, and no others than JSON's."""
    document = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    json.dumps(document, allow_nan=False, ensure_ascii=False).encode("utf-8")
    return document


@refusing
def read_manifest(root: Path) -> dict[str, Any]:
    """Return the checked manifest, with all defaults (sections 2 to 5)."""
    document: dict[str, Any] = read_json(read_inside(root, root / "manifest.json", _LARGEST))
    version = document["format_version"]
    expect(version == 2 and type(version) is int, f"unknown format_version {version!r}")
    expect(document.get("needs", []) == [], "the bundle needs another reader")
    _check(document, "Manifest", "manifest")
    for problem in _problems(document):
        raise Refused(problem)
    for program in document["programs"]:
        for problem in problems(program):
            raise Refused(f"{program['name']}: {problem}")
        for size in ("default", "least"):
            symbols = {name: each[size] for name, each in program["symbols"].items()}
            types_of(program, document, symbols)
    return document


# The tables of the document, by structure: member, type and default (None where it is required)


@cache
def structures() -> dict[str, dict[str, tuple[str, str | None]]]:
    """Return the members of each structure."""
    found: dict[str, dict[str, tuple[str, str | None]]] = {}
    for line in DOCUMENT.read_text("utf-8").splitlines():
        if row := re.match(r"\| \*\*(\w+)\*\* \| (.*?) ?\| ", line):
            named = re.findall(r"`(\w+)`: (.*?)(?:, (?=`)|$)", row[2])
            found[row[1]] = {name: (kind, None) for name, kind in named}
            if row[2] and not named:
                found[row[1]] = {"|": (row[2], None)}
        elif row := re.match(r"\| (`.*?`) \| (.+?) \| (yes|no, `(.*?)`) \| ", line):
            last = found[[*found][-1]]
            last |= dict.fromkeys(re.findall(r"`(\w+)`", row[1]), (row[2], row[4]))
    return found


def _check(value: Any, kind: str, where: str) -> None:
    expect(_fits(value, kind, where), f"{where}: expected {kind}, found {str(value)[:80]}")


def _fits(value: Any, kind: str, where: str) -> bool:
    """Return whether a value is of a type as the document writes it."""
    of = re.fullmatch(r"(array|map) of \(?(.*?)\)?", kind)
    if of and isinstance(value, list if of[1] == "array" else dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check(item, of[2], f"{where}.{key}")
    if of:
        return isinstance(value, list if of[1] == "array" else dict)
    if " or " in kind:
        return any(_fits(value, each, where) for each in kind.split(" or "))
    members = structures().get(kind)
    if members is not None:
        return _is_structure(value, members, where)
    if kind[0] == '"':
        return bool(value == json.loads(kind))
    types = {"object": dict, "string": str, "boolean": bool, "null": type(None), "integer": int}
    exact = kind != "integer" or not isinstance(value, int) or abs(value) <= 2**53
    return type(value) in ([int, float] if kind == "number" else [types[kind]]) and exact


def _is_structure(value: Any, members: Mapping[str, tuple[str, str | None]], where: str) -> bool:
    if not isinstance(value, dict):
        return False
    if "|" in members:  # one of several structures, told apart by its first member
        kinds = members["|"][0].split(" or ")
        own = [each for each in kinds if _is_of(value, *next(iter(structures()[each].items())))]
        return len(own) == 1 and _fits(value, own[0], where)
    expect(value.keys() <= members.keys(), f"{where}: unknown {value.keys() - members.keys()}")
    for name, (kind, default) in members.items():
        expect(name in value or default is not None, f"{where}: {name} is missing")
        _check(value.setdefault(name, json.loads(default or "null")), kind, f"{where}.{name}")
    return True


def _is_of(value: Mapping[str, Any], name: str, member: tuple[str, str | None]) -> bool:
    return bool(value.get(name) == json.loads(member[0]))


# Rules beyond types


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    for member in _NAMES:
        names = [each["name"] for each in document[member]]
        if len(set(names)) < len(names):
            yield f"two {member} are named alike"
    components = {component["name"] for component in document["components"]}
    loops = [loop for program in document["programs"] for loop in loops_of(program)]
    fixed = {loop["plan"]["fixed"] for loop in loops} - {None}
    schedules = {each["name"] for each in document["schedules"]}
    if document["defaults"]["scheduler"] not in schedules - fixed or not fixed <= schedules:
        yield "an unknown default scheduler, or one that a loop follows"
    for build in document["builds"]:
        files = {n: [file["path"] for file in a["files"]] for n, a in build["artifacts"].items()}
        if files.keys() != components:
            yield f"{build['name']} has other components"
        if any(a["entry"] not in files[n] for n, a in build["artifacts"].items()):
            yield f"an entry of {build['name']} is not listed"
    models = document["source"]["base_model"]
    said = [*models, document["source"]["licence"] or "", document["source"]["author"] or ""]
    if len(models) > 32 or any(len(text) > 200 for text in said):
        yield "the source says too much of itself"
    for each in document["tokenizers"]:
        words = each["vocabulary"] or 0 if each["vocabulary"] is not None else 2**31
        ids, length = [*each["before"], *each["after"], each["pad"]], each["max_length"]
        if not (0 < words <= 2**31 and len(ids) - 1 <= length <= 2**16 and length > 0):
            yield f"tokenizer {each['name']}: bad length or vocabulary"
        if not all(0 <= number < words for number in ids):
            yield f"tokenizer {each['name']}: ids beyond the vocabulary"
    programs = document["programs"]
    images = {
        frozenset(a["name"] for a in program["arguments"] if a["kind"] in ("image", "mask"))
        for program in programs
    }
    if not 1 <= len(programs) <= 16 or len(images) < len(programs):
        yield "no programs, too many, or two that take the same images"
    yield from _record_problems(document)
    steps = [step for program in programs for step in program["steps"]]
    used = {step.get("component") or step.get("denoiser") for step in steps}
    for loop in loops:
        parts = (loop["cache"], loop["combine"], *loop["switches"])
        used |= {part["component"] for part in parts if part}
    if components - used:
        yield f"no program uses some of {components}"
    for component in document["components"]:
        for output, columns in component["positions"].items():
            forms = [[*component["inputs"][n]["shape"], sum(columns.values())] for n in columns]
            right = columns and min(columns.values()) > 0
            if not right or any(form != component["outputs"][output]["shape"] for form in forms):
                yield f"{component['name']}: bad positions of {output}"
        for spec in (*component["inputs"].values(), *component["outputs"].values()):
            sizes = [s for s in spec["shape"] if isinstance(s, int) and not 1 <= s <= 2**20]
            words = [s for s in spec["shape"] if isinstance(s, str)]
            known = spec["dtype"] in ("float32", "float16", "int64", "int32")
            form = r"([1-9][0-9]{0,3}\*)?[a-z][a-z_]{0,31}([+-][1-9][0-9]{0,5})?"
            if (
                len(spec["shape"]) > 8
                or sizes
                or not known
                or not all(re.fullmatch(form, word) for word in words)
            ):
                yield f"{component['name']}: bad dtype or shape {spec}"
    for name in [each["name"] for each in (*document["builds"], *document["schedules"])]:
        if not _is_path(name) or "/" in name:
            yield f"the name {name!r} is none of a file"
    artifacts = [a for build in document["builds"] for a in build["artifacts"].values()]
    for key in [each["key"] for each in (*artifacts, *document["schedules"])]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}", key):
            yield f"bad key {key!r}"
    for file in files_of(document):
        if not _is_path(file["path"]):
            yield f"bad path {file['path']!r}"
        if file["size"] < 0 or not re.fullmatch(r"[0-9a-f]{64}", file["sha256"]):
            yield f"{file['path']}: bad size or hash"


def _record_problems(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the record of programs next to diffusers (section 3)."""
    known = {each["name"] for each in document["programs"]}
    names = [each["program"] for each in document["programs_checked"]]
    if {*names} - known or len({*names}) < len(names):
        yield "a record of no program, or two of one"
    for record in document["programs_checked"]:
        if not 1 <= len(record["calls"]) <= 16:
            yield f"{len(record['calls'])} calls of {record['program']}"
        for call in record["calls"]:
            prompts, images = call["prompts"], call["images"]
            error, refused = call["relative_l2"], call["refused"]
            within = 1 <= prompts <= 64 and 1 <= images <= 64 and 0 <= call["given"] <= 64
            if not within or len(call["seeds"]) not in (1, prompts * images):
                yield f"{record['program']}: bad numbers of prompts, images or seeds"
            if min(call["tolerance"], error or 0) < 0 or (error is None) == (refused is None):
                yield f"{record['program']}: bad error or limit"
            if len(refused or "") > 300:
                yield f"{record['program']}: diffusers says too much"


def _is_path(text: str) -> bool:
    parts = text.split("/")
    plain = not re.search(r"[\\:\0]", text) and not any(map(_DEVICES.match, parts))
    return plain and not any(not part or part[-1] in ". " for part in parts)


def files_of(node: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all files that a document lists."""
    if isinstance(node, dict) and node.keys() == {"path", "size", "sha256"}:
        yield node
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in inner:
        yield from files_of(value)
