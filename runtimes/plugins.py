"""What installed packages offer by entry points, and importing it."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def entry_points(group: str) -> dict[str, str]:
    """Name → ``"module:attribute"``. Looking for them costs milliseconds, nothing is imported."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=group)}


def resolve(reference: str) -> Any:
    """Import what ``"module:attribute"`` names; raises whatever the package does on import."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
