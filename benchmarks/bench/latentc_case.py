"""This loads and calls a case of latentc's, in the same way when it is planned and when it is run.

A request is what a worker is told: `case`, `negative_prompt`, `guidance_scale` and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentc.runtimes.calls.signature import Signature
from latentc.runtimes.errors import InputError
from latentc.runtimes.pipeline.loading import Loading, chosen


def loading(bundle: str, request: Mapping[str, Any]) -> Loading:
    """Choose and check how a case is loaded; nothing is.

    Raises:
        InputError: an option that the bundle or the engine cannot be asked for.
        BackendError: an engine or device that is not here.
    """
    case = request["case"]
    static = None
    if case["static"]:
        static = {"images": case["batch"], "height": case["height"], "width": case["width"]}
        if request["guidance_scale"] is not None:
            static["guidance_scale"] = request["guidance_scale"]
    how = {
        "backend": case["backend"] or None,
        "device": case["device"] or None,
        "build": case["variant"],
        "static": static,
        "cache": not case["no_cache"],
        **{name: case[name] for name in ("threads", "compute", "compile", "options", "low_memory")},
    }
    return chosen(bundle, how)


def arguments(
    request: Mapping[str, Any],
    signature: Signature,
    prompt: Any,
    steps: int,
    seed: Any,
    guidance: float | None,
) -> dict[str, Any]:
    """Return the arguments of a call: one prompt as often as the case's batch says, or several.

    Raises:
        InputError: the bundle makes videos, or needs a number for each image, which nothing says
            here.
    """
    case, many = request["case"], isinstance(prompt, list)
    found: dict[str, Any] = {"height": case["height"], "width": case["width"], **case["call"]}
    found |= {"num_inference_steps": steps, "seed": seed}
    if signature.makes_videos:
        raise InputError("latentc bench compares images, and this bundle makes videos")
    if signature.needed_rows:
        raise InputError(
            "latentc bench compares calls of texts, or of nothing: this bundle needs "
            f"{', '.join(map(repr, signature.needed_rows))}"
        )
    if not signature.texts:
        return {**found, "batch_size": case["batch"]}
    found |= {"prompt": prompt, "num_images_per_prompt": 1 if many else case["batch"]}
    if request["negative_prompt"] is not None and not many:
        found["negative_prompt"] = request["negative_prompt"]
    if guidance is not None:
        found["guidance_scale"] = guidance
    return found
