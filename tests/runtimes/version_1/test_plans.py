"""Tables of sampling plans of bundles of format 1: the archive, and hostile archives."""

from __future__ import annotations

import io
import random
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentc.runtimes.errors import BundleError, PlanNotFound
from latentc.runtimes.sampling.plan import PlanTable, join
from latentc.runtimes.sampling.plan_schema import DTYPES, LEARNED
from latentc.runtimes.storage.npz import write_arrays
from latentc.runtimes.version_1.plans import read_plans
from tests.runtimes.sampling.test_plan import BAD_VALUES, arrays_of, table_of

OLD = tuple(name for name in DTYPES if name not in LEARNED)


def save_plans(path: Path, table: PlanTable) -> Path:
    """Write a table as format 1 holds it, and return `path`."""
    write_arrays(path, {name: getattr(table, name) for name in OLD})
    return path


def test_a_file_gives_the_table_back(tmp_path: Path) -> None:
    table = join([table_of(steps=n, seed=n) for n in (3, 5)])
    found = read_plans(save_plans(tmp_path / "a.npz", table))
    for name in OLD:
        np.testing.assert_array_equal(getattr(found, name), getattr(table, name))
    assert not found.plan(5).learns_variance
    assert not found.state.flags.writeable


@pytest.mark.parametrize("case", [case for case in BAD_VALUES if "variance" not in case])
def test_bad_values_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = BAD_VALUES[case]
    arrays = arrays_of()
    change(arrays)
    np.savez_compressed(tmp_path / "bad.npz", **{name: arrays[name] for name in OLD})
    with pytest.raises(BundleError, match=message):
        read_plans(tmp_path / "bad.npz")


def _zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def _members(path: Path) -> dict[str, bytes]:
    save_plans(path, table_of())
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    members = _members(tmp_path / "good.npz")
    members["state.npy"] = bytes(80 << 20)
    with pytest.raises(BundleError, match="limit"):
        read_plans(_zip(tmp_path / "bomb.npz", members))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999, 9999999999), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -10), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True,), }",
        "{'descr': '<f8', 'fortran_order': True, 'shape': (10, 2, 2), }",
        "{'descr': '>f8', 'fortran_order': False, 'shape': (10, 2, 2), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (10, 2, 2), }",
        "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (10, 2, 2), }",
        "{'descr': '<f8', 'shape': (10, 2, 2), }",
        "__import__('os').system('true')",
        "((((((((",
        "",
    ],
)
def test_odd_headers_are_refused(header: str, tmp_path: Path) -> None:
    members = _members(tmp_path / "good.npz")
    data = header.encode() + b"\n"
    head = b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data
    members["state.npy"] = head + bytes(320)
    with pytest.raises(BundleError):
        read_plans(_zip(tmp_path / "odd.npz", members))


def test_missing_additional_and_doubled_members_are_refused(tmp_path: Path) -> None:
    members = _members(tmp_path / "good.npz")
    fewer = {name: data for name, data in members.items() if name != "rows.npy"}
    with pytest.raises(BundleError, match=r"missing arrays \['rows.npy'\]"):
        read_plans(_zip(tmp_path / "fewer.npz", fewer))
    with pytest.raises(BundleError, match="unexpected"):
        read_plans(_zip(tmp_path / "more.npz", {**members, "../evil.npy": b""}))
    with pytest.raises(BundleError, match="neither stored nor deflated"):
        read_plans(_zip(tmp_path / "bz.npz", members, zipfile.ZIP_BZIP2))
    with pytest.raises(BundleError, match="no such file"):
        read_plans(tmp_path / "none.npz")
    with pytest.raises(BundleError):
        read_plans(tmp_path)


def test_random_damage_is_a_bundle_error_or_harmless(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    save_plans(good, table_of())
    data, path = good.read_bytes(), tmp_path / "bad.npz"
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        if rng.random() < 0.3:
            del broken[rng.randrange(len(broken)) :]
        for _ in range(rng.choice((0, 1, 1, 4, 40))):
            if broken:
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(bytes(broken))
        with suppress(BundleError, PlanNotFound):
            read_plans(path).plan(5)


def test_random_damage_inside_members_is_a_bundle_error_or_harmless(tmp_path: Path) -> None:
    members = _members(tmp_path / "good.npz")
    rng = random.Random(1)
    for _ in range(300):
        broken = {name: bytearray(data) for name, data in members.items()}
        for _ in range(rng.choice((1, 1, 3))):
            target = broken[rng.choice(list(broken))]
            # mostly the header, where the meaning is
            target[rng.randrange(min(len(target), rng.choice((64, 10_000))))] = rng.randrange(256)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in broken.items():
                archive.writestr(name, bytes(content))
        path = tmp_path / "bad.npz"
        path.write_bytes(packed.getvalue())
        with suppress(BundleError, PlanNotFound):
            table = read_plans(path)
            table.plan(table.step_counts[0])


def test_members_that_are_no_plain_arrays_are_refused_unread(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "pwned"), "w"))

    arrays = {name: arrays_of()[name] for name in OLD}
    arrays["state"] = np.array([Trap()], dtype=object)
    np.savez_compressed(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BundleError, match="state"):
        read_plans(tmp_path / "bad.npz")
    assert not (tmp_path / "pwned").exists()


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    _zip(path, _members(tmp_path / "good.npz"))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")  # the directory, whose 25th byte begins the unpacked size
    data[at + 24 : at + 28] = (16).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"\.npz"):
        read_plans(path)


@pytest.mark.parametrize("data", [b"", b"PK nothing", b'{"steps":[1]}'])
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(BundleError, match=r"bad\.npz"):
        read_plans(tmp_path / "bad.npz")


def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    save_plans(tmp_path / "good.npz", table_of())
    (tmp_path / "bad.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-40])
    with pytest.raises(BundleError, match=r"bad\.npz"):
        read_plans(tmp_path / "bad.npz")
