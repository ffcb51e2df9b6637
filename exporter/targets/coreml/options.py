"""What can be asked of a Core ML export, and which image sizes follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from latentc.exporter.targets.options import TargetOptions, flag, option
from latentc.runtimes.bundle.sizes import smallest_side
from latentc.runtimes.errors import InputError
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


@dataclass(frozen=True)
class CoreMLOptions(TargetOptions):
    """See `latentc export --help`. Sizes are in pixels, as text: "" is a range of any."""

    coreml_target: str = option(
        "iOS16", "Core ML: oldest system that must load it.", (*DEPLOYMENT_TARGETS,)
    )
    coreml_attention: str = option("original", "Core ML: how attention is written.", (*ATTENTION,))
    coreml_sizes: str = option(
        "", "Core ML: image sizes to allow, such as 512x512,768x512 (width x height) or 256-1024."
    )
    coreml_batch: int = option(1, "Core ML: rows per call; larger batches are split.")
    chunk_denoiser: bool = option(False, "Core ML: the denoiser as two packages.")

    def passes(self) -> tuple[str, ...]:
        return ATTENTION[self.coreml_attention]

    def check_alone(self, fixed: bool) -> None:
        if self.coreml_batch < 1:
            raise InputError(f"--coreml-batch {self.coreml_batch}: must be at least 1")
        if fixed and self.coreml_sizes:
            raise InputError("give either --coreml-sizes, or --height and --width")
        needs_fixed = {
            "--chunk-denoiser": self.chunk_denoiser,
            "--coreml-attention split_einsum_v2": self.coreml_attention == "split_einsum_v2",
        }
        for what, asked in needs_fixed.items():
            if asked and not fixed:
                raise InputError(f"{what} needs a fixed size: give --height and --width")
        self.enumerated()
        low, high = _range(self.coreml_sizes) or (1, 1)
        if low > high:
            raise InputError(f"--coreml-sizes {self.coreml_sizes}: the range is empty")

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
        elif self.coreml_sizes:
            low, high = self.bounds(latents)
            height, width = high // latents.factor, low // latents.factor
        return [{**traced, "batch": 3, "height": height, "width": width}]

    def loop_size(self) -> tuple[int, int] | None:
        if self.enumerated():
            return min(self.enumerated(), key=_area)
        found = _range(self.coreml_sizes)
        return (found[0], found[0]) if found else None

    def enumerated(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of each allowed size, or nothing for a range.

        Raises:
            InputError: the text is neither a list of sizes nor a range.
        """
        if not self.coreml_sizes or _range(self.coreml_sizes):
            return []
        found = [re.fullmatch(r"\s*(\d+)x(\d+)\s*", each) for each in self.coreml_sizes.split(",")]
        sizes = [(int(each[2]), int(each[1])) for each in found if each]
        if len(sizes) != len(found) or len(sizes) > _MAX_SIZES:
            raise InputError(
                f"{flag('coreml_sizes')} {self.coreml_sizes!r}: expected up to {_MAX_SIZES} sizes "
                "such as 512x512,768x512 (width x height), or a range such as 256-1024"
            )
        return sizes

    def bounds(self, latents: Latents) -> tuple[int, int]:
        """Least and largest side in pixels where a range of sizes is allowed."""
        found = _range(self.coreml_sizes)
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
