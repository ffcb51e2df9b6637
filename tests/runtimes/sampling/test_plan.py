"""Tables of sampling plans: lookups, merging, the file, and hostile files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentc.runtimes.errors import BundleError, InputError, PlanNotFound
from latentc.runtimes.sampling.plan import PlanTable, join
from latentc.runtimes.sampling.plan_schema import DTYPES, LEARNED


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
        "log_low": rng.uniform(-9, -2, steps),
        "log_high": rng.uniform(-2, 0, steps),
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


def test_limits_of_a_variance_are_those_of_the_evaluation() -> None:
    late = table_of(steps=5).plan(5, start=2).until(2)
    table = join([table_of(steps=n, seed=n) for n in (3, 5)])
    for name in LEARNED:
        np.testing.assert_array_equal(getattr(late, name), getattr(table_of(), name)[2:4])
        np.testing.assert_array_equal(
            getattr(table.plan(5), name), getattr(table_of(steps=5, seed=5), name)
        )


def test_a_table_without_a_learned_variance_has_no_limits_in_its_file(tmp_path: Path) -> None:
    arrays = arrays_of()
    arrays |= {name: np.full(5, np.nan) for name in LEARNED}
    PlanTable(**arrays).save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_bytes()).keys() == DTYPES.keys() - {*LEARNED}
    assert not PlanTable.load(tmp_path / "a.json").plan(5).learns_variance
    assert table_of().plan(5).learns_variance


def test_tables_that_clip_differently_do_not_mix() -> None:
    arrays = arrays_of(steps=6)
    arrays["clip"] = np.array([1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="limit the clean sample"):
        join([table_of(steps=5), PlanTable(**arrays)])


def document_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a table's document, of arrays that may be bad; NaN and infinity are None."""
    values = {name: np.asarray(array).tolist() for name, array in arrays.items()}
    document: dict[str, Any] = json.loads(msgspec.json.encode(values))
    return document


def written(path: Path, document: Any) -> Path:
    """A file with a document that may be bad."""
    path.write_text(json.dumps(document), "utf-8")
    return path


def test_a_file_gives_the_table_back_and_equal_tables_give_equal_files(tmp_path: Path) -> None:
    table = join([table_of(steps=n, seed=n) for n in (3, 5)])
    table.save(tmp_path / "a.json")
    table.save(tmp_path / "b.json")
    data = (tmp_path / "a.json").read_bytes()
    assert data == (tmp_path / "b.json").read_bytes()
    loaded = PlanTable.load(tmp_path / "a.json")
    for name, dtype in DTYPES.items():
        found = getattr(loaded, name)
        np.testing.assert_array_equal(found, getattr(table, name))
        assert found.dtype.str == dtype
        assert found.flags.c_contiguous
    assert not loaded.state.flags.writeable
    assert list(json.loads(data)) == list(DTYPES)  # any reader of JSON will do
    assert not re.search(rb"\s", data)


def test_every_bit_is_kept(tmp_path: Path) -> None:
    """Numbers of every size keep every bit, the smallest and negative zero among them, and whole
    ones.
    """
    arrays = arrays_of(steps=200)
    bits = np.random.default_rng(0).integers(0, 1 << 64, arrays["state"].shape, np.uint64)
    arrays["state"] = np.nan_to_num(bits.view("<f8"), nan=0.0, posinf=1.0, neginf=-1.0)
    arrays["state"][0] = [[-0.0, 5e-324], [-1.7976931348623157e308, 0.1 + 0.2]]
    arrays["add_noise"][[0, 3]] = np.nan
    arrays["known"][:] = np.nan
    arrays["log_low"][5], arrays["log_high"][5] = np.nan, np.nan
    table = PlanTable(**arrays)
    table.save(tmp_path / "a.json")
    loaded = PlanTable.load(tmp_path / "a.json")
    for name in DTYPES:
        assert getattr(loaded, name).tobytes() == getattr(table, name).tobytes(), name
    document = json.loads((tmp_path / "a.json").read_bytes())
    assert document["add_noise"][3] == [None, None]
    assert all(type(value) is int for value in document["steps"] + document["noise_draws"])


