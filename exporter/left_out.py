"""What the diffusers pipeline has and its bundle does not, and what follows from that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from exporter.classes import CLASSES, record_of
from runtimes.errors import InputError
from runtimes.manifest import LeftOut

WATERMARK = "watermark"
# How the classes begin that take an add_watermarker, and the one that does not.
_WATERMARKED, _UNMARKED = "StableDiffusionXL", "StableDiffusionXLAdapterPipeline"
# Parts that no graph is made of. Not loading them saves 1.2 GB for Stable Diffusion.
_UNUSED: Mapping[str, str] = {
    "safety_checker": "images are not checked, and none is made black: bundles cannot run it yet",
    "feature_extractor": "it prepares images for the safety checker or an image encoder alone",
    "image_encoder": "it is for IP-Adapters alone, which come with one (--ip-adapter)",
    "watermarker": "images have no watermark: bundles cannot put one into them",
    WATERMARK: "images have no invisible watermark; diffusers adds it where the package "
    "invisible-watermark is installed",
}
_ASKED = "the pipeline works without it"


def unused(class_name: str) -> list[str]:
    """Return the parts that no graph of this pipeline class needs."""
    return [name for name in _UNUSED if name not in record_of(class_name).needs]


def check(without: Collection[str]) -> None:
    """Refuse what no pipeline can be exported without, whatever the source is.

    Raises:
        InputError: naming it, and what can be left out.
    """
    if not without:
        return
    known = [*_UNUSED, *dict.fromkeys(n for each in CLASSES.values() for n in each.may_lack)]
    for name in without:
        if name not in known:
            raise InputError(
                f"--without {name}: no pipeline can be exported without it; what may be left out: "
                f"{', '.join(known)}"
            )


def present(class_name: str, index: Mapping[str, Any]) -> list[str]:
    """Return those of `unused` that a pipeline has.

    Args:
        index: its model_index.json; a part that it was saved without has null for a class.
    """
    named = [
        name
        for name in unused(class_name)
        if isinstance(index.get(name), list) and index[name][-1] is not None
    ]
    marked = class_name.startswith(_WATERMARKED) and class_name != _UNMARKED
    marked = marked and WATERMARK not in named
    return [*named, *([WATERMARK] if marked else [])]


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
        LeftOut(name, _ASKED, True) for name in record_of(class_name).may_lack if name in without
    ]
    return (*unasked, *asked)
