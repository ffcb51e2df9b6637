"""This module tells which sources decide what modules make.

They are their own, those of the modules that they import, and so on.

Imports are read from the sources; nothing is imported for it. Imports inside functions count, those
for types alone (``if TYPE_CHECKING:``) do not. Modules of latentc and of the package that a module
belongs to are followed, libraries are not: their versions stand in keys. A registry that imports by
a name from a table cuts the closure; whoever takes something from a registry names the module that
it got.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import all_suffixes
from importlib.util import find_spec
from pathlib import Path

_OURS = __name__.partition(".")[0]
_PACKAGE = "__init__.py"
# A block of imports for types: it ends where a line is indented no deeper.
_FOR_TYPES = re.compile(
    r"^([ \t]*)if (?:\w+\.)?TYPE_CHECKING:[^\n]*(?:\n(?:\1[ \t]+[^\n]*|[ \t]*(?:#[^\n]*)?))*",
    re.MULTILINE,
)
_IMPORT = re.compile(
    r"(?:^|[;:])[ \t]*(?:"
    r"from[ \t]+(?P<package>\.*[ \t]*[\w.]*)[ \t]*import[ \t]*"
    r"(?P<names>\((?:[^()#]|#[^\n]*)*\)|[^\n#;(]+)"
    r"|import[ \t]+(?P<modules>[\w., \t]+))",
    re.MULTILINE,
)
_COMMENT = re.compile(r"#[^\n]*")


@dataclass(frozen=True)
class _Source:
    """This is what a module's source says: its digest, and the modules that it imports of latentc
    and of the package that it belongs to, the package around it included."""

    sha256: str
    modules: frozenset[str]


@cache
def code(*modules: str) -> str:
    """Return the SHA-256 over the sources of all modules that decide what the named ones make.

    Raises:
        ModuleNotFoundError: a named module has no file.
    """
    total = hashlib.sha256()
    for module in closure(*modules):
        total.update(f"{module} {_source(module).sha256}\n".encode())
    return total.hexdigest()


def closure(*modules: str) -> list[str]:
    """Return the names of all modules whose sources decide what the named ones make, in
    alphabetical order.

    Raises:
        ModuleNotFoundError: a named module has no file.
    """
    for module in modules:
        if _file(module) is None:
            raise ModuleNotFoundError(f"no source of module {module!r} was found", name=module)
    reached = set(modules)
    waiting = list(reached)
    while waiting:
        further = _source(waiting.pop()).modules - reached
        reached |= further
        waiting += further
    return sorted(reached)


def imported_names(text: str, package: str) -> Iterator[str]:
    """Yield the full name of everything that a source imports: of ``c`` out of ``a.b`` both ``a.b``
    and ``a.b.c``, whether ``c`` is a module or not.

    Args:
        package: the name of the package that relative imports start from.
    """
    text = _FOR_TYPES.sub("", text.replace("\\\n", " "))
    for match in _IMPORT.finditer(text):
        if match["modules"]:
            yield from (each.split()[0] for each in match["modules"].split(",") if each.strip())
            continue
        base = _absolute(match["package"].replace(" ", ""), package)
        yield base
        names = _COMMENT.sub("", match["names"].strip("()"))
        yield from (f"{base}.{each.split()[0]}" for each in names.split(",") if each.strip())


def read_source(file: Path) -> bytes:
    """Return the content of a module's file."""
    return file.read_bytes()


@cache
def _source(module: str) -> _Source:
    """Return what a module's file says; one that is compiled says nothing of its imports."""
    file = _file(module)
    assert file is not None
    data = read_source(file)
    around = module.rpartition(".")[0]
    names = {around}
    if file.suffix == ".py":
        package = module if file.name == _PACKAGE else around
        names |= set(imported_names(data.decode("utf-8", "replace"), package))
    followed = {_OURS, _top(module)}
    modules = {name for name in names if _top(name) in followed and _file(name) is not None}
    return _Source(hashlib.sha256(data).hexdigest(), frozenset(modules))


@cache
def _file(module: str) -> Path | None:
    """Return a module's file, None where there is no such module, or it has no file."""
    parent, _, name = module.rpartition(".")
    if not parent:
        spec = find_spec(name) if name else None
        return Path(spec.origin) if spec and spec.has_location and spec.origin else None
    for folder in _folders(parent):
        there = _content(folder)
        if name in there and (folder / name / _PACKAGE).is_file():
            return folder / name / _PACKAGE
        for suffix in all_suffixes():
            if name + suffix in there:
                return folder / (name + suffix)
    return None


@cache
def _folders(package: str) -> tuple[Path, ...]:
    """Return where the modules of a package are; a namespace package may be in several places."""
    parent, _, name = package.rpartition(".")
    if parent:
        return tuple(folder / name for folder in _folders(parent) if name in _content(folder))
    spec = find_spec(package)
    return tuple(map(Path, spec.submodule_search_locations or ())) if spec else ()


@cache
def _content(folder: Path) -> frozenset[str]:
    """Return the names of what is in a folder."""
    return frozenset(each.name for each in folder.iterdir()) if folder.is_dir() else frozenset()


def _absolute(package: str, own: str) -> str:
    """Return the full name of the package in ``from … import``, seen from the package `own`."""
    name = package.lstrip(".")
    for _ in range(len(package) - len(name) - 1):
        own = own.rpartition(".")[0]
    return ".".join(filter(None, (own, name))) if package.startswith(".") else name


def _top(module: str) -> str:
    return module.partition(".")[0]
