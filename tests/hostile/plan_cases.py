"""Bad tables of sampling plans."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.sampling.plan_archive import read_all_plans
from tests.hostile.bad_bundle import BadBundle, case


def _table(bad: BadBundle) -> bytes:
    """Return the default scheduler's plans, which the bundle has in an archive, as one document."""
    manifest = Manifest.load(bad.root)
    return read_all_plans(bad.root / bad.plans(), manifest.schedules[0]).encoded()


def _put(bad: BadBundle, data: bytes, archive: bool = False) -> None:
    """Replace the default scheduler's file."""
    bad.put(bad.plans(), data)
    bad.edit(lambda document: document["schedules"][0].update(archive=archive))


def _document(bad: BadBundle) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_table(bad))
    return document


def _changed(bad: BadBundle, **changes: Any) -> None:
    _put(bad, json.dumps({**_document(bad), **changes}).encode())


def _first_timestep(bad: BadBundle, text: bytes) -> None:
    """Put a text that need not be JSON in the place of the first timestep."""
    before, after = json.dumps({**_document(bad), "timesteps": ["here"]}).encode().split(b'"here"')
    _put(bad, before + text + after)


@case("plans", "not a table of sampling plans")
def plans_not_json(bad: BadBundle) -> None:
    """The table is no JSON."""
    _put(bad, b"PK nothing")


@case("plans", "not a table of sampling plans")
def plans_cut_short(bad: BadBundle) -> None:
    """The table's document ends early."""
    _put(bad, _table(bad)[:-40])


@case("plans", "not a table of sampling plans")
def plans_empty(bad: BadBundle) -> None:
    """The table is a file without content."""
    _put(bad, b"")


@case("plans", "state")
def plans_without_a_member(bad: BadBundle) -> None:
    """A member is missing."""
    document = _document(bad)
    del document["state"]
    _put(bad, json.dumps(document).encode())


@case("plans", "unknown field")
def plans_with_another_member(bad: BadBundle) -> None:
    """There is a member that the format does not have."""
    _changed(bad, other=[0.0])


@case("plans", "expected at most")
def plans_of_many_bytes(bad: BadBundle) -> None:
    """The document has 65 MiB, of spaces for the most part."""
    _put(bad, _table(bad).ljust(65 << 20))


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


def _archived(
    bad: BadBundle, members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED
) -> None:
    """Put an archive in the place of the default scheduler's table."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    _put(bad, data.getvalue(), archive=True)


def _members(bad: BadBundle) -> dict[str, bytes]:
    """Return the members of the default scheduler's archive."""
    with zipfile.ZipFile(bad.root / bad.plans()) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@case("plans", "not an archive of sampling plans")
def plans_archive_no_zip(bad: BadBundle) -> None:
    """The archive of tables is a table."""
    _put(bad, _table(bad), archive=True)


@case("plans", "expected plans of the steps")
def plans_archive_without_a_step(bad: BadBundle) -> None:
    """The archive has no table for one of the step counts."""
    members = _members(bad)
    _archived(bad, dict(list(members.items())[1:]))


@case("plans", "expected plans of the steps")
def plans_archive_with_another_member(bad: BadBundle) -> None:
    """The archive has a member that leads out of it."""
    _archived(bad, {**_members(bad), "../outside.json": b"{}"})


@case("plans", "expected the steps")
def plans_archive_of_other_steps(bad: BadBundle) -> None:
    """A table of the archive has other step counts than its name says."""
    _archived(bad, dict.fromkeys(_members(bad), _table(bad)))


@case("plans", "expected at most")
def plans_archive_that_unpack_to_much(bad: BadBundle) -> None:
    """A table of the archive unpacks to 65 MiB."""
    _archived(bad, dict.fromkeys(_members(bad), b" " * (65 << 20)))


@case("plans", "neither stored nor deflated")
def plans_archive_packed_otherwise(bad: BadBundle) -> None:
    """The archive's members are packed in a way that few readers know."""
    _archived(bad, _members(bad), zipfile.ZIP_BZIP2)
