"""What the structures of the manifest have in common."""

from __future__ import annotations

import msgspec


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable, compared by value; unknown fields are refused."""