def test_a_table_that_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of()
    table.save(tmp_path / "a.json")
    monkeypatch.setattr(
        "latentc.runtimes.sampling.plan.LARGEST_DOCUMENT", (tmp_path / "a.json").stat().st_size - 1
    )
    with pytest.raises(BundleError, match=r"b\.json: .* take fewer step counts"):
        table.save(tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()
    with pytest.raises(BundleError, match="expected at most"):
        PlanTable.load(tmp_path / "a.json")


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
    "half a variance": (_set("log_high", 1, np.nan), "log_low"),
    "an infinite variance": (_set("log_low", 1, -np.inf), "log_low"),
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
    "dtype": (_put("state", np.zeros((10, 2, 2), np.float32)), "dtype (float32|<f4)"),
    "shape": (_put("state", np.zeros((10, 2, 3))), "state"),
    "dimensions": (_put("prediction", np.zeros(10)), "prediction"),
    "scalar": (_put("steps", np.int32(5)), "steps"),
    "empty": (_put("steps", np.zeros(0, np.int32)), "steps"),
    "rows of another length": (_put("rows", np.zeros((4, 2), np.int32)), "rows"),
    "too many slots": (_put("state", np.zeros((10, 65, 65))), "state|prediction"),
    "objects": (_put("state", np.array([None], object)), "state"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_refused_by_name(case: str) -> None:
    change, message = BAD_VALUES[case]
    arrays = arrays_of()
    change(arrays)
    with pytest.raises(BundleError, match=message):
        PlanTable(**arrays)


@pytest.mark.parametrize("case", sorted(BAD_VALUES.keys() - {"dtype"}))
def test_bad_values_in_a_file_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = BAD_VALUES[case]
    arrays = arrays_of()
    change(arrays)
    with pytest.raises(BundleError, match=message):
        PlanTable.load(written(tmp_path / "bad.json", document_of(arrays)))


def _member(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.__setitem__(name, value)


# What a document may not say though it is JSON: a change of it, and what the error says.
BAD_DOCUMENTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a missing member": (lambda document: document.pop("rows"), "missing required field `rows`"),
    "one limit of a variance": (lambda d: d.pop("log_low"), "log_low: expected both"),
    "another member": (_member("other", [1]), "unknown field `other`"),
    "a ragged row": (lambda d: d["prediction"][3].append(0.5), "prediction: expected lists of one"),
    "a ragged matrix": (lambda d: d["state"][3].pop(), "state: expected lists of one length"),
    "a ragged row of a matrix": (lambda d: d["state"][3][1].pop(), "state: expected lists of one"),
    "an empty row": (lambda d: d["rows"][0].clear(), "rows: expected lists of one length"),
    "rows without elements": (_member("rows", [[]] * 5), "rows: shape"),
    "a matrix that is flat": (_member("state", [[1.0, 0.0]] * 10), r"state\["),
    "a deeper matrix": (_member("state", [[[[1.0]]]] * 10), r"state\["),
    "no list": (_member("steps", 5), r"steps"),
    "a text": (_member("timesteps", "900"), "timesteps"),
    "a number as a text": (_member("timesteps", ["900"] * 5), r"timesteps\["),
    "a truth value": (_member("noise_draws", [True] * 5), r"noise_draws\["),
    "a float for an integer": (_member("steps", [5.0]), r"steps\["),
    "an object": (_member("clip", {"kind": 1}), "clip"),
    "more than a byte": (_member("noise_draws", [256] * 5), r"noise_draws\["),
    "more than 32 bits": (_member("steps", [1 << 31]), r"steps\["),
    "more than 64 bits": (_member("offsets", [0, 1 << 70]), r"offsets\["),
    "less than 32 bits": (_member("rows", [[-1 - (1 << 31)] * 2] * 5), r"rows\["),
    "null in a state": (_member("prediction", [[None, 1.0]] * 10), r"prediction\["),
    "null for a shift": (_member("shift", [None]), r"shift\["),
    "null for an integer": (_member("offsets", [0, None]), r"offsets\["),
    "half a null": (_member("known", [[None, 1.0]] * 5), "known: expected two"),
    "null for a pair": (_member("add_noise", [None] * 5), r"add_noise\["),
    "too short": (_member("timesteps", [1.0] * 4), "shape"),
    "too long": (_member("init_noise_scale", [1.0] * 2), "init_noise_scale: shape"),
    "an integer with many digits": (_member("clip", [1, 10**400, 0]), "out of range"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_documents_are_refused(case: str, tmp_path: Path) -> None:
    change, message = BAD_DOCUMENTS[case]
    document = document_of(arrays_of())
    change(document)
    with pytest.raises(BundleError, match=message):
        PlanTable.load(written(tmp_path / "bad.json", document))


# What stands in a good document in the place of its first timestep or of the whole of it.
BAD_TEXTS = {
    "NaN": (b'"timesteps": [900.0', b'"timesteps": [NaN'),
    "Infinity": (b'"timesteps": [900.0', b'"timesteps": [Infinity'),
    "a huge exponent": (b'"timesteps": [900.0', b'"timesteps": [1e999'),
    "a number without an end": (b'"timesteps": [900.0', b'"timesteps": [' + b"9" * 100_000),
    "a deep list": (b'"timesteps": [900.0', b'"timesteps": ' + b"[" * 200_000),
    "a deep member": (b'{"steps"', b'{"a": ' * 100_000 + b'{"steps"'),
    "a list of nothing": (b'"timesteps": [900.0', b'"timesteps": [,'),
    "no UTF-8": (b'{"steps"', b'{"\xff\xfe"'),
    "something behind it": (b'{"steps"', b'{}{"steps"'),
    "a mark of the byte order": (b'{"steps"', b'\xef\xbb\xbf{"steps"'),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_are_refused(case: str, tmp_path: Path) -> None:
    old, new = BAD_TEXTS[case]
    path = written(tmp_path / "bad.json", document_of(arrays_of()))
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(BundleError, match=r"bad\.json: not a table of sampling plans"):
        PlanTable.load(path)


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    table_of().save(tmp_path / "good.json")
    data = (tmp_path / "good.json").read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        (tmp_path / "bad.json").write_bytes(data[:length])
        with pytest.raises(BundleError, match=r"bad\.json"):
            PlanTable.load(tmp_path / "bad.json")


def test_what_is_no_file_of_that_size_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        PlanTable.load(tmp_path / "none.json")
    with pytest.raises(BundleError, match="found a folder"):
        PlanTable.load(tmp_path)
    with open(tmp_path / "large.json", "wb") as large:
        large.truncate(65 << 20)
    with pytest.raises(BundleError, match="expected at most"):
        PlanTable.load(tmp_path / "large.json")


def test_a_table_of_the_old_form_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "old.npz", **arrays_of())
    with pytest.raises(BundleError, match=r"old\.npz: not a table of sampling plans"):
        PlanTable.load(tmp_path / "old.npz")


def test_random_damage_is_a_bundle_error_or_harmless(tmp_path: Path) -> None:
    table_of().save(tmp_path / "good.json")
    data, path = (tmp_path / "good.json").read_bytes(), tmp_path / "bad.json"
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        if rng.random() < 0.3:
            del broken[rng.randrange(len(broken)) :]
        for _ in range(rng.choice((0, 1, 1, 4, 40))):
            if broken:
                signs = rng.choice((bytes(range(256)), b"0123456789", b'[]{},:"-+.eE'))
                broken[rng.randrange(len(broken))] = rng.choice(signs)
        path.write_bytes(bytes(broken))
        with suppress(BundleError, PlanNotFound):
            PlanTable.load(path).plan(5)
