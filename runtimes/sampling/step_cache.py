"""Step caching: deep features of one evaluation of the denoiser serve the following ones.

Ma, Fang and Wang 2024, "DeepCache: Accelerating Diffusion Models for Free"
(https://arxiv.org/abs/2312.00858), with uniform intervals: from step to step the deep layers'
results change little. Every `interval`-th evaluation runs the whole denoiser; those between run
its shallow part with the features that the last whole one left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Session
from latentc.runtimes.programs.graphs import TIMESTEP
from latentc.runtimes.sampling.packing import Packing

# Whether an evaluation of the denoiser is guided, and whether all of the denoiser runs.
Kind: TypeAlias = tuple[bool, bool]


def kinds(guided: Iterable[bool], interval: int = 1) -> list[Kind]:
    """Return the kind of each evaluation of the denoiser.

    Where guidance begins or ends the number of rows is another, the features do not fit, and the
    whole denoiser runs.
    """
    made: list[Kind] = []
    uses = 0  # of the features, the evaluation that made them included
    for each in guided:
        whole = uses in (0, interval) or each != made[-1][0]
        uses = 1 if whole else uses + 1
        made.append((each, whole))
    return made


class StepCache:
    """A `StepCache` predicts in one run.

    Its sessions are bound to its conditioning, by number of rows.

    Args:
        whole: number of an evaluation → the denoiser that runs in it.
        shallow: its shallow part; empty where all evaluations run the whole denoiser.
        cached: the denoiser's outputs that the shallow part takes.
        evaluations: the kinds of what will be called for, in order.
        varying: conditioning that the sessions are not bound to, by number of rows, and in order.
        packing: the denoiser's inputs and outputs of the latents.
        variance: the output that says what the variance of the noise is, if the denoiser has one.

    Attributes:
        variance: what that output was in the last evaluation, [rows, ...].
    """

    def __init__(
        self,
        whole: Callable[[int], Mapping[int, Session]],
        shallow: Mapping[int, Session],
        cached: Sequence[str],
        evaluations: Iterable[Kind],
        varying: Mapping[int, Sequence[Mapping[str, Array]]] | None = None,
        *,
        packing: Packing,
        variance: str | None = None,
    ) -> None:
        self._whole = whole
        self._shallow = shallow
        self._packing = packing
        self._variance = variance
        self.variance: Array | None = None
        # One timestep for each row, or one for all of them: as all denoisers of a loop take it.
        self._per_row = next(iter(whole(0).values())).inputs[TIMESTEP].shape != (1,)
        self._cached = cached if shallow else ()
        self._features: dict[str, Array] = {}
        self._evaluations = enumerate(evaluations)
        self._varying = varying or {}

    def __call__(self, sample: Array, timestep: Array) -> Array:
        """Return the prediction for a sample [rows, ...] at a timestep float32 [1], of the sample's
        shape.
        """
        rows = len(sample)
        times = np.repeat(timestep, rows) if self._per_row else timestep
        feeds = {**self._packing.feeds(sample), TIMESTEP: times}
        index, (_, whole) = next(self._evaluations)
        if self._varying:
            feeds |= self._varying[rows][index]
        if whole:
            outputs = self._whole(index)[rows].run(feeds)
            self._features = {name: outputs[name] for name in self._cached}
        else:
            outputs = self._shallow[rows].run(feeds | self._features)
        self.variance = None if self._variance is None else outputs[self._variance]
        return self._packing.predicted(outputs)
