"""Quantiles, bootstrap intervals and verdicts about series that were measured in rounds.

A series is a list of rounds (one process each), a round a list of values. Values of one process
resemble each other more than those of two, so the bootstrap draws rounds first and values of a
round second (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8: data with
structure). Rounds of two cases that took turns share the machine's moments: they are drawn in
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentc.runtimes.arrays import Array

Rounds = Sequence[Sequence[float]]

RESAMPLES = 2000
CONFIDENCE = 0.95
_MAX_VALUES = 200  # of one round that a resample draws: more would not narrow an interval
_SEED = 20


@dataclass(frozen=True)
class Summary:
    """Quantiles in the unit of the values, the median's interval, and `noise`: by how much the
    rounds' own medians lie apart, as a share of the median (see `noise`)."""

    p50: float
    p90: float
    p99: float
    low: float
    high: float
    noise: float
    count: int
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians and its interval."""

    value: float
    low: float
    high: float


def summarise(rounds: Rounds, confidence: float = CONFIDENCE) -> Summary:
    """Return the summary of a series.

    Raises:
        ValueError: there are no values.
    """
    values = pooled(rounds)
    medians = _resampled(rounds, _draw_rounds(len(_filled(rounds))))
    low, high = np.quantile(medians, _tails(confidence))
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return Summary(
        float(p50), float(p90), float(p99),
        float(low), float(high),
        noise(rounds), values.size, len(_filled(rounds)),
    )  # fmt: skip


def ratio(above: Rounds, below: Rounds, confidence: float = CONFIDENCE) -> Ratio:
    """Return the median of `above` over the median of `below`.

    With as many rounds they count as pairs.
    """
    first, second = _filled(above), _filled(below)
    drawn = _draw_rounds(len(first))
    paired = drawn if len(first) == len(second) else _draw_rounds(len(second), _SEED + 1)
    quotients = _resampled(above, drawn, _SEED + 2) / _resampled(below, paired, _SEED + 3)
    low, high = np.quantile(quotients, _tails(confidence))
    value = float(np.median(pooled(above)) / np.median(pooled(below)))
    # A skewed resample may leave the plain ratio out by a rounding; an interval never should.
    return Ratio(value, min(float(low), value), max(float(high), value))


def ratio_of_ratios(
    new: tuple[Rounds, Rounds], old: tuple[Rounds, Rounds], confidence: float = CONFIDENCE
) -> Ratio:
    """Return (new case / new baseline) / (old case / old baseline).

    It is what changed beside the machine.
    """
    parts = []
    for index, (case, baseline) in enumerate((new, old)):
        seed = _SEED + 10 * index
        drawn = _draw_rounds(len(_filled(case)), seed)
        same = len(_filled(case)) == len(_filled(baseline))
        paired = drawn if same else _draw_rounds(len(_filled(baseline)), seed + 1)
        parts.append(_resampled(case, drawn, seed + 2) / _resampled(baseline, paired, seed + 3))
    low, high = np.quantile(parts[0] / parts[1], _tails(confidence))
    medians = [np.median(pooled(c)) / np.median(pooled(b)) for c, b in (new, old)]
    value = float(medians[0] / medians[1])
    return Ratio(value, min(float(low), value), max(float(high), value))


def noise(rounds: Rounds) -> float:
    """Return half of the way between the smallest and the largest median of a round, over the
    median.

    With one round, half of the way between the quartiles of its values.
    """
    filled = _filled(rounds)
    if len(filled) > 1:
        medians = [float(np.median(each)) for each in filled]
        apart = max(medians) - min(medians)
    else:
        low, high = np.quantile(filled[0], (0.25, 0.75))
        apart = float(high - low)
    middle = float(np.median(pooled(rounds)))
    return apart / 2 / middle if middle > 0 else 0.0


def verdict(found: Ratio, *noises: float, threshold: float = 0.0) -> str:
    """Return ``more``, ``less`` or ``same``.

    A ratio that is nearer to 1 than the noise of what it compares (and the threshold beyond it), or
    whose interval holds 1, says nothing.
    """
    margin = threshold + max(noises)
    if found.low > 1 and found.value > 1 + margin:
        return "more"
    if found.high < 1 and found.value < 1 / (1 + margin):
        return "less"
    return "same"


def pooled(rounds: Rounds) -> Array:
    """Return all values in one array.

    Raises:
        ValueError: there are none.
    """
    return np.concatenate([np.asarray(each, np.float64) for each in _filled(rounds)])


def _filled(rounds: Rounds) -> list[Sequence[float]]:
    filled = [round_values for round_values in rounds if len(round_values)]
    if not filled:
        raise ValueError("no values to summarise")
    return filled


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _draw_rounds(count: int, seed: int = _SEED) -> Array:
    """Return which rounds make a resample: [resamples, rounds]."""
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _resampled(rounds: Rounds, drawn: Array, seed: int = _SEED + 2) -> Array:
    """Return medians of values drawn from the drawn rounds: [resamples]."""
    filled = _filled(rounds)
    sizes = np.array([len(each) for each in filled])
    width = min(int(sizes.max()), _MAX_VALUES)
    table = np.zeros((len(filled), int(sizes.max())))
    for row, each in zip(table, filled, strict=True):
        row[: len(each)] = each
    places = np.random.default_rng(seed).random((*drawn.shape, width)) * sizes[drawn][..., None]
    values = table[drawn[..., None], places.astype(np.int64)]
    medians: Array = np.median(values.reshape(len(drawn), -1), axis=1)
    return medians
