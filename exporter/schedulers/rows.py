"""From traced steps to a compact plan: what is never read is dropped, slots are shared.

A run that starts at evaluation s is served at evaluation i by the node (i, age = i - s). After
a few evaluations every run looks like the one from the beginning; those nodes are one, and the
table needs only W columns besides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentc.exporter.schedulers.symbols import CLEAN, MAX_SLOTS, NOISE, OUTPUT, NotLinear
from latentc.exporter.schedulers.tracing import RawStep
from latentc.runtimes.sampling.plan import Clip, Floats, PlanTable

_EQUAL = 1e-12
Slots: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class TracedRuns:
    """One step count: `full` is the run from the start, `late[s]` the first steps from s on."""

    steps: int
    full: Sequence[RawStep]
    late: Mapping[int, Sequence[RawStep]]
    timesteps: Floats
    init_noise_scale: float
    add_noise: Mapping[int, tuple[float, float]]
    known: Sequence[tuple[float, float] | None]


def same_row(a: RawStep, b: RawStep) -> bool:
    """Return whether two steps have equal coefficients, up to rounding."""
    if (
        a.matrix.tobytes() == b.matrix.tobytes()
        and a.clean_from.tobytes() == b.clean_from.tobytes()
    ):
        return True
    return bool(_close(a.matrix, b.matrix).all() and _close(a.clean_from, b.clean_from).all())


def build_table(runs: TracedRuns) -> PlanTable:
    """Return the table of one step count.

    Raises `NotLinear` where a plan cannot express the runs.
    """
    evaluations = len(runs.full)
    ages = max((len(steps) for steps in runs.late.values()), default=0)
    nodes = [[_node(runs, i, age) for age in range(ages + 1)] for i in range(evaluations)]
    grid = _tidy(np.array([[node.matrix for node in row] for row in nodes]))
    needed = _drop_unread(grid)
    window = _window(runs, grid, nodes, ages)
    # the last column stands for "late enough", that is for the run from the start
    columns = [*range(window), ages]
    kept, clean_from = grid[:, columns], [[row[age].clean_from for age in columns] for row in nodes]
    count = evaluations * len(columns)
    allowed = [runs.add_noise.get(i, (np.nan, np.nan)) for i in range(evaluations)]
    return PlanTable(
        steps=np.array([runs.steps], np.int32),
        offsets=np.array([0, evaluations], np.int32),
        timesteps=runs.timesteps,
        input_scale=np.array([step.input_scale for step in runs.full]),
        noise_draws=np.array([step.draws for step in runs.full], np.uint8),
        rows=np.arange(count, dtype=np.int32).reshape(evaluations, len(columns)),
        clean_from=np.array(clean_from).reshape(count, 2),
        init_noise_scale=np.array([runs.init_noise_scale]),
        add_noise=np.array(allowed),
        known=np.array([pair or (np.nan, np.nan) for pair in runs.known]),
        log_low=np.array([step.log_variance[0] for step in runs.full]),
        log_high=np.array([step.log_variance[1] for step in runs.full]),
        clip=_clip(runs),
        shift=np.zeros(1),
        **_coefficients(kept.reshape(count, MAX_SLOTS, -1), _colours(needed[:, columns])),
    )


def _node(runs: TracedRuns, i: int, age: int) -> RawStep:
    late = runs.late.get(i - age, ())
    return late[age] if age < len(late) else runs.full[i]


def _tidy(grid: Floats) -> Floats:
    """Remove rounding noise around 0 and 1, which would keep dead slots alive.

    grid: f8[evaluations, ages, MAX_SLOTS, WIDTH].
    """
    scale = np.nan_to_num(np.abs(grid)).max(axis=-1, keepdims=True)
    tidy = np.where(np.abs(grid) <= 1e-15 * scale, 0.0, grid)
    tidy[np.abs(tidy - 1.0) <= 1e-14] = 1.0
    return tidy


def _drop_unread(grid: Floats) -> Slots:
    """Zero, in place, what no later step reads; returns the slots that each node reads."""
    evaluations, ages = grid.shape[:2]
    older = np.minimum(np.arange(ages) + 1, ages - 1)
    needed = np.zeros((evaluations, ages, MAX_SLOTS), bool)
    needed[:, :, 0] = True  # slot 0 also feeds the model, and so it is never anybody else's
    live = needed[-1]
    for i in reversed(range(evaluations)):
        grid[i][~live[older]] = 0.0
        needed[i] |= grid[i, :, :, :MAX_SLOTS].any(axis=1)
        live = needed[i]
    if not np.isfinite(grid).all():
        raise NotLinear("has coefficients that are not finite")
    return needed


def _window(runs: TracedRuns, grid: Floats, nodes: list[list[RawStep]], ages: int) -> int:
    """Return the smallest W for which every late run equals the full one from age W on."""
    window = 0
    same = np.asarray(_close(grid, grid[:, -1:]).all(axis=(2, 3)))
    for start, steps in runs.late.items():
        for age in range(len(steps)):
            i = start + age
            late, full = nodes[i][age], runs.full[i]
            of_late, of_full = ((e.input_scale, e.draws, e.log_variance) for e in (late, full))
            if of_late != of_full:
                raise NotLinear("scales its input or draws noise depending on where it began")
            if not same[i, age] or not _close(late.clean_from, full.clean_from).all():
                window = max(window, age + 1)
    return window


def _colours(needed: Slots) -> dict[int, int]:
    """Give slots that are never needed at the same time the same place.

    needed: the slots that each node reads; b[evaluations, ages, MAX_SLOTS].
    """
    groups = [
        set(np.flatnonzero(row).tolist())
        for row in np.unique(needed.reshape(-1, MAX_SLOTS), axis=0)
    ]
    colour = {0: 0}
    for slot in sorted(set().union(*groups) - {0}):
        rivals = set().union(*(group for group in groups if slot in group))
        taken = {colour[rival] for rival in rivals if rival in colour} | {0}
        colour[slot] = next(c for c in range(MAX_SLOTS) if c not in taken)
    return colour


def _coefficients(matrices: Floats, colour: Mapping[int, int]) -> dict[str, Floats]:
    """Return the rows of a table, of matrices f8[rows, MAX_SLOTS, WIDTH] and places of slots."""
    places = np.zeros((max(colour.values()) + 1, MAX_SLOTS))
    places[list(colour.values()), list(colour)] = 1.0
    placed = places @ matrices  # of the slots that share a place one at most is not zero
    columns = {"prediction": OUTPUT, "clean": CLEAN, "noise": NOISE}
    return {
        "state": placed[:, :, :MAX_SLOTS] @ places.T,
        **{name: placed[:, :, column] for name, column in columns.items()},
    }


def _clip(runs: TracedRuns) -> Floats:
    used = {step.clip for step in runs.full} - {Clip()}
    if len(used) > 1:
        raise NotLinear("limits the clean sample differently from step to step")
    clip = next(iter(used), Clip())
    return np.array([float(clip.kind), clip.limit, clip.ratio])


def _close(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """Return where numbers are equal up to rounding; NaN is equal to NaN."""
    with np.errstate(invalid="ignore"):  # of infinity less infinity
        close = np.abs(a - b) <= _EQUAL + _EQUAL * np.abs(b)
    return np.asarray(close | (np.isnan(a) & np.isnan(b)))
