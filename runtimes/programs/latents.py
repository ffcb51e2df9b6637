"""The sizes that the images of a program may have, and the latents that stand for them."""

from __future__ import annotations

from typing import ClassVar

from latentc.runtimes.programs.statements import Noise, Program, Symbol, loop_of
from latentc.runtimes.strict import Strict


class Latents(Strict, frozen=True):
    """The tensor that is denoised.

    `factor` is pixels per latent along a side; latent height and width must be multiples of
    `multiple`, at least `minimum`, and at most `maximum` where the model has a limit (of a program
    for one size the smaller and the larger side); default sizes are in pixels. `rounds`: other
    sizes are made smaller to a multiple, with a warning.
    `bins`: (ratio of height to width, height, width) of the sizes that images are made in unless a
    call says otherwise, in pixels; they are resized to the size that was asked for afterwards.
    Empty: calls take the argument, and there are none for this model. None: they do not take it.
    """

    channels: int
    factor: int
    multiple: int
    default_height: int
    default_width: int
    maximum: int | None = None
    minimum: int = 1
    rounds: bool = False
    bins: tuple[tuple[float, int, int], ...] | None = None

    offset: ClassVar[int] = 0  # sides in pixels are multiples of the factor
    nearest: ClassVar[bool] = False


def latents_of(program: Program) -> Latents:
    """Return the latents of a checked program, whose first two symbols are height and width."""
    height, width, *_ = program.symbols.values()
    return Latents(
        channels=int(noise_of(program).shape[0]),
        factor=height.unit,
        multiple=height.multiple,
        default_height=height.default * height.unit,
        default_width=width.default * width.unit,
        maximum=_largest(height.most, width.most),
        minimum=min(height.least, width.least),
        rounds=height.rounds,
        bins=None if program.bins is None else program.bins.sizes,
    )


def other_sizes(program: Program) -> dict[str, Symbol]:
    """Return the symbols of a checked program that are neither the height nor the width."""
    return dict([*program.symbols.items()][2:])


def _largest(*sides: int | None) -> int | None:
    """Return the larger limit of two sides, which differ where there is one size alone."""
    known = [side for side in sides if side is not None]
    return max(known) if len(known) == len(sides) else None


def noise_of(program: Program) -> Noise:
    """Return the noise that the loop begins with: one row of it is as large as what is denoised of
    an image."""
    noise = loop_of(program).state.noise
    noises = (step for step in program.steps if isinstance(step, Noise))
    return next(each for each in noises if each.gives == noise)
