"""The arguments of `latentc.runtimes.pipeline.pipeline.load`, checked before any file is read: what
they are, not whether a bundle or an engine takes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.bundle.sizes import BINNING
from latentc.runtimes.calls.values import number
from latentc.runtimes.errors import InputError, shown
from latentc.runtimes.options import complete
from latentc.runtimes.presets.load_arguments import LoadArguments


def checked(arguments: Mapping[str, Any]) -> LoadArguments:
    """Return all arguments, defaults included.

    Raises:
        InputError: an unknown name, or an argument of another type or out of its range.
    """
    how = cast(LoadArguments, complete(LoadArguments, arguments))
    if not isinstance(how["backend"], str | Backend | None):
        raise InputError(
            f"'backend' must be a name or an instance of a Backend, not {shown(how['backend'])}"
        )
    how["threads"] = int(how["threads"])
    if arguments.get("cache", True) is None:
        how["cache"] = False
    if not isinstance(how["cache"], bool):
        how["cache"] = path("cache", how["cache"])
    if not isinstance(how["static"], bool):
        _check_static(how["static"])
    _check_mapping("options", how["options"], "the engine's names and their values, as texts")
    for option, text in (how["options"] or {}).items():
        if not isinstance(text, str):
            raise InputError(f"'options': {option!r} must be a text, not {shown(text)}")
    return how


def _check_static(sizes: Any) -> None:
    """Raise InputError for what are no sizes."""
    _check_mapping("static", sizes, "sizes, such as {'height': 512}")
    for size, value in (sizes or {}).items():
        if size == BINNING:
            flag(f"static[{size!r}]", value)
            continue
        if number(f"static[{size!r}]", value) != int(value) and size in ("height", "width"):
            raise InputError(f"'static': {size} must be a whole number of pixels")


def path(name: str, value: Any) -> str:
    """Return a path as a text.

    Raises:
        InputError: it is none.
    """
    text = value if isinstance(value, str) else None
    if isinstance(value, os.PathLike):
        text = os.fspath(value)
    if not isinstance(text, str) or "\0" in text or not _encodable(text):
        raise InputError(f"{name!r} must be a path, not {shown(value)}")
    return text


def _encodable(text: str) -> bool:
    """Return whether the system's files can have such a name."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def flag(name: str, value: Any) -> None:
    """Raise InputError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name!r} must be True or False, not {shown(value)}")


def _check_mapping(name: str, value: Any, what: str) -> None:
    texts = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if value is not None and not texts:
        raise InputError(f"{name!r} must map {what}, not {shown(value)}")
