"""Names of what a bundle has one or several of."""

from __future__ import annotations

from latentc.runtimes.bundle.precision import Usual, of_component

SAFETY_CHECKER = "safety_checker"  # a component, and the part of the source that it is made of
WATERMARK = "watermark"  # a component
# Components that adapters bring.
T2I_ADAPTER = "t2i_adapter"
IP_IMAGE_ENCODER = "ip_image_encoder"
# What decides by thresholds is in fp32 unless it is named: half precision has steps of 5e-4 just
# below 1, as large as what a score must be above its threshold, and would decide otherwise.
USUAL: Usual = {SAFETY_CHECKER: "fp32", WATERMARK: "fp32"}


def precision_of(precision: str, component: str) -> str:
    """Return the precision of one component under what was asked for, in any spelling."""
    return of_component(precision, component, USUAL)


def numbered(name: str, index: int) -> str:
    """Return the name of one of several: the first is `name`, those after it ``name_2``, ``name_3``
    …
    """
    return name if index == 0 else f"{name}_{index + 1}"


def images(argument: str, count: int) -> list[str]:
    """Return an argument's images as a task calls them: its one, or each of several."""
    return [argument] if count == 1 else [f"{argument}[{index}]" for index in range(count)]
