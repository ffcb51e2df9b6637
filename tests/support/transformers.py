"""Bundles of the tiny transformers, which several files of tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from latentc.exporter.compiler.export import export
from tests.conftest import KEPT, one_at_a_time

STEPS = 4
_BOTH = {"targets": ("onnx", "openvino")}
_WITH_COREML = {"targets": ("onnx", "openvino", "coreml")}
_IMAGES = {"tasks": ("image-to-image", "inpainting")}
# Per bundle: the pipeline, and what it is exported with.
FROM_TEXT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pixart-alpha": ("pixart-alpha", _BOTH),
    "pixart-sigma": ("pixart-sigma", _WITH_COREML),
    "sd3": ("sd3-shifted", {**_BOTH, **_IMAGES}),
    "sd3-without": ("sd3", {**_WITH_COREML, "without": ("text_encoder_3",)}),
    "flux-dev": ("flux-dev", {**_BOTH, **_IMAGES}),
    "flux-schnell": ("flux-schnell", _BOTH),
}
# Trained for inpainting: they do nothing else.
BUNDLES = {
    **FROM_TEXT,
    "sd3-masks": ("sd3-masks", _BOTH),
    "flux-fill": ("flux-fill", _BOTH),
}


@cache
def exported(name: str, pipeline_folder: Callable[[str], Path]) -> Path:
    """The verified bundle of this name in `BUNDLES`."""
    pipeline, options = BUNDLES[name]
    folder = KEPT / "bundles" / f"transformers-{name}"
    with one_at_a_time(f"bundle-transformers-{name}"):
        export(pipeline_folder(pipeline), folder, steps=(STEPS,), overwrite=True, **options)
    return folder
