"""Bad tables of sampling plans."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.bad_bundle import BadBundle, case


def _document(bad: BadBundle) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(bad.read(bad.plans()))
    return document


def _changed(bad: BadBundle, **changes: Any) -> None:
    bad.put(bad.plans(), json.dumps({**_document(bad), **changes}).encode())


def _first_timestep(bad: BadBundle, text: bytes) -> None:
    """Put a text that need not be JSON in the place of the first timestep."""
    before, after = json.dumps({**_document(bad), "timesteps": ["here"]}).encode().split(b'"here"')
    bad.put(bad.plans(), before + text + after)


@case("plans", "not a table of sampling plans")
def plans_not_json(bad: BadBundle) -> None:
    """The table is no JSON."""
    bad.put(bad.plans(), b"PK nothing")


@case("plans", "not a table of sampling plans")
def plans_cut_short(bad: BadBundle) -> None:
    """The table's document ends early."""
    bad.put(bad.plans(), bad.read(bad.plans())[:-40])


@case("plans", "not a table of sampling plans")
def plans_empty(bad: BadBundle) -> None:
    """The table is a file without content."""
    bad.put(bad.plans(), b"")


@case("plans", "state")
def plans_without_a_member(bad: BadBundle) -> None:
    """A member is missing."""
    document = _document(bad)
    del document["state"]
    bad.put(bad.plans(), json.dumps(document).encode())


@case("plans", "unknown field")
def plans_with_another_member(bad: BadBundle) -> None:
    """There is a member that the format does not have."""
    _changed(bad, other=[0.0])


@case("plans", "expected at most")
def plans_of_many_bytes(bad: BadBundle) -> None:
    """The document has 65 MiB, of spaces for the most part."""
    bad.put(bad.plans(), bad.read(bad.plans()).ljust(65 << 20))


@case("plans", "not a table of sampling plans")
def plans_nested_deeply(bad: BadBundle) -> None:
    """A list stands in a list, a hundred thousand times."""
    _first_timestep(bad, b"[" * 100_000 + b"]" * 100_000)


@case("plans", "state")
def plans_of_another_depth(bad: BadBundle) -> None:
    """Matrices have one dimension too many."""
    _changed(bad, state=[[matrix] for matrix in _document(bad)["state"]])


@case("plans", "state: expected lists of one length")
def plans_with_ragged_lists(bad: BadBundle) -> None:
    """A row of a matrix has one number more than the others."""
    state = _document(bad)["state"]
    state[-1][-1].append(0.0)
    _changed(bad, state=state)


@case("plans", "shape")
def plans_of_another_length(bad: BadBundle) -> None:
    """A list is shorter than those that it stands beside."""
    _changed(bad, timesteps=_document(bad)["timesteps"][:-1], input_scale=[1.0])


@case("plans", "clip")
def plans_without_numbers(bad: BadBundle) -> None:
    """A list is empty."""
    _changed(bad, clip=[])


@case("plans", "rows")
def plans_with_rows_beyond_the_table(bad: BadBundle) -> None:
    """An index leads beyond the rows."""
    rows = _document(bad)["rows"]
    rows[0][0] = 10**6
    _changed(bad, rows=rows)


@case("plans", "rows")
def plans_with_negative_rows(bad: BadBundle) -> None:
    """An index is negative, which some languages count from the end."""
    rows = _document(bad)["rows"]
    rows[0][0] = -1
    _changed(bad, rows=rows)


@case("plans", "rows")
def plans_with_rows_that_wrap_around(bad: BadBundle) -> None:
    """An index is 0 in 32 bits, and 2^32 in more."""
    rows = _document(bad)["rows"]
    rows[0][0] = 1 << 32
    _changed(bad, rows=rows)


@case("plans", "offsets")
def plans_with_offsets_beyond_the_table(bad: BadBundle) -> None:
    """A plan ends behind the last evaluation."""
    offsets = _document(bad)["offsets"]
    offsets[-1] += 7
    _changed(bad, offsets=offsets)


@case("plans", "not a table of sampling plans")
def plans_with_nan(bad: BadBundle) -> None:
    """A number is NaN, which some readers take though it is no JSON."""
    _first_timestep(bad, b"NaN")


@case("plans", "not a table of sampling plans")
def plans_with_infinity(bad: BadBundle) -> None:
    """A number is Infinity, which some readers take though it is no JSON."""
    _first_timestep(bad, b"-Infinity")


@case("plans", "out of range")
def plans_with_a_huge_number(bad: BadBundle) -> None:
    """A number is beyond float64, and infinite in many readers."""
    _first_timestep(bad, b"1e999")


@case("plans", "out of range")
def plans_with_many_digits(bad: BadBundle) -> None:
    """A number has a hundred thousand digits."""
    _first_timestep(bad, b"9" * 100_000)


@case("plans", "state")
def plans_with_null(bad: BadBundle) -> None:
    """A coefficient is null."""
    state = _document(bad)["state"]
    state[0][0][0] = None
    _changed(bad, state=state)


@case("plans", "known")
def plans_with_half_a_pair(bad: BadBundle) -> None:
    """One number of a pair is null."""
    known = _document(bad)["known"]
    known[0] = [None, 1.0]
    _changed(bad, known=known)


@case("plans", "timesteps")
def plans_of_texts(bad: BadBundle) -> None:
    """Numbers are written as texts."""
    _changed(bad, timesteps=[str(value) for value in _document(bad)["timesteps"]])


@case("plans", "noise_draws")
def plans_of_truth_values(bad: BadBundle) -> None:
    """An array of 0 and 1 is one of false and true."""
    _changed(bad, noise_draws=[bool(value) for value in _document(bad)["noise_draws"]])


@case("plans", "steps")
def plans_of_fractions(bad: BadBundle) -> None:
    """Step counts have a fraction, be it zero."""
    _changed(bad, steps=[float(value) for value in _document(bad)["steps"]])


@case("plans", "steps")
def plans_of_other_steps(bad: BadBundle) -> None:
    """The table has other step counts than the manifest says."""
    steps = _document(bad)["steps"]
    steps[-1] += 1
    _changed(bad, steps=steps)


@case("plans", "expected both of log_low, log_high")
def plans_with_one_limit(bad: BadBundle) -> None:
    """Variances have a smallest one and no largest."""
    _changed(bad, log_low=[None] * len(_document(bad)["timesteps"]))


@case("plans", "log_low")
def plans_with_limits_in_other_places(bad: BadBundle) -> None:
    """A variance has a largest one where it has no smallest."""
    count = len(_document(bad)["timesteps"])
    _changed(bad, log_low=[None] * count, log_high=[*[None] * (count - 1), 0.0])


@case("plans", "log_low")
def plans_with_limits_of_no_noise(bad: BadBundle) -> None:
    """A variance is that of noise which is not drawn."""
    count = len(_document(bad)["timesteps"])
    _changed(bad, log_low=[-1.0] * count, log_high=[0.0] * count, noise_draws=[0] * count)
