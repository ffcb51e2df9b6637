"""The name of numpy's arrays in signatures; shapes and dtypes stand in docstrings."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
