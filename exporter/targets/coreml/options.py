"""This module says what can be asked of a Core ML export, and which image sizes follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypedDict

from latentc.exporter.targets.options import TargetOptions
from latentc.runtimes.bundle.sizes import smallest_side
from latentc.runtimes.errors import InputError
from latentc.runtimes.options import Option
from latentc.runtimes.programs.latents import Latents

# Deployment targets by either system's name → coremltools' name for them.
DEPLOYMENT_TARGETS: Mapping[str, str] = {
    "iOS16": "iOS16",
    "iOS17": "iOS17",
    "iOS18": "iOS18",
    "iOS26": "iOS26",
    "macOS13": "iOS16",
    "macOS14": "iOS17",
    "macOS15": "iOS18",
    "macOS26": "iOS26",
}
# --coreml-attention → the passes that make it.
ATTENTION: Mapping[str, tuple[str, ...]] = {
    "original": (),
    "split_einsum": ("split_einsum_attention",),
    "split_einsum_v2": ("split_einsum_v2_attention",),
}
_SMALLEST_RANGE = 64  # latents; a range goes up to this side at least
_MAX_SIZES = 128  # Core ML's limit for enumerated shapes


class CoreMLArguments(TypedDict, total=False):
    """Options of an export to Core ML. Sizes are in pixels, as text: "" is a range of any."""

    coreml_target: Annotated[
        str,
        Option(
            "Core ML: oldest system that must load it; from iOS18 on, attention is one operator.",
            default="iOS16",
            choices=(*DEPLOYMENT_TARGETS,),
            see="coreml.md#options",
        ),
    ]
    coreml_attention: Annotated[
        str,
        Option(
            "Core ML: how attention is written; `split_einsum` head by head in the layout that "
            "suits the Neural Engine, `split_einsum_v2` with queries in chunks of 512 besides.",
            default="original",
            choices=(*ATTENTION,),
            see="coreml.md#options",
        ),
    ]
    coreml_sizes: Annotated[
        str,
        Option(
            "Core ML: image sizes to allow, such as `512x512,768x512` (width x height), or a range "
            "of both sides such as `256-1024`.",
            default="",
            usual="a range",
            metavar="SIZES",
            see="coreml.md#options",
        ),
    ]
    coreml_batch: Annotated[
        int,
        Option(
            "Core ML: rows per call; larger batches are split.",
            default=1,
            least=1,
            metavar="N",
            see="coreml.md#options",
        ),
    ]
    chunk_denoiser: Annotated[
        bool,
        Option(
            "Core ML: the denoiser as two packages, for the memory limits of iOS.",
            default=False,
            see="coreml.md#options",
        ),
    ]


@dataclass(frozen=True, init=False)
class CoreMLOptions(TargetOptions):
    """The options are what an export to Core ML was asked for."""

    ARGUMENTS: ClassVar[type] = CoreMLArguments
    values: CoreMLArguments

    def passes(self) -> tuple[str, ...]:
        return ATTENTION[self.values["coreml_attention"]]

    def check_alone(self, fixed: bool) -> None:
        if fixed and self.values["coreml_sizes"]:
            raise InputError("give either --coreml-sizes, or --height and --width")
        in_chunks = self.values["coreml_attention"] == "split_einsum_v2"
        needs_fixed = {
            "--chunk-denoiser": self.values["chunk_denoiser"],
            "--coreml-attention split_einsum_v2": in_chunks,
        }
        for what, asked in needs_fixed.items():
            if asked and not fixed:
                raise InputError(f"{what} needs a fixed size: give --height and --width")
        self.enumerated()
        low, high = _range(self.values["coreml_sizes"]) or (1, 1)
        if low > high:
            raise InputError(f"--coreml-sizes {self.values['coreml_sizes']}: the range is empty")

    def check(self, latents: Latents, fixed: bool) -> None:
        self.check_alone(fixed)
        unit = latents.factor * latents.multiple
        sides = [side for size in self.enumerated() for side in size] or [*self.bounds(latents)]
        largest = latents.factor * (latents.maximum or max(sides))
        if max(sides) > largest:
            raise InputError(
                f"--coreml-sizes: {max(sides)} is too large, this pipeline makes images of up to "
                f"{largest} pixels"
            )
        for side in sides:
            if side < smallest_side(latents) or side % unit:
                raise InputError(
                    f"--coreml-sizes: {side} must be a multiple of {unit}, at least "
                    f"{smallest_side(latents)}, for this pipeline"
                )

    def probe_sizes(self, latents: Latents, traced: Mapping[str, int]) -> list[dict[str, int]]:
        """The packages fix the sequence length, and may allow some sizes only."""
        multiple = latents.multiple
        height, width = traced["width"] - 2 * multiple, traced["height"] + multiple
        if self.enumerated():
            second = sorted(self.enumerated(), key=_area)[:2][-1]
            height, width = (side // latents.factor for side in second)
        elif self.values["coreml_sizes"]:
            low, high = self.bounds(latents)
            height, width = high // latents.factor, low // latents.factor
        return [{**traced, "batch": 3, "height": height, "width": width}]

    def loop_size(self) -> tuple[int, int] | None:
        if self.enumerated():
            return min(self.enumerated(), key=_area)
        found = _range(self.values["coreml_sizes"])
        return (found[0], found[0]) if found else None

    def enumerated(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of each allowed size, or nothing for a range.

        Raises:
            InputError: the text is neither a list of sizes nor a range.
        """
        text = self.values["coreml_sizes"]
        if not text or _range(text):
            return []
        found = [re.fullmatch(r"\s*(\d+)x(\d+)\s*", each) for each in text.split(",")]
        sizes = [(int(each[2]), int(each[1])) for each in found if each]
        if len(sizes) != len(found) or len(sizes) > _MAX_SIZES:
            raise InputError(
                f"--coreml-sizes {text!r}: expected up to {_MAX_SIZES} sizes "
                "such as 512x512,768x512 (width x height), or a range such as 256-1024"
            )
        return sizes

    def bounds(self, latents: Latents) -> tuple[int, int]:
        """Least and largest side in pixels where a range of sizes is allowed."""
        found = _range(self.values["coreml_sizes"])
        if found:
            return found
        unit = latents.factor * latents.multiple
        usual = max(latents.default_height, latents.default_width)
        largest = -(-max(2 * usual, _SMALLEST_RANGE * latents.factor) // unit) * unit
        return smallest_side(latents), min(largest, latents.factor * (latents.maximum or largest))


def _range(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", text)
    return (int(match[1]), int(match[2])) if match else None


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
