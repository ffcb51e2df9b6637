"""This module lists what is known of each precision, and of each pass that is asked for by name.

A package may bring more of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latentc.runtimes.plugins import Registry


@dataclass(frozen=True)
class Tolerance:
    """A tolerance says what a build may be off by.

    `component`, `latents`: relative L2 of each output and of the final latents.
    `image_difference`: of 255, per value. `image_psnr`: in dB. `judged`: share of the images
    by which the judge may find fewer right than of PyTorch's.
    """

    component: float
    latents: float
    image_difference: int
    image_psnr: float
    judged: float


@dataclass(frozen=True)
class Precision:
    """A precision is how the weights of a component are stored, and what is computed in.

    Attributes:
        tolerance: what a build may be off by against PyTorch in float32.
        bytes: of one number of a large weight in a build, roughly, for the preflight.
        stored_as: what weights are rounded to. Of integers a fidelity floor can keep layers in half
            precision.
        elsewhere: what other components than the denoiser get where this is asked for for the whole
            build; "" is this one.
        distance: how far it is from the original; of several builds the nearest is taken.
    """

    tolerance: Tolerance
    bytes: float = 4.0
    stored_as: Literal["floats", "integers", "palette"] = "floats"
    elsewhere: str = ""
    distance: int = 3


@dataclass(frozen=True)
class Pass:
    """A pass that is asked for by name makes another image than the pipeline.

    Attributes:
        does: a line of the help.
        modules: modules that change the denoiser's captured program, before those of its precision:
            files of `latentc.exporter.passes`, or whole names of another package's modules. A pass
            without any does not stand in a precision.
        tolerance: what a build may be off by, whatever its precision besides.
    """

    does: str
    modules: tuple[str, ...] = ()
    tolerance: Tolerance | None = None


# Accumulated rounding is what an fp32 build may differ by: engines order sums differently.
# At lower precisions single pixels at edges may jump; the image as a whole may not.
FP32 = Precision(Tolerance(1e-4, 1e-3, 2, 40.0, 0.02), bytes=4, distance=0)
FP16 = Precision(Tolerance(5e-3, 5e-2, 255, 30.0, 0.02), bytes=2, distance=1)
BF16 = Precision(Tolerance(8e-2, 5e-1, 255, 18.0, 0.1), bytes=2, distance=2)
# The denoiser is where nearly all of the work and most of the weights are; the other components are
# sensitive and run once an image.
W8A8 = Precision(
    Tolerance(3e-1, 5e-1, 255, 20.0, 0.1), bytes=1, stored_as="integers", elsewhere="int8"
)
# Not all weights are of 4 bits.
INT4 = Precision(
    Tolerance(3e-1, 5e-1, 255, 18.0, 0.1), bytes=0.75, stored_as="integers", elsewhere="int8"
)
INT8 = Precision(Tolerance(6e-2, 1e-1, 255, 30.0, 0.06), bytes=1, stored_as="integers")
PALETTE8 = Precision(Tolerance(6e-2, 1e-1, 255, 25.0, 0.06), bytes=1, stored_as="palette")
PALETTE6 = Precision(Tolerance(1.5e-1, 2e-1, 255, 20.0, 0.1), bytes=0.75, stored_as="palette")
PALETTE4 = Precision(Tolerance(5e-1, 8e-1, 255, 12.0, 0.3), bytes=0.5, stored_as="palette")

DOWNSAMPLED_ATTENTION = Pass(
    "a quarter of the keys and values in the largest self-attentions, in builds of their own "
    "beside those without",
    ("downsampled_attention",),
    Tolerance(2e-1, 1e-1, 255, 25.0, 0.04),
)
STEP_CACHE = Pass("adds the denoiser's shallow part, for calls with cache_interval")

PRECISIONS = Registry(
    "precision",
    Precision,
    "latentc.precisions",
    {
        name: f"{__name__}:{name.upper()}"
        for name in (
            *("fp32", "fp16", "bf16", "w8a8", "int4", "int8"),
            *("palette8", "palette6", "palette4"),
        )
    },
)
PASSES = Registry(
    "pass",
    Pass,
    "latentc.passes",
    {
        "downsampled-attention": f"{__name__}:DOWNSAMPLED_ATTENTION",
        "step-cache": f"{__name__}:STEP_CACHE",
    },
)
