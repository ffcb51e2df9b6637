"""What is named by an id on the Hub, where no file or folder of that name is here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtimes.errors import SourceError
from runtimes.session import first_line


def is_id(place: str, inside: bool = False) -> bool:
    """Return whether a text may be ``OWNER/NAME``, or ``OWNER/NAME/PATH`` with `inside`."""
    pieces = place.split("/")
    fits = len(pieces) >= 2 if inside else len(pieces) == 2
    return fits and all(pieces) and not place.startswith((".", "~"))


def fetch(place: str, what: str, kind: str, get: Callable[[], str], inside: bool = False) -> Path:
    """Where `get` has put what ``OWNER/NAME`` names.

    Args:
        what: was looked for, and `kind` what it would be here ("file", "folder"), for errors.
        inside: ``OWNER/NAME/PATH`` may be asked for as well.

    Raises:
        SourceError: it is no id, or it could not be had.
    """
    if not is_id(place, inside):
        raise SourceError(f"no such {what}: {place}")
    try:
        return Path(get())
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{place} is no {kind} here, and it could not be had from the Hub: {first_line(error)}"
        ) from error
