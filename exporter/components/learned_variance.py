"""Schedulers whose noise has a variance that the model says."""

from __future__ import annotations

import inspect

from diffusers import SchedulerMixin

VARIANCE = "variance_type"  # of a scheduler's config


def learns_variance(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler's noise has a variance that the model says, between two limits."""
    own = getattr(scheduler, "_get_variance", None)
    reads = own is not None and "predicted_variance" in inspect.signature(own).parameters
    return reads and scheduler.config.get(VARIANCE) == "learned_range"
