"""The form of an operator of MIL: a function of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Operator: TypeAlias = Callable[..., Any]
