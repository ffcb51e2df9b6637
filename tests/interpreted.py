"""What a call gives, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.pipeline import Pipeline


def by_run(pipe: Pipeline, call: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return latents and images of a call."""
    result = pipe(**call)
    return result.latents, np.stack([np.asarray(each) for each in result.images])
