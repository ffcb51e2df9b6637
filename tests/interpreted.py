"""Calls by their program, beside the same calls by a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes import image
from runtimes.interpreter.loaded import Programs
from runtimes.pipeline import Pipeline


def by_run(pipe: Pipeline, call: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Latents and images of a call."""
    result = pipe(**call)
    return result.latents, np.stack([np.asarray(each) for each in result.images])


def by_program(pipe: Pipeline, call: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Latents and images of a call, as its program makes them."""
    execution = Programs.of(pipe).execution(call)
    emitted = execution.finish()
    latents = execution.values["denoised"].array
    if not emitted:
        return latents, latents
    (array,) = emitted.values()
    output_type, overlay = execution.call.output_type, execution.call.images.overlay
    images = image.to_pil(array) if output_type == "pil" else image.to_numpy(array)
    made = images if overlay is None else overlay.put(images)
    return latents, np.stack([np.asarray(each) for each in made])
