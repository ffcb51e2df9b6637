"""Several states of a loop side by side in one array, so that one plan moves all of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.sampling.sampler import Steps


@dataclass(frozen=True)
class Packing:
    """A packing says how the states of a loop stand in the array that its plan moves.

    One state stands as it is, several as rows of all their numbers, one state after the other.

    Attributes:
        inputs, predictions: the denoiser's names for each state.
        shapes: of a row of each state.
    """

    inputs: tuple[str, ...]
    predictions: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def several(self) -> bool:
        """Return whether there is more than one state."""
        return len(self.shapes) > 1

    def segments(self) -> list[slice]:
        """Return the columns of each state; of one alone, all that there are."""
        if not self.several:
            return [slice(None)]
        ends = accumulate((prod(shape) for shape in self.shapes), initial=0)
        return [slice(start, end) for start, end in pairwise(ends)]

    def packed(self, states: Sequence[Array]) -> Array:
        """Return states, [rows, *shape] each, as one array."""
        if not self.several:
            return states[0]
        flat = [array.reshape(len(array), -1) for array in states]
        return np.concatenate(flat, axis=1)

    def unpacked(self, packed: Array) -> list[Array]:
        """Return the states of an array: the reverse of `packed`."""
        if not self.several:
            return [packed]
        rows = len(packed)
        return [
            np.ascontiguousarray(packed[:, segment]).reshape(rows, *shape)
            for segment, shape in zip(self.segments(), self.shapes, strict=True)
        ]

    def feeds(self, packed: Array) -> dict[str, Array]:
        """Return what the denoiser is given of the states."""
        return dict(zip(self.inputs, self.unpacked(packed), strict=True))

    def predicted(self, outputs: Mapping[str, Array]) -> Array:
        """Return what the denoiser predicts for the states, as one array."""
        return self.packed([outputs[name] for name in self.predictions])


def unpacked_steps(steps: Steps, packing: Packing) -> Steps:
    """Yield steps of several states with the first one as their latents. What is sent takes the
    place of the first one's alone."""
    sample: Array | None = None
    while True:
        try:
            step = steps.send(sample)
        except StopIteration:
            return
        first, *others = packing.unpacked(step.latents)
        sent = yield replace(step, latents=first, others=tuple(others))
        sample = packing.packed([first if sent is None else sent, *others])
