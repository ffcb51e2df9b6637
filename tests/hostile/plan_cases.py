"""Bad tables of sampling plans."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.hostile.bad_bundle import BadBundle, case


def _arrays(bad: BadBundle) -> dict[str, Any]:
    with np.load(io.BytesIO(bad.read(bad.plans())), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _put(bad: BadBundle, arrays: Mapping[str, Any]) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    bad.put(bad.plans(), data.getvalue())


def _changed(bad: BadBundle, **changes: Any) -> None:
    _put(bad, {**_arrays(bad), **changes})


@case("plans", ".npz")
def plans_not_a_zip(bad: BadBundle) -> None:
    """The table is no archive."""
    bad.put(bad.plans(), b"PK nothing")


@case("plans", ".npz")
def plans_cut_short(bad: BadBundle) -> None:
    """The table's archive ends early."""
    bad.put(bad.plans(), bad.read(bad.plans())[:-40])


@case("plans", "state")
def plans_pickled(bad: BadBundle) -> None:
    """An array is one of Python objects: a pickle, which runs code."""

    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(bad.outside / "pwned"), "w"))

    _changed(bad, state=np.array([Trap()], dtype=object))


@case("plans", "missing arrays")
def plans_without_an_array(bad: BadBundle) -> None:
    """An array is missing."""
    arrays = _arrays(bad)
    del arrays["state"]
    _put(bad, arrays)


@case("plans", "unexpected")
def plans_with_another_array(bad: BadBundle) -> None:
    """There is an array that the format does not have."""
    _changed(bad, other=np.zeros(3))


@case("plans", "the limit is")
def plans_that_unpack_to_much(bad: BadBundle) -> None:
    """Two hundred kilobytes unpack to 200 MiB."""
    _changed(bad, state=np.zeros((200 << 17, 1, 1)))


@case("plans", ".npz")
def plans_that_lie_about_their_size(bad: BadBundle) -> None:
    """A member declares a few bytes and unpacks to more."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in _arrays(bad).items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    raw = bytearray(data.getvalue())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (16).to_bytes(4, "little")
    bad.put(bad.plans(), bytes(raw))


@case("plans", "rows")
def plans_with_rows_beyond_the_table(bad: BadBundle) -> None:
    """An index leads beyond the rows."""
    rows = _arrays(bad)["rows"].copy()
    rows[0, 0] = 10**6
    _changed(bad, rows=rows)


@case("plans", "rows")
def plans_with_negative_rows(bad: BadBundle) -> None:
    """An index is negative, which some languages count from the end."""
    rows = _arrays(bad)["rows"].copy()
    rows[0, 0] = -1
    _changed(bad, rows=rows)


@case("plans", "offsets")
def plans_with_offsets_beyond_the_table(bad: BadBundle) -> None:
    """A plan ends behind the last evaluation."""
    offsets = _arrays(bad)["offsets"].copy()
    offsets[-1] += 7
    _changed(bad, offsets=offsets)


@case("plans", "NaN or infinity")
def plans_with_nan(bad: BadBundle) -> None:
    """A coefficient is NaN."""
    state = _arrays(bad)["state"].copy()
    state[0] = np.nan
    _changed(bad, state=state)


@case("plans", "timesteps")
def plans_of_another_type(bad: BadBundle) -> None:
    """An array has single precision."""
    _changed(bad, timesteps=_arrays(bad)["timesteps"].astype(np.float32))


@case("plans", "steps")
def plans_of_other_steps(bad: BadBundle) -> None:
    """The table has other step counts than the manifest says."""
    steps = _arrays(bad)["steps"].copy()
    steps[-1] += 1
    _changed(bad, steps=steps)
