"""Importing coremltools without its remarks about what else is installed."""

from __future__ import annotations

import logging
from typing import Any


def load_toolkit() -> Any:
    """Return the module ``coremltools``. Raises ImportError where it is not installed."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools

    return coremltools
