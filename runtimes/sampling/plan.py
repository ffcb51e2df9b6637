"""Sampling plans: what a scheduler does, as a table of numbers.

A diffusion scheduler is linear in what it is given. Its state is K tensors ("slots"); slot 0
is the sample, the others are what the scheduler remembers between steps. With S the slots,
model evaluation i is

    e = guided prediction of the model for (input_scale[i] * S[0], timesteps[i])
    v = clip(clean_from[i, 0] * S[0] + clean_from[i, 1] * e)       predicted clean sample
    n = one draw of standard normal noise                          if noise_draws[i]
    n = n * exp((w * log_high[i] + (1 - w) * log_low[i]) / 2)      if these are no NaN
    S = state[i] @ S + prediction[i] * e + clean[i] * v + noise[i] * n

and the sample is S[0] after the last one. `v` is needed only where `clean[i]` is not all zero,
that is in plans that clip. A slot that was never written counts as zero. The variance of the
noise may be learnt, between two limits: w = (u + 1) / 2, where u is what the model says of it for
each number of the sample (Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic
Models", equation 15, https://arxiv.org/abs/2102.09672).

Some schedulers depend on the image's size besides, by one number, the shift. Their tables hold
plans for several shifts; in between the coefficients are those of the polynomial through them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentc.runtimes.arrays import Array
from latentc.runtimes.bundle.quantities import ranges
from latentc.runtimes.errors import BundleError, InputError, PlanNotFound
from latentc.runtimes.sampling.plan_document import decode, encode
from latentc.runtimes.sampling.plan_schema import DTYPES, LEARNED, ROW_FIELDS, ClipKind, check_table
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int32]
# What a shift between those of a table changes.
_MIXED = ("timesteps", "input_scale", "known", *LEARNED, *ROW_FIELDS)


@dataclass(frozen=True)
class Clip:
    """The limit on the predicted clean sample; `ratio` is used by `DYNAMIC` only."""

    kind: ClipKind = ClipKind.NONE
    limit: float = 0.0
    ratio: float = 0.0


@dataclass(frozen=True)
class SamplingPlan:
    """One scheduler, one step count, one start: n model evaluations over K slots.

    timesteps, input_scale: f8[n]; noise_draws: bool[n]; state: f8[n, K, K];
    prediction, clean, noise: f8[n, K]; clean_from: f8[n, 2]. See the module's docstring.
    `add_noise` is (clean, noise) coefficients of the sample at this start, None where the
    scheduler offers none. known: f8[n, 2], those of a clean sample that is to be as noisy as the
    sample is after each evaluation; NaN where the scheduler offers none. log_low, log_high: f8[n],
    the logarithms of the smallest and the largest variance of noise that has a learned one, else
    NaN.
    """

    num_inference_steps: int
    start: int
    timesteps: Floats
    input_scale: Floats
    noise_draws: NDArray[np.bool_]
    state: Floats
    prediction: Floats
    clean: Floats
    noise: Floats
    clean_from: Floats
    clip: Clip
    init_noise_scale: float
    add_noise: tuple[float, float] | None
    known: Floats
    log_low: Floats
    log_high: Floats

    @property
    def learns_variance(self) -> bool:
        """Return whether the model has to say what the variance of the noise is."""
        return not bool(np.isnan(self.log_low).all())

    @property
    def num_evaluations(self) -> int:
        """Return how often the model is called."""
        return len(self.timesteps)

    @property
    def num_slots(self) -> int:
        """Return K: how many tensors the sampler's state holds at most."""
        return int(self.state.shape[1])

    def until(self, evaluations: int) -> SamplingPlan:
        """Return the plan's first so many evaluations.

        What is known of the sample is clean after the last one, as in diffusers, though the rest of
        the sample is not.
        """
        fields = ("timesteps", "input_scale", "noise_draws", "known", *LEARNED, *ROW_FIELDS)
        parts = {name: getattr(self, name)[:evaluations] for name in fields}
        if evaluations and not np.isnan(parts["known"]).any():
            parts["known"] = np.concatenate([parts["known"][:-1], [(1.0, 0.0)]])
        return replace(self, **parts)

    def initial_sample(self, noise: Array, clean: Array | None = None) -> Array:
        """Return the first sample: scaled noise, or `clean` with noise added for this start.

        noise, clean: arrays of one shape. Raises `InputError` where the scheduler has no way
        to add noise.
        """
        if clean is None:
            return noise * self.init_noise_scale
        if self.add_noise is None:
            raise InputError("this scheduler cannot add noise to a clean sample")
        return self.add_noise[0] * clean + self.add_noise[1] * noise


