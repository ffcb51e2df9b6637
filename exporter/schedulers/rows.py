"""From traced steps to a compact plan: what is never read is dropped, slots are shared.

A run that starts at evaluation s is served at evaluation i by the node (i, age = i - s). After
a few evaluations every run looks like the one from the beginning; those nodes are one, and the
table needs only W columns besides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentc.exporter.schedulers.symbols import CLEAN, MAX_SLOTS, NOISE, OUTPUT, NotLinear
from latentc.exporter.schedulers.tracing import RawStep
from latentc.runtimes.sampling.plan import Clip, Floats, PlanTable, join

_EQUAL = 1e-12
Grid = list[list[Floats]]


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
    return _close(a.matrix, b.matrix) and _close(a.clean_from, b.clean_from)


def build_table(runs: TracedRuns) -> PlanTable:
    """Return the table of one step count.

    Raises `NotLinear` where a plan cannot express the runs.
    """
    evaluations = len(runs.full)
    ages = max((len(steps) for steps in runs.late.values()), default=0)
    nodes = [[_node(runs, i, age) for age in range(ages + 1)] for i in range(evaluations)]
    grid = [[_tidy(node.matrix) for node in row] for row in nodes]
    needed = _drop_unread(grid)
    window = _window(runs, grid, nodes, ages)
    colour = _colours(needed, window)
    slots = max(colour.values()) + 1
    rows: dict[str, list[Any]] = {name: [] for name in ("state", "prediction", "clean", "noise")}
    index = np.zeros((evaluations, window + 1), np.int32)
    clean_from: list[Floats] = []
    for i in range(evaluations):
        for age in range(window + 1):
            # the last column stands for "late enough", that is for the run from the start
            column = age if age < window else ages
            index[i, age] = len(clean_from)
            _append(rows, grid[i][column], colour, slots)
            clean_from.append(nodes[i][column].clean_from)
    allowed = [runs.add_noise.get(i, (np.nan, np.nan)) for i in range(evaluations)]
    table = PlanTable(
        steps=np.array([runs.steps], np.int32),
        offsets=np.array([0, evaluations], np.int32),
        timesteps=runs.timesteps,
        input_scale=np.array([step.input_scale for step in runs.full]),
        noise_draws=np.array([step.draws for step in runs.full], np.uint8),
        rows=index,
        clean_from=np.array(clean_from),
        init_noise_scale=np.array([runs.init_noise_scale]),
        add_noise=np.array(allowed),
        known=np.array([pair or (np.nan, np.nan) for pair in runs.known]),
        log_low=np.array([step.log_variance[0] for step in runs.full]),
        log_high=np.array([step.log_variance[1] for step in runs.full]),
        clip=_clip(runs),
        shift=np.zeros(1),
        **{name: np.array(values) for name, values in rows.items()},
    )
    return join([table])


def _node(runs: TracedRuns, i: int, age: int) -> RawStep:
    late = runs.late.get(i - age, ())
    return late[age] if age < len(late) else runs.full[i]


def _tidy(matrix: Floats) -> Floats:
    """Remove rounding noise around 0 and 1, which would keep dead slots alive."""
    tidy = matrix.copy()
    scale = np.nan_to_num(np.abs(tidy)).max(axis=1, keepdims=True)
    tidy[np.abs(tidy) <= 1e-15 * scale] = 0.0
    tidy[np.abs(tidy - 1.0) <= 1e-14] = 1.0
    return tidy


def _drop_unread(grid: Grid) -> list[list[frozenset[int]]]:
    """Zero, in place, what no later step reads; returns the slots that each node reads."""
    ages = len(grid[0])
    wanted = [frozenset({0})] * ages
    needed: list[list[frozenset[int]]] = []
    for row in reversed(grid):
        reads = []
        for age, matrix in enumerate(row):
            live = wanted[min(age + 1, ages - 1)]
            dead = [slot for slot in range(MAX_SLOTS) if slot not in live]
            matrix[dead] = 0.0
            if not np.isfinite(matrix).all():
                raise NotLinear("has coefficients that are not finite")
            reads.append(frozenset(np.flatnonzero(matrix[:, :MAX_SLOTS].any(axis=0)).tolist()))
        # slot 0 also feeds the model, and so it is never anybody else's
        wanted = [slots | {0} for slots in reads]
        needed.append(wanted)
    return needed[::-1]


def _window(runs: TracedRuns, grid: Grid, nodes: list[list[RawStep]], ages: int) -> int:
    """Return the smallest W for which every late run equals the full one from age W on."""
    window = 0
    for start, steps in runs.late.items():
        for age in range(len(steps)):
            i = start + age
            late, full = nodes[i][age], runs.full[i]
            of_late, of_full = ((e.input_scale, e.draws, e.log_variance) for e in (late, full))
            if of_late != of_full:
                raise NotLinear("scales its input or draws noise depending on where it began")
            same = _close(grid[i][age], grid[i][ages])
            if not same or not _close(late.clean_from, full.clean_from):
                window = max(window, age + 1)
    return window


def _colours(needed: list[list[frozenset[int]]], window: int) -> dict[int, int]:
    """Give slots that are never needed at the same time the same place."""
    last = len(needed[0]) - 1
    groups = {row[age] for row in needed for age in {*range(window), last}}
    colour = {0: 0}
    for slot in sorted(set().union(*groups) - {0}):
        rivals = set().union(*(group for group in groups if slot in group))
        taken = {colour[rival] for rival in rivals if rival in colour} | {0}
        colour[slot] = next(c for c in range(MAX_SLOTS) if c not in taken)
    return colour


def _append(rows: dict[str, list[Any]], matrix: Floats, colour: dict[int, int], slots: int) -> None:
    state = np.zeros((slots, slots))
    columns = {name: np.zeros(slots) for name in ("prediction", "clean", "noise")}
    for slot, place in colour.items():
        if not matrix[slot].any():
            continue
        for source, from_place in colour.items():
            state[place, from_place] += matrix[slot, source]
        for name, basis in (("prediction", OUTPUT), ("clean", CLEAN), ("noise", NOISE)):
            columns[name][place] = matrix[slot, basis]
    rows["state"].append(state)
    for name, column in columns.items():
        rows[name].append(column)


def _clip(runs: TracedRuns) -> Floats:
    used = {step.clip for step in runs.full} - {Clip()}
    if len(used) > 1:
        raise NotLinear("limits the clean sample differently from step to step")
    clip = next(iter(used), Clip())
    return np.array([float(clip.kind), clip.limit, clip.ratio])


def _close(a: Floats, b: Floats) -> bool:
    if a.tobytes() == b.tobytes():
        return True
    close = np.abs(a - b) <= _EQUAL + _EQUAL * np.abs(b)
    return bool((close | (np.isnan(a) & np.isnan(b))).all())
