"""This module checks a table of sampling plans: its arrays, and what their values may be."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.errors import BundleError
from latentc.runtimes.sampling.step_limits import MAX_STEPS

DTYPES = {
    "steps": "<i4",
    "offsets": "<i4",
    "timesteps": "<f8",
    "input_scale": "<f8",
    "noise_draws": "|u1",
    "rows": "<i4",
    "state": "<f8",
    "prediction": "<f8",
    "clean": "<f8",
    "noise": "<f8",
    "clean_from": "<f8",
    "init_noise_scale": "<f8",
    "add_noise": "<f8",
    "known": "<f8",
    "log_low": "<f8",
    "log_high": "<f8",
    "clip": "<f8",
    "shift": "<f8",
}
ROW_FIELDS = ("state", "prediction", "clean", "noise", "clean_from")
# Members that a file leaves out where all their numbers are NaN: those of a learned variance.
LEARNED = ("log_low", "log_high")
MAX_SLOTS = 64
MAX_SHIFTS = 64
MAX_NUMBERS = 1 << 24  # of the `state` of one plan: a small table can stand for large plans


class ClipKind(IntEnum):
    """A `ClipKind` says how a plan limits the predicted clean sample."""

    NONE = 0
    RANGE = 1  # to [-limit, limit]
    DYNAMIC = 2  # per image: s = quantile(|v|, ratio) within [1, limit]; clip to ±s, divide by s


def check_table(arrays: Mapping[str, Array]) -> None:
    """Check everything that the sampling loop relies on; raises `BundleError`.

    `arrays` has the names of `DTYPES`. A table that passes cannot fail later.
    """
    for name, dtype in DTYPES.items():
        found = arrays[name].dtype
        _expect(found == np.dtype(dtype), f"{name}: dtype {found}, expected {dtype}")
    _check_shapes({name: arrays[name].shape for name in DTYPES})
    _check_indices(arrays)
    _check_coefficients(arrays)


def _expect(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise BundleError(message)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    plans, evaluations = shapes["steps"][:1], shapes["timesteps"][:1]
    rows, slots = shapes["state"][:1], shapes["state"][1:2]
    expected: dict[str, tuple[int, ...]] = {
        "steps": plans,
        "offsets": tuple(count + 1 for count in plans),
        "timesteps": evaluations,
        "input_scale": evaluations,
        "noise_draws": evaluations,
        "rows": (*evaluations, *shapes["rows"][1:2]),
        "state": (*rows, *slots, *slots),
        "prediction": (*rows, *slots),
        "clean": (*rows, *slots),
        "noise": (*rows, *slots),
        "clean_from": (*rows, 2),
        "init_noise_scale": plans,
        "add_noise": (*evaluations, 2),
        "known": (*evaluations, 2),
        **dict.fromkeys(LEARNED, evaluations),
        "clip": (3,),
        "shift": plans,
    }
    dimensions = {"rows": 2, "state": 3, "prediction": 2, "clean": 2, "noise": 2}
    dimensions |= {"clean_from": 2, "add_noise": 2, "known": 2}
    for name, shape in shapes.items():
        right = shape == expected[name] and len(shape) == dimensions.get(name, 1)
        _expect(right and 0 not in shape, f"{name}: shape {shape}, expected {expected[name]}")
    _expect(slots[0] <= MAX_SLOTS, f"state: {slots[0]} slots, expected at most {MAX_SLOTS}")


def _check_indices(arrays: Mapping[str, Array]) -> None:
    steps, offsets = arrays["steps"].astype(np.int64), arrays["offsets"].astype(np.int64)
    evaluations, row_count = len(arrays["timesteps"]), len(arrays["state"])
    _check_plans(arrays, steps, np.diff(offsets))
    _expect(
        offsets[0] == 0 and offsets[-1] == evaluations and (np.diff(offsets) > 0).all(),
        f"offsets: expected increasing numbers from 0 to {evaluations}",
    )
    slots = arrays["state"].shape[1]
    _expect(
        int(np.diff(offsets).max()) * slots**2 <= MAX_NUMBERS,
        f"offsets: a plan of more than {MAX_NUMBERS // slots**2} evaluations for {slots} slots",
    )
    rows = arrays["rows"]
    _expect(
        (rows >= 0).all() and (rows < row_count).all(),
        f"rows: an index is outside 0 .. {row_count - 1}",
    )
    _expect((arrays["noise_draws"] <= 1).all(), "noise_draws: expected 0 or 1")


def _check_plans(arrays: Mapping[str, Array], steps: Array, evaluations: Array) -> None:
    """Check that every shift has plans of the same step counts; only coefficients may differ."""
    _expect(np.isfinite(arrays["shift"]).all(), "shift: NaN or infinity")
    shifts, counts = np.unique(arrays["shift"], return_counts=True)
    each = int(counts[0])
    _expect(
        (counts == each).all() and (np.repeat(shifts, each) == arrays["shift"]).all(),
        "shift: expected increasing numbers, each for as many plans",
    )
    _expect(
        (steps >= 1).all() and (steps <= MAX_STEPS).all() and (np.diff(steps[:each]) > 0).all(),
        f"steps: expected increasing numbers within 1 .. {MAX_STEPS}",
    )
    _expect(len(shifts) <= MAX_SHIFTS, f"shift: more than {MAX_SHIFTS} of them")
    for name, values in (
        ("steps", steps),
        ("offsets", evaluations),
        ("noise_draws", arrays["noise_draws"]),
        ("add_noise", np.isnan(arrays["add_noise"])),
        ("known", np.isnan(arrays["known"])),
        ("log_low", np.isnan(arrays["log_low"])),
    ):
        whole = len(values) % len(shifts) == 0
        sheets = values.reshape(len(shifts), -1) if whole else values
        _expect(whole and (sheets == sheets[0]).all(), f"{name}: expected the same for all shifts")


def _check_coefficients(arrays: Mapping[str, Array]) -> None:
    for name in ("timesteps", "input_scale", "init_noise_scale", "clip", *ROW_FIELDS):
        _expect(np.isfinite(arrays[name]).all(), f"{name}: NaN or infinity")
    for name in ("add_noise", "known"):
        unknown = np.isnan(arrays[name])
        _expect(
            not np.isinf(arrays[name]).any() and (unknown[:, 0] == unknown[:, 1]).all(),
            f"{name}: expected two finite numbers or two NaN per evaluation",
        )
    _check_learned(arrays)
    kind, limit, ratio = (float(value) for value in arrays["clip"])
    _expect(kind in tuple(ClipKind), f"clip: unknown kind {kind}")
    _expect(kind != ClipKind.RANGE or limit > 0, f"clip: limit {limit}, expected more than 0")
    _expect(
        kind != ClipKind.DYNAMIC or (limit >= 1 and 0 <= ratio <= 1),
        f"clip: limit {limit}, expected 1 or more; ratio {ratio}, expected 0 .. 1",
    )
    _expect(
        kind != ClipKind.NONE or not arrays["clean"].any(),
        "clean: a row uses the clipped sample, but the table does not clip",
    )
    draws = arrays["noise_draws"][:, np.newaxis] != 0
    uses = np.any(arrays["noise"] != 0, axis=1)[arrays["rows"]]
    _expect((draws | ~uses).all(), "noise: a row uses noise that its evaluation does not draw")


def _check_learned(arrays: Mapping[str, Array]) -> None:
    """Check the limits of a learned variance, which are those of noise that is drawn."""
    low, high = (arrays[name] for name in LEARNED)
    learned = ~np.isnan(low)
    _expect(
        not np.isinf(low).any() and not np.isinf(high).any() and (learned == ~np.isnan(high)).all(),
        "log_low: expected a finite number where log_high has one, else NaN in both",
    )
    _expect(
        (arrays["noise_draws"][learned] == 1).all(),
        "log_low: limits of noise that its evaluation does not draw",
    )
