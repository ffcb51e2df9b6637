"""The size of a call's images: the one that they are made in, and the one that they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtimes import argument_values as checked
from runtimes.errors import InputError
from runtimes.manifest import Manifest
from runtimes.session import Array
from runtimes.sizes import BINNING, binned, check_side, is_binned, rounded

_SIDES = ("height", "width")


@dataclass(frozen=True)
class CallSize:
    """Sizes in pixels.

    Attributes:
        height, width: what the image is made in.
        asked: height and width as the call says them.
        told: height and width that a model is told which takes them as numbers.
        resizes: whether the image gets the size that was asked for after decoding.
        binning: what the call says of being made in another size, None where it says nothing.
    """

    height: int
    width: int
    asked: tuple[int, int]
    told: tuple[int, int]
    resizes: bool = False
    binning: bool | None = None

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the image in the end."""
        return self.asked if self.resizes else (self.height, self.width)

    @property
    def resized(self) -> tuple[int, int] | None:
        """Height and width to resize what is decoded to; None where it stays as it is."""
        return self.asked if self.resizes else None

    def settings(self) -> dict[str, int | bool]:
        """Return what makes an image of this size again, by the call's argument names."""
        said = {} if self.binning is None else {BINNING: self.binning}
        return {**dict(zip(_SIDES, self.image, strict=True)), **said}


def of_call(
    manifest: Manifest,
    given: Mapping[str, Any],
    latents: Array | None,
    start: Array | None,
    whole: tuple[int, int] | None = None,
) -> CallSize:
    """Return the size of a call: as given, else that of the latents `start` or `latents`, else
    `whole`, the height and width of its images, made smaller to what the model can make, else the
    default. What the model is told does not follow `latents`, as in diffusers.

    Raises:
        InputError: a size that the model cannot make, or that does not fit `latents`.
    """
    spec, factor = manifest.latents, manifest.latents.factor
    binning = checked.boolean(given, BINNING) if BINNING in given else None
    own = latents if start is None else start
    from_latents = None if own is None else [side * factor for side in own.shape[2:]]
    usual: Sequence[int] = (spec.default_height, spec.default_width)
    if is_binned(spec, given):
        # diffusers takes its default size here, whatever the size of latents that are given.
        asked = _asked(given, usual)
        made = binned(spec, *asked)
        note = f"; images of {asked[0]} by {asked[1]} are made so unless {BINNING}=False is given"
        _check(manifest, made, from_latents, note)
        return CallSize(*made, asked, made, asked != made, binning)
    if whole:
        unit = factor * spec.multiple
        usual = [max(side // unit, 1) * unit for side in whole]
    asked = _asked(given, from_latents or usual)
    made = rounded(spec, "height", asked[0]), rounded(spec, "width", asked[1])
    _check(manifest, made, from_latents)
    told = made if latents is None else _asked(given, usual)
    return CallSize(*made, asked, told, binning=binning)


def _asked(given: Mapping[str, Any], usual: Sequence[int]) -> tuple[int, int]:
    """Return height and width as a call gives them, and `usual` where it does not."""
    height, width = (
        checked.integer(name, given.get(name, default))
        for name, default in zip(_SIDES, usual, strict=True)
    )
    return height, width


def _check(
    manifest: Manifest, sides: tuple[int, int], from_latents: Sequence[int] | None, note: str = ""
) -> None:
    """Refuse height and width that graphs or latents do not have.

    Raises:
        InputError: with `note` at its end where the size is not what the call said.
    """
    spec = manifest.latents
    fixed = manifest.component("denoiser").inputs["sample"].shape[2:]
    for index, (name, side) in enumerate(zip(_SIDES, sides, strict=True)):
        only = fixed[index]
        if isinstance(only, int) and side != only * spec.factor:
            raise InputError(
                f"{name} {side}: this bundle was exported for {only * spec.factor} only{note}"
            )
        check_side(spec, name, side)
        if from_latents and side != from_latents[index]:
            raise InputError(
                f"{name} {side} does not fit 'latents', which are for {from_latents[index]}{note}"
            )