@dataclass(frozen=True, eq=False)
class PlanTable:
    """All sampling plans of one scheduler: the content of `schedules/<name>.json`.

    P plans, E model evaluations over all of them, R distinct rows, K slots. Arrays are
    little-endian and C-contiguous; `latentc.runtimes.sampling.plan_document` says how they stand in
    the file.

    steps             i4[P]       the step count of each plan, strictly increasing
    offsets           i4[P+1]     plan p has the evaluations offsets[p] .. offsets[p+1]-1
    timesteps         f8[E]       what the model is told
    input_scale       f8[E]       factor on slot 0 before it enters the model
    noise_draws       u1[E]       1: one draw of noise in this evaluation, even if no row uses it
    rows              i4[E, W+1]  which row serves an evaluation: column min(age, W), where age
                                  counts the evaluations since the start of this run
    state             f8[R, K, K] the rows; see the module's docstring
    prediction        f8[R, K]
    clean             f8[R, K]
    noise             f8[R, K]
    clean_from        f8[R, 2]
    init_noise_scale  f8[P]       factor on the initial noise of a run from the beginning
    add_noise         f8[E, 2]    coefficients of (clean sample, noise) for a run that starts at
                                  this evaluation; NaN where none may start. The first
                                  evaluation of a plan is always a start, from pure noise.
    known             f8[E, 2]    coefficients of (clean sample, noise) for what is known of the
                                  sample after this evaluation, 1 and 0 after the last; NaN where
                                  the scheduler cannot say
    log_low, log_high f8[E]       logarithms of the limits of a learned variance; NaN where the
                                  noise has a fixed one
    clip              f8[3]       kind (0 none, 1 range, 2 dynamic), limit, ratio
    shift             f8[P]       the shift of each plan; where there are several, plans stand in
                                  their order, and every shift has the same step counts
    """

    steps: Ints
    offsets: Ints
    timesteps: Floats
    input_scale: Floats
    noise_draws: NDArray[np.uint8]
    rows: Ints
    state: Floats
    prediction: Floats
    clean: Floats
    noise: Floats
    clean_from: Floats
    init_noise_scale: Floats
    add_noise: Floats
    known: Floats
    log_low: Floats
    log_high: Floats
    clip: Floats
    shift: Floats

    def __post_init__(self) -> None:
        check_table({name: getattr(self, name) for name in DTYPES})
        for name in DTYPES:
            getattr(self, name).setflags(write=False)

    @classmethod
    @parser(BundleError, "path", "a table of sampling plans")
    def load(cls, path: str | os.PathLike[str], steps: Sequence[int] | None = None) -> PlanTable:
        """Read and check a table; `steps` are the step counts that the manifest says it has.

        Raises:
            BundleError: says what was expected and what was found.
        """
        return cls.decoded(read_regular(path, LARGEST_DOCUMENT), Path(path).name, steps)

    @classmethod
    def decoded(cls, data: bytes, label: str, steps: Sequence[int] | None = None) -> PlanTable:
        """Return the table of a document, checked.

        Args:
            label: what errors call it.
            steps: the step counts that it is said to have.

        Raises:
            BundleError: says what was expected and what was found.
            msgspec.DecodeError: it is no such document.
        """
        try:
            table = cls(**decode(data))
        except BundleError as error:
            raise BundleError(f"{label}: {error}") from error
        if steps is not None and table.step_counts != tuple(steps):
            found = f"expected the steps {list(steps)}, found {list(table.step_counts)}"
            raise BundleError(f"{label}: {found}; export the bundle again")
        return table

    def encoded(self) -> bytes:
        """Return the table as JSON; equal tables give equal bytes."""
        return encode({name: getattr(self, name) for name in DTYPES})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table; equal tables give equal files.

        Raises:
            BundleError: the file would be larger than what `load` reads.
            OSError: it cannot be written.
        """
        data = self.encoded()
        if len(data) > LARGEST_DOCUMENT:
            raise BundleError(
                f"{Path(path).name}: {len(data):,} bytes of sampling plans, expected at most "
                f"{LARGEST_DOCUMENT:,}; take fewer step counts"
            )
        Path(path).write_bytes(data)

    @cached_property
    def step_counts(self) -> tuple[int, ...]:
        """Return the step counts there are plans for, ascending."""
        return tuple(int(count) for count in self.steps[: len(self.steps) // len(self.shifts)])

    @cached_property
    def _places(self) -> dict[int, int]:
        """Return where each step count stands among them."""
        return {count: place for place, count in enumerate(self.step_counts)}

    @cached_property
    def shifts(self) -> tuple[float, ...]:
        """Return the shifts there are plans for, ascending; one where plans do not depend on it."""
        return tuple(float(each) for each in np.unique(self.shift))

    @property
    def window(self) -> int:
        """Return W: after so many evaluations a run that started late equals one from the start."""
        return int(self.rows.shape[1]) - 1

    def starts(self, num_inference_steps: int) -> tuple[int, ...]:
        """Return the evaluations at which a run of so many steps may start; 0 is always one."""
        first, last = self._span(num_inference_steps)
        finite = np.isfinite(self.add_noise[first:last, 0])
        finite[0] = True
        return tuple(int(start) for start in np.flatnonzero(finite))

    def plan(
        self, num_inference_steps: int, start: int = 0, shift: float | None = None
    ) -> SamplingPlan:
        """Return the plan for one step count, from evaluation `start` on.

        `shift` is needed where the table has several.

        Raises `PlanNotFound` if the table has no such step count, `InputError` if no run may
        start there, or the shift is outside of the table's.
        """
        sheets = range(len(self.shifts))
        plans = [self._plan(num_inference_steps, start, sheet) for sheet in sheets]
        return plans[0] if len(plans) == 1 else interpolated(plans, self.shifts, shift)

    def _plan(self, num_inference_steps: int, start: int, sheet: int) -> SamplingPlan:
        """Return the plan of one of the shifts."""
        first, last = self._span(num_inference_steps, sheet)
        if start not in self.starts(num_inference_steps):
            raise InputError(
                f"a run of {num_inference_steps} steps cannot start at evaluation {start}; "
                f"possible: {ranges(self.starts(num_inference_steps))}"
            )
        at = slice(first + start, last)
        age = np.minimum(np.arange(last - first - start), self.window)
        row = self.rows[at][np.arange(len(age)), age]
        added = self.add_noise[first + start]
        kind, limit, ratio = (float(value) for value in self.clip)
        return SamplingPlan(
            num_inference_steps=num_inference_steps,
            start=start,
            timesteps=self.timesteps[at],
            input_scale=self.input_scale[at],
            noise_draws=self.noise_draws[at] != 0,
            clip=Clip(ClipKind(int(kind)), limit, ratio),
            init_noise_scale=float(self.init_noise_scale[self._index(num_inference_steps, sheet)]),
            add_noise=(float(added[0]), float(added[1])) if np.isfinite(added[0]) else None,
            known=self.known[at],
            log_low=self.log_low[at],
            log_high=self.log_high[at],
            **{name: getattr(self, name)[row] for name in ROW_FIELDS},
        )

    def plan_from_step(
        self, num_inference_steps: int, step: int, shift: float | None = None
    ) -> SamplingPlan:
        """Return the plan that leaves out the first steps.

        Each step has as many evaluations as there are between two starts.

        Raises as `plan` does.
        """
        if step == 0:
            return self.plan(num_inference_steps, 0, shift)
        starts = self.starts(num_inference_steps)
        if len(starts) == 1:
            raise InputError("this scheduler starts from noise only; take another with `scheduler`")
        order = min(after - before for before, after in pairwise(starts))
        return self.plan(num_inference_steps, step * order, shift)

    def plan_from_timestep(
        self, num_inference_steps: int, timestep: float, shift: float | None = None
    ) -> SamplingPlan:
        """Return the plan of the evaluations whose timestep is below `timestep`.

        It begins at the first that a run may start at.

        Raises `PlanNotFound` if the table has no such step count, `InputError` if no run may
        start there.
        """
        whole = self.plan(num_inference_steps, 0, shift)
        below = int(np.count_nonzero(whole.timesteps < timestep))
        first = whole.num_evaluations - below
        starts = [each for each in self.starts(num_inference_steps) if each <= first]
        if below < 1 or (first and len(starts) == 1):
            raise InputError(
                "this scheduler cannot begin there: take another one, more steps, or a smaller "
                "denoising_start"
            )
        return self.plan(num_inference_steps, starts[-1], shift)

    def merge(self, other: PlanTable) -> PlanTable:
        """Return a table with the plans of both; where both have a step count, `other` wins."""
        theirs = set(other.step_counts)
        kept = [part for part in self.parts() if int(part.steps[0]) not in theirs]
        return join([*kept, *other.parts()])

    def of(self, num_inference_steps: int) -> PlanTable:
        """Return the table of the plans of one step count; raise `PlanNotFound` without any."""
        places = (self._index(num_inference_steps, sheet) for sheet in range(len(self.shifts)))
        return join(self._part(place) for place in places)

    def of_singles(self) -> PlanTable:
        """Return the table with numbers of few digits, which float32 rounds to the same numbers.

        Loops compute in float32, with coefficients that are rounded to it (docs/bundle-format.md,
        section 9.1); the other digits would be two thirds of a bundle's plans.
        """
        names = ("init_noise_scale", "add_noise", *_MIXED)
        numbers: dict[str, Any] = {name: _of_singles(getattr(self, name)) for name in names}
        return join([replace(self, **numbers)])

    def parts(self) -> list[PlanTable]:
        """Return the tables of one plan each."""
        count = len(self.steps)
        return [self] if count == 1 else [self._part(index) for index in range(count)]

    def _part(self, index: int) -> PlanTable:
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        used, rows = np.unique(self.rows[first:last], return_inverse=True)
        return PlanTable(
            steps=self.steps[index : index + 1],
            offsets=np.array([0, last - first], np.int32),
            timesteps=self.timesteps[first:last],
            input_scale=self.input_scale[first:last],
            noise_draws=self.noise_draws[first:last],
            rows=rows.reshape(last - first, -1).astype(np.int32),
            init_noise_scale=self.init_noise_scale[index : index + 1],
            add_noise=self.add_noise[first:last],
            known=self.known[first:last],
            log_low=self.log_low[first:last],
            log_high=self.log_high[first:last],
            clip=self.clip,
            shift=self.shift[index : index + 1],
            **{name: getattr(self, name)[used] for name in ROW_FIELDS},
        )

    def _index(self, num_inference_steps: int, sheet: int = 0) -> int:
        """Return the place of a plan; raise `PlanNotFound` where there is none."""
        if num_inference_steps not in self._places:
            raise PlanNotFound(
                f"no sampling plan for {num_inference_steps} steps; there are plans for "
                f"{ranges(self.step_counts)}; add one with: latentc schedule BUNDLE "
                f"--scheduler NAME --steps {num_inference_steps}"
            )
        return sheet * len(self.step_counts) + self._places[num_inference_steps]

    def _span(self, num_inference_steps: int, sheet: int = 0) -> tuple[int, int]:
        index = self._index(num_inference_steps, sheet)
        return int(self.offsets[index]), int(self.offsets[index + 1])


def interpolated(
    plans: Sequence[SamplingPlan], shifts: Sequence[float], shift: float | None
) -> SamplingPlan:
    """Return the plan of a shift between those of `plans`.

    Each number of it is that of the polynomial through theirs (in Lagrange's form).

    Raises `InputError` if no shift is given, or one outside of `shifts`.
    """
    if shift is None or not shifts[0] <= shift <= shifts[-1]:
        raise InputError(
            f"these sampling plans depend on the image's size, by a shift from {shifts[0]:g} to "
            f"{shifts[-1]:g}; found {'none' if shift is None else format(shift, 'g')}"
        )
    nodes = np.array(shifts)
    others = [np.delete(nodes, index) for index in range(len(nodes))]
    weights = np.array(
        [np.prod((shift - rest) / (node - rest)) for node, rest in zip(nodes, others, strict=True)]
    )

    def mixed(name: str) -> Any:
        return np.tensordot(weights, np.array([getattr(plan, name) for plan in plans]), 1)

    added = None if plans[0].add_noise is None else mixed("add_noise")
    return replace(
        plans[0],
        init_noise_scale=float(mixed("init_noise_scale")),
        add_noise=None if added is None else (float(added[0]), float(added[1])),
        **{name: mixed(name) for name in _MIXED},
    )


def join(tables: Iterable[PlanTable]) -> PlanTable:
    """Return one table out of several of one scheduler, whose step counts or shifts differ.

    Rows that are equal to the last bit are stored once. Raises `ValueError` if the tables
    share a step count of one shift or clip differently.
    """
    parts = sorted((part for table in tables for part in table.parts()), key=_place)
    if len({_place(part) for part in parts}) != len(parts):
        raise ValueError("the tables share a step count")
    slots = max(part.state.shape[1] for part in parts)
    window = max(part.window for part in parts)
    column = np.arange(window + 1)
    offsets = np.cumsum([0, *(len(part.state) for part in parts)])
    rows = [
        part.rows[:, np.minimum(column, part.window)] + offset
        for part, offset in zip(parts, offsets[:-1], strict=True)
    ]
    coefficients = {
        name: np.concatenate([_padded(part, name, slots) for part in parts]) for name in ROW_FIELDS
    }
    kept, index = _distinct(coefficients)
    lengths = [len(part.timesteps) for part in parts]
    per_plan = ("steps", "init_noise_scale", "shift")
    per_evaluation = ("timesteps", "input_scale", "noise_draws", "add_noise", "known", *LEARNED)
    fields: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (*per_plan, *per_evaluation)
    }
    fields |= {name: values[kept] for name, values in coefficients.items()}
    return PlanTable(
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        rows=index[np.concatenate(rows)],
        clip=_common_clip(parts),
        **fields,
    )


def _of_singles(values: Floats) -> Floats:
    """Return for each number the one of fewest decimal digits that has the same float32; numbers
    beyond float32, and NaN, stay."""
    distinct, places = np.unique(values, return_inverse=True)
    with np.errstate(over="ignore"):
        singles = distinct.astype(np.float32)
    short = np.array([float(str(single)) for single in singles])
    same = np.isfinite(singles) & (short.astype(np.float32) == singles)
    return np.where(same, short, distinct)[places].reshape(values.shape)


def _place(part: PlanTable) -> tuple[float, int]:
    return float(part.shift[0]), int(part.steps[0])


def _common_clip(parts: Iterable[PlanTable]) -> Floats:
    used = {part.clip.tobytes(): part.clip for part in parts if part.clip[0] != ClipKind.NONE}
    if len(used) > 1:
        raise ValueError("the tables limit the clean sample in different ways")
    return next(iter(used.values()), np.zeros(3))


def _padded(table: PlanTable, name: str, slots: int) -> Floats:
    field: Floats = getattr(table, name) + 0.0  # turns -0.0 into 0.0
    grow = 0 if name == "clean_from" else slots - table.state.shape[1]
    return np.pad(field, [(0, 0)] + [(0, grow)] * (field.ndim - 1))


def _distinct(coefficients: Mapping[str, Floats]) -> tuple[Ints, Ints]:
    """Return the rows to keep, in order of appearance, and where each row is among them."""
    count = len(coefficients["state"])
    flat = np.concatenate([field.reshape(count, -1) for field in coefficients.values()], axis=1)
    seen: dict[bytes, int] = {}
    kept: list[int] = []
    index: list[int] = []
    for i, row in enumerate(flat):
        index.append(seen.setdefault(row.tobytes(), len(seen)))
        if index[-1] == len(kept):
            kept.append(i)
    return np.array(kept, np.int32), np.array(index, np.int32)
