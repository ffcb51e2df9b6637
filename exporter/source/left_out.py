"""Says what the diffusers pipeline has and its bundle does not, and what follows from that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from latentc.exporter.classes import CLASSES, record_of
from latentc.exporter.components.names import SAFETY_CHECKER, WATERMARK
from latentc.runtimes.bundle.structures import LeftOut
from latentc.runtimes.errors import InputError
from latentc.runtimes.unknown_names import suggestion

# How the classes begin that take an add_watermarker, and the one that does not.
_WATERMARKED, _UNMARKED = "StableDiffusionXL", "StableDiffusionXLAdapterPipeline"
# Parts that graphs are usually made without. Not loading them saves 1.2 GB for Stable Diffusion.
_UNUSED: Mapping[str, str] = {
    SAFETY_CHECKER: "images are not checked, and none is made black",
    "feature_extractor": "it prepares images for the safety checker or an image encoder alone",
    "prior_image_processor": "it is for images in the place of texts, which bundles do not take",
    "image_encoder": "it is for IP-Adapters alone, which come with one (--ip-adapter)",
    "watermarker": "images have no watermark: bundles cannot put one into them",
    WATERMARK: "images have no invisible watermark (--watermark); diffusers adds it where the "
    "package invisible-watermark is installed",
}
OTHER_PARTS = tuple(_UNUSED)
_ASKED = "the pipeline works without it"


def unused(class_name: str, index: Mapping[str, Any], single_file: bool = False) -> list[str]:
    """Return the parts that no graph needs of a pipeline.

    Args:
        index: its model_index.json.
        single_file: its weights are in a checkpoint of one file, which has no safety checker.
    """
    record = record_of(class_name)
    used = {*record.needs}
    for name, parts in record.may_lack.items():
        if _has(index, name) and not (single_file and name == SAFETY_CHECKER):
            used.update(parts)
    return [name for name in _UNUSED if name not in used]


def _has(index: Mapping[str, Any], name: str) -> bool:
    """Return whether a pipeline was saved with a part: without it, null stands for its class."""
    return isinstance(index.get(name), list) and index[name][-1] is not None


def check(without: Collection[str]) -> None:
    """Refuse what no pipeline can be exported without, whatever the source is.

    Raises:
        InputError: naming it, and what can be left out.
    """
    if not without:
        return
    lacked = (name for each in CLASSES.values() for name in each.may_lack)
    known = [*dict.fromkeys((*_UNUSED, *lacked))]
    for name in without:
        if name not in known:
            hint = suggestion(name, known, "what may be left out")
            raise InputError(f"--without {name}: no pipeline can be exported without it; {hint}")


def present(class_name: str, index: Mapping[str, Any], single_file: bool = False) -> list[str]:
    """Return those of `unused` that a pipeline has; the arguments are the same."""
    named = [name for name in unused(class_name, index, single_file) if _has(index, name)]
    marked = takes_watermark(class_name) and WATERMARK not in named
    return [*named, *([WATERMARK] if marked else [])]


def takes_watermark(class_name: str) -> bool:
    """Return whether a diffusers class puts an invisible watermark into images, where it has the
    package."""
    return class_name.startswith(_WATERMARKED) and class_name != _UNMARKED


def left_out(
    class_name: str, found: Sequence[str], without: Collection[str]
) -> tuple[LeftOut, ...]:
    """Return what a bundle of the class does without.

    Args:
        found: see `present`.
        without: what was asked to be left out.
    """
    unasked = [LeftOut(name, _UNUSED[name], name in without) for name in found]
    asked = [
        LeftOut(name, _UNUSED.get(name, _ASKED), True)
        for name in record_of(class_name).may_lack
        if name in without and name not in found
    ]
    return (*unasked, *asked)
