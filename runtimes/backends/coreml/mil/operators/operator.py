"""The form of an operator of MIL: a function of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Operator: TypeAlias = Callable[..., Any]
