"""Step caching: deep features of one evaluation of the denoiser serve the following ones.

Ma, Fang and Wang 2024, "DeepCache: Accelerating Diffusion Models for Free"
(https://arxiv.org/abs/2312.00858), with uniform intervals: from step to step the deep layers'
results change little. Every `interval`-th evaluation runs the whole denoiser; those between run
its shallow part with the features that the last whole one left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtimes.sampler import Array
from runtimes.session import Session


class StepCache:
    """What predicts in one run; the sessions are bound to its conditioning, by number of rows.

    Args:
        whole: the denoiser.
        shallow: its shallow part; empty where `interval` is 1.
        cached: the denoiser's outputs that the shallow part takes.
        interval: every how many evaluations the whole denoiser runs.
    """

    def __init__(
        self,
        whole: Mapping[int, Session],
        shallow: Mapping[int, Session],
        cached: Sequence[str],
        interval: int = 1,
    ) -> None:
        self._whole = whole
        self._shallow = shallow
        self._interval = interval
        (self._prediction,) = set(next(iter(whole.values())).outputs) - set(cached)
        self._cached = cached
        self._features: dict[str, Array] = {}
        self._uses = 0  # of the features, the evaluation that made them included
        self._rows = 0

    def __call__(self, sample: Array, timestep: Array) -> Array:
        """sample [rows, C, H, W], timestep float32 [1] → prediction [rows, C, H, W].

        Features of other rows (guidance begins or ends) are of no use: the whole denoiser runs.
        """
        feeds, rows = {"sample": sample, "timestep": timestep}, len(sample)
        if rows == self._rows and 0 < self._uses < self._interval:
            self._uses += 1
            return self._shallow[rows].run(feeds | self._features)[self._prediction]
        made = self._whole[rows].run(feeds)
        if self._interval > 1:
            self._features = {name: made[name] for name in self._cached}
        self._rows, self._uses = rows, 1
        return made[self._prediction]
