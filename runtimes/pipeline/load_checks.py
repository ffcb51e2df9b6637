"""The arguments of `latentc.runtimes.pipeline.pipeline.load`, checked before any file is read: what
they are, not whether a bundle or an engine takes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.bundle.sizes import BINNING
from latentc.runtimes.calls.values import integer, number, shown
from latentc.runtimes.errors import InputError
from latentc.runtimes.presets.preset import Asked

_MOST_THREADS = 4096
_TEXTS = ("device", "build", "precision", "compute")


def checked_asked(asked: Asked) -> Asked:
    """Return what was asked for, with `threads` as a plain integer.

    Raises:
        InputError: an argument of another type, or out of its range.
    """
    if not isinstance(asked.backend, str | Backend | None):
        raise InputError(
            f"'backend' must be a name or an instance of a Backend, not {shown(asked.backend)}"
        )
    for name in _TEXTS:
        optional_text(name, getattr(asked, name))
    flag("compile", asked.compile)
    threads = integer("threads", asked.threads)
    if not 0 <= threads <= _MOST_THREADS:
        raise InputError(f"'threads' must be from 0 (the engine's choice) to {_MOST_THREADS}")
    _check_mapping("static", asked.static, "sizes, such as {'height': 512}")
    for size, value in (asked.static or {}).items():
        if size == BINNING:
            flag(f"static[{size!r}]", value)
            continue
        if number(f"static[{size!r}]", value) != int(value) and size in ("height", "width"):
            raise InputError(f"'static': {size} must be a whole number of pixels")
    _check_mapping("options", asked.options, "the engine's names and their values, as texts")
    for option, text in (asked.options or {}).items():
        if not isinstance(text, str):
            raise InputError(f"'options': {option!r} must be a text, not {shown(text)}")
    return replace(asked, threads=threads)


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
    """Whether the system's files can have such a name."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def flag(name: str, value: Any) -> None:
    """Raise InputError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name!r} must be True or False, not {shown(value)}")


def optional_text(name: str, value: Any) -> None:
    """Raise InputError for what is neither a text nor None."""
    if not isinstance(value, str | None):
        raise InputError(f"{name!r} must be a text, not {shown(value)}")


def _check_mapping(name: str, value: Any, what: str) -> None:
    texts = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if value is not None and not texts:
        raise InputError(f"{name!r} must map {what}, not {shown(value)}")
