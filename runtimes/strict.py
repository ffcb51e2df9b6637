"""This module holds what the structures of the manifest have in common."""

from __future__ import annotations

import msgspec

from latentc.runtimes.errors import BundleError


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable, compared by value; unknown fields are refused."""


def readable(document: msgspec.Struct, indent: int = 2) -> bytes:
    """Return a structure as indented JSON with a final newline, which decodes to the structure.

    Raises:
        BundleError: it does not: a number is NaN or infinite, or a value has another type.
    """
    data = msgspec.json.format(msgspec.json.encode(document), indent=indent) + b"\n"
    try:
        msgspec.json.decode(data, type=type(document))
    except msgspec.DecodeError as error:
        kind = type(document).__name__.lower()
        raise BundleError(f"a {kind} that could not be read is not written: {error}") from error
    return data
