"""One rule for whatever is read from outside: it is good, or it gives a `LatentcError` that names
it.

Libraries raise what they like on damaged input: Pillow a SyntaxError or a struct.error, msgspec a
DecodeError, C code a MemoryError for a size that a file merely declares, Rust code a panic that is
no Exception. Every function that reads a file or a text from outside is therefore marked `parser`,
which turns all of that into one error. `PARSERS` lists them, for tests that feed them damaged
input; a test sees to it that no file is decoded outside of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from latentc.runtimes.errors import LatentcError, first_line

_GENERATOR = 0x20  # inspect's, which takes long to import
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Parser:
    """A function that reads something from outside.

    Attributes:
        function: the function as callers see it.
        error: what it raises on damaged input, or a subclass of it.
        source: the name of the parameter that holds the input or the path to it.
    """

    function: Callable[..., Any]
    error: type[LatentcError]
    source: str


PARSERS: dict[str, Parser] = {}  # "module:qualified name" → parser, as modules are imported


def parser(
    error: type[LatentcError], source: str, what: str
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Mark a function that reads something from outside, and make it raise `error` for whatever
    goes wrong inside.

    A `LatentcError` of the function's own passes unchanged. On class and static methods, this
    decorator goes below ``@classmethod``.

    Args:
        error: what becomes of any other exception.
        source: the name of the parameter that holds the path or the text; errors quote its value.
        what: what the input should be, with its article, such as ``"a recipe"``.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        code: Any = function.__code__
        if code.co_flags & _GENERATOR:
            raise TypeError(f"{function.__qualname__} is a generator, which would run unguarded")
        names = code.co_varnames[: code.co_argcount]
        place = names.index(source)
        defaults: tuple[Any, ...] = function.__defaults__ or ()
        default = dict(zip(reversed(names), reversed(defaults), strict=False)).get(source)

        @wraps(function)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given = args[place] if place < len(args) else kwargs.get(source, default)
            with parsing(given, error, what):
                return function(*args, **kwargs)

        PARSERS[f"{function.__module__}:{function.__qualname__}"] = Parser(guarded, error, source)
        return guarded

    return decorate


@contextmanager
def parsing(source: object, error: type[LatentcError], what: str) -> Iterator[None]:
    """Inside, any exception but a `LatentcError` becomes `error`, which quotes `source` and says
    that it is not `what`."""
    try:
        yield
    except LatentcError:
        raise
    except Exception as cause:
        raise error(f"{_quoted(source)}: not {what}: {reason(cause)}") from cause
    except BaseException as cause:
        # A panic of Rust code derives from BaseException, as a Ctrl-C does.
        if type(cause).__name__ != "PanicException":
            raise
        raise error(f"{_quoted(source)}: not {what}: {reason(cause)}") from cause


def reason(cause: BaseException) -> str:
    """Return why something could not be read, in a few words."""
    match cause:
        case FileNotFoundError():
            return "no such file"
        case OSError() if cause.strerror:
            return cause.strerror
        case RecursionError():
            return "it is nested too deeply"
        case MemoryError():
            return "it declares more than the memory holds"
        case ValueError() | OSError():
            return first_line(cause)
        case _:
            line, name = first_line(cause), type(cause).__name__
            return line if line == name else f"{name}: {line}"


def _quoted(source: object) -> str:
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    text = str(source)
    return text if len(text) <= 300 else f"{text[:300]}…"
