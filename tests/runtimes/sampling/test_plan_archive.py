"""Archives of sampling plans: a member for each step count, of which a call reads one."""

from __future__ import annotations

import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentc.runtimes.bundle.structures import File, Schedule
from latentc.runtimes.errors import BundleError
from latentc.runtimes.sampling import plan_archive
from latentc.runtimes.sampling.plan import join
from latentc.runtimes.sampling.plan_archive import read_all_plans, read_plans, write_archive
from latentc.runtimes.sampling.plan_schema import ClipKind
from tests.support import fakes

STEPS = (1, 2, 4)


def schedule_of(steps: tuple[int, ...] = STEPS, archive: bool = True) -> Schedule:
    return Schedule("plain", "Plain", File("plain.zip", 1, "0" * 64), steps, "key", archive=archive)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An archive of the fakes' plans."""
    write_archive(fakes.plan_table(noisy=True), tmp_path / "plain.zip")
    return tmp_path / "plain.zip"


def test_an_archive_holds_the_table(path: Path, tmp_path: Path) -> None:
    table = fakes.plan_table(noisy=True)
    assert read_all_plans(path, schedule_of()).encoded() == join([table]).encoded()
    for steps in STEPS:
        assert read_plans(path, schedule_of(), steps).encoded() == table.of(steps).encoded()
    write_archive(table, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()
    table.save(tmp_path / "plain.json")
    plain = read_plans(tmp_path / "plain.json", schedule_of(archive=False), 2)
    assert plain.encoded() == table.encoded()


def test_several_shifts_stand_in_one_member(tmp_path: Path) -> None:
    parts = fakes.plan_table(noisy=True).parts()
    shifted = [replace(part, shift=np.array([shift])) for shift in (0.5, 1.0) for part in parts]
    table = join(shifted)
    write_archive(table, tmp_path / "plain.zip")
    read = read_plans(tmp_path / "plain.zip", schedule_of(), 4)
    assert (read.step_counts, read.shifts) == ((4,), (0.5, 1.0))
    np.testing.assert_array_equal(read.plan(4, 0, 0.7).state, table.plan(4, 0, 0.7).state)


def test_other_members_are_not_read(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("4.json").header_offset
    damaged = bytearray(path.read_bytes())
    damaged[place + 40 : place + 60] = b"x" * 20
    path.write_bytes(damaged)
    assert read_plans(path, schedule_of(), 2).step_counts == (2,)
    with pytest.raises(BundleError, match=r"plain\.zip"):
        read_plans(path, schedule_of(), 4)


def test_other_steps_than_the_manifest_says(path: Path) -> None:
    for steps in ((1, 2), (1, 2, 4, 5), (1, 2, 5)):
        with pytest.raises(BundleError, match="expected plans of the steps"):
            read_plans(path, schedule_of(steps), 1)


def test_numbers_are_those_of_float32_in_few_digits() -> None:
    table = fakes.plan_table(noisy=True)
    input_scale = np.resize([0.1, 1 / 3, 1e300, -2.5e-8, np.pi], table.input_scale.shape)
    short = replace(table, input_scale=input_scale).of_singles()
    inside = input_scale != 1e300
    same = short.input_scale.astype(np.float32)[inside] == input_scale.astype(np.float32)[inside]
    assert same.all()
    assert {0.1, 0.33333334, 1e300, -2.5e-08, 3.1415927} >= {*short.input_scale.tolist()}
    assert short.of_singles().encoded() == short.encoded()
    np.testing.assert_array_equal(np.isnan(short.add_noise), np.isnan(table.add_noise))


def test_a_member_is_unpacked_up_to_the_size_that_is_declared(path: Path) -> None:
    """One that says less than it has is cut there, not unpacked whole first."""
    bomb = path.with_name("bomb.zip")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for steps in STEPS:
            archive.writestr(f"{steps}.json", b" " * (200 << 20) if steps == 4 else b"{}")
    data = bomb.read_bytes()
    large, small = (200 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")
    bomb.write_bytes(data.replace(large, small))
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=r"bomb\.zip"):
            read_plans(bomb, schedule_of(), 4)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_tables_that_do_not_go_together(tmp_path: Path) -> None:
    """Each is good alone; all of them are read to add others."""
    table = fakes.plan_table(noisy=True)
    clips = [np.array([ClipKind.RANGE, limit, 0.0]) for limit in (1.0, 2.0)]
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for steps, clip in zip((1, 2), clips, strict=True):
            archive.writestr(f"{steps}.json", replace(table.of(steps), clip=clip).encoded())
    found = read_plans(tmp_path / "odd.zip", schedule_of((1, 2)), 2).clip
    np.testing.assert_array_equal(found, clips[1])
    with pytest.raises(BundleError, match=r"odd\.zip.*archive of sampling plans"):
        read_all_plans(tmp_path / "odd.zip", schedule_of((1, 2)))


def test_tables_that_are_too_large_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_archive, "_MOST_JOINED", 10)
    with pytest.raises(BundleError, match="too large together"):
        read_all_plans(path, schedule_of())
    monkeypatch.setattr(plan_archive, "LARGEST_DOCUMENT", len(path.read_bytes()))
    with pytest.raises(BundleError, match="unpacks to"):
        read_all_plans(path, schedule_of())
