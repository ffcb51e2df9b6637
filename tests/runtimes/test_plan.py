"""Tables of sampling plans: lookups, merging, the file, and hostile files."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import BundleError, InputError, PlanNotFound
from runtimes.plan import PlanTable, join
from runtimes.plan_schema import DTYPES


def arrays_of(steps: int = 5, slots: int = 2, window: int = 1, seed: int = 0) -> dict[str, Any]:
    """One plan with a row of its own for every evaluation and age."""
    rng = np.random.default_rng(seed)
    rows = steps * (window + 1)
    return {
        "steps": np.array([steps], np.int32),
        "offsets": np.array([0, steps], np.int32),
        "timesteps": np.linspace(900, 0, steps),
        "input_scale": rng.uniform(0.1, 1, steps),
        "noise_draws": np.ones(steps, np.uint8),
        "rows": np.arange(rows, dtype=np.int32).reshape(steps, window + 1),
        "state": rng.standard_normal((rows, slots, slots)),
        "prediction": rng.standard_normal((rows, slots)),
        "clean": rng.standard_normal((rows, slots)),
        "noise": rng.standard_normal((rows, slots)),
        "clean_from": rng.standard_normal((rows, 2)),
        "init_noise_scale": np.array([14.6]),
        "add_noise": rng.uniform(0, 1, (steps, 2)),
        "known": rng.uniform(0, 1, (steps, 2)),
        "clip": np.array([1.0, 1.0, 0.0]),
        "shift": np.zeros(1),
    }


def table_of(**options: int) -> PlanTable:
    return PlanTable(**arrays_of(**options))


def test_a_late_start_reads_the_rows_of_its_age() -> None:
    table = table_of(steps=5, window=1)
    late = table.plan(5, start=2)
    assert late.num_evaluations == 3
    # ages 0, 1, 1 at evaluations 2, 3, 4; row = 2 * evaluation + age
    np.testing.assert_array_equal(late.state, table.state[[4, 7, 9]])
    np.testing.assert_array_equal(late.timesteps, table.timesteps[2:])
    np.testing.assert_array_equal(table.plan(5).state, table.state[[0, 3, 5, 7, 9]])


def test_the_first_sample_is_scaled_noise_or_a_noised_image() -> None:
    plan = table_of().plan(5, start=1)
    assert plan.add_noise is not None
    noise, clean = np.ones(3, np.float32), np.full(3, 2, np.float32)
    np.testing.assert_allclose(plan.initial_sample(noise), 14.6 * noise)
    expected = plan.add_noise[0] * clean + plan.add_noise[1] * noise
    np.testing.assert_allclose(plan.initial_sample(noise, clean), expected)


def test_a_missing_step_count_says_what_there_is_and_how_to_add_it() -> None:
    table = join([table_of(steps=n) for n in (1, 2, 3, 5)])
    with pytest.raises(PlanNotFound, match=r"1-3, 5.*latentc schedule BUNDLE.*--steps 4"):
        table.plan(4)


def test_a_start_that_the_scheduler_does_not_allow_is_refused() -> None:
    arrays = arrays_of()
    arrays["add_noise"][[0, 1, 3]] = np.nan
    table = PlanTable(**arrays)
    assert table.starts(5) == (0, 2, 4)
    assert table.plan(5).add_noise is None
    with pytest.raises(InputError, match="possible: 0, 2, 4"):
        table.plan(5, start=1)
    with pytest.raises(InputError, match="cannot add noise"):
        table.plan(5).initial_sample(np.zeros(1), np.zeros(1))


def test_merging_keeps_every_plan_and_prefers_the_new_one() -> None:
    old = join([table_of(steps=3, slots=1, window=0), table_of(steps=5)])
    new = join([table_of(steps=5, seed=1), table_of(steps=7, slots=3, window=2)])
    both = old.merge(new)
    assert both.step_counts == (3, 5, 7)
    assert both.state.shape[1:] == (3, 3)
    assert both.window == 2
    for source, steps in ((old, 3), (new, 5), (new, 7)):
        for start in source.starts(steps):
            theirs, ours = source.plan(steps, start), both.plan(steps, start)
            slots = theirs.num_slots
            np.testing.assert_array_equal(ours.state[:, :slots, :slots], theirs.state)
            np.testing.assert_array_equal(ours.noise[:, :slots], theirs.noise)
            assert not ours.state[:, slots:].any()


def test_equal_rows_are_stored_once() -> None:
    arrays = arrays_of()
    for name in ("state", "prediction", "clean", "noise", "clean_from"):
        arrays[name][:] = arrays[name][0]
    assert len(join([PlanTable(**arrays)]).state) == 1


def test_tables_that_clip_differently_do_not_mix() -> None:
    arrays = arrays_of(steps=6)
    arrays["clip"] = np.array([1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="limit the clean sample"):
        join([table_of(steps=5), PlanTable(**arrays)])


def test_a_file_gives_the_table_back_and_equal_tables_give_equal_files(tmp_path: Path) -> None:
    table = join([table_of(steps=n, seed=n) for n in (3, 5)])
    table.save(tmp_path / "a.npz")
    table.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = PlanTable.load(tmp_path / "a.npz")
    for name in DTYPES:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))
    assert not loaded.state.flags.writeable
    with np.load(tmp_path / "a.npz", allow_pickle=False) as plain:  # any .npz reader will do
        assert set(plain.files) == set(DTYPES)


def _set(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][index] = value

    return change


def _put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.__setitem__(name, value)


BAD_VALUES = {
    "row beyond the table": (_set("rows", (0, 0), 99), "rows"),
    "negative row": (_set("rows", (0, 0), -1), "rows"),
    "nan in the state": (_set("state", (0, 0, 0), np.nan), "state"),
    "infinite timestep": (_set("timesteps", 0, np.inf), "timesteps"),
    "nan input scale": (_set("input_scale", 0, np.nan), "input_scale"),
    "half a nan": (_set("add_noise", (1, 0), np.nan), "add_noise"),
    "half a known": (_set("known", (1, 0), np.nan), "known"),
    "infinite add_noise": (_set("add_noise", (1, 0), np.inf), "add_noise"),
    "offset": (_set("offsets", 1, 6), "offsets"),
    "step count": (_set("steps", 0, 0), "steps"),
    "huge step count": (_set("steps", 0, 10**9), "steps"),
    "clip kind": (_set("clip", 0, 7), "clip"),
    "clip limit": (_set("clip", 1, -1), "clip"),
    "clean without clip": (_put("clip", np.zeros(3)), "clean"),
    "undrawn noise": (_set("noise_draws", 0, 0), "noise"),
    "noise_draws": (_set("noise_draws", 0, 2), "noise_draws"),
    "dtype": (_put("state", np.zeros((10, 2, 2), np.float32)), "dtype <f4"),
    "shape": (_put("state", np.zeros((10, 2, 3))), "state"),
    "dimensions": (_put("prediction", np.zeros(10)), "prediction"),
    "scalar": (_put("steps", np.int32(5)), "steps"),
    "empty": (_put("steps", np.zeros(0, np.int32)), "steps"),
    "rows of another length": (_put("rows", np.zeros((4, 2), np.int32)), "rows"),
    "too many slots": (_put("state", np.zeros((10, 65, 65))), "state|prediction"),
    "objects": (_put("state", np.array([None], object)), "damaged|state"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = BAD_VALUES[case]
    arrays = arrays_of()
    change(arrays)
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **arrays)
    with pytest.raises(BundleError, match=message):
        PlanTable.load(path)


def _zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def _members(path: Path) -> dict[str, bytes]:
    table_of().save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    members = _members(tmp_path / "good.npz")
    members["state.npy"] = bytes(80 << 20)
    with pytest.raises(BundleError, match="limit"):
        PlanTable.load(_zip(tmp_path / "bomb.npz", members))


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
        PlanTable.load(_zip(tmp_path / "odd.npz", members))


def test_missing_additional_and_doubled_members_are_refused(tmp_path: Path) -> None:
    members = _members(tmp_path / "good.npz")
    fewer = {name: data for name, data in members.items() if name != "rows.npy"}
    with pytest.raises(BundleError, match=r"missing arrays \['rows.npy'\]"):
        PlanTable.load(_zip(tmp_path / "fewer.npz", fewer))
    with pytest.raises(BundleError, match="unexpected"):
        PlanTable.load(_zip(tmp_path / "more.npz", {**members, "../evil.npy": b""}))
    with pytest.raises(BundleError, match="neither stored nor deflated"):
        PlanTable.load(_zip(tmp_path / "bz.npz", members, zipfile.ZIP_BZIP2))
    with pytest.raises(BundleError, match="no such file"):
        PlanTable.load(tmp_path / "none.npz")
    with pytest.raises(BundleError):
        PlanTable.load(tmp_path)


def test_random_damage_is_a_bundle_error_or_harmless(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    table_of().save(good)
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
            PlanTable.load(path).plan(5)


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
            table = PlanTable.load(path)
            table.plan(table.step_counts[0])
