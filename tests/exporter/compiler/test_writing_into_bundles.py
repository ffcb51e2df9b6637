"""A writer of bundles writes, reads and removes nothing outside of the bundle that it adds to or
takes files from, whatever links and names the bundle brings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from diffusers import DDPMScheduler

from latentc.exporter.artifacts.store import Store
from latentc.exporter.compiler.sharing import share
from latentc.exporter.schedulers.plans import add_to_bundle, plain_config
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import Source
from latentc.runtimes.errors import BundleError, ExportError, LatentcError, PlanNotFound
from latentc.runtimes.pipeline import plans
from latentc.runtimes.pipeline.pipeline import load
from latentc.runtimes.sampling.plan_json import write_plans
from tests.support import fakes

TABLE = "schedules/ddpm.json"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle to which plans of the scheduler `ddpm` can be added; it has some."""
    source = Source(
        id="fake",
        pipeline_class="StableDiffusionPipeline",
        fingerprint="0" * 64,
        scheduler_class="DDPMScheduler",
        scheduler_config=plain_config(DDPMScheduler()),
    )
    folder = fakes.make_bundle(tmp_path / "bundle", source=source)
    add_to_bundle(folder, schedulers=["ddpm"], steps=[2])
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside of the bundle with a file that must not change."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


def unharmed(victim: Path) -> bool:
    return os.listdir(victim) == ["file"] and (victim / "file").read_text() == "precious"


def old_name_of_scratch(bundle: Path, victim: Path) -> None:
    (bundle / ".manifest.json.new").symlink_to(victim / "file")


def manifest_is_a_link(bundle: Path, victim: Path) -> None:
    shutil.copyfile(bundle / MANIFEST, bundle / "own.json")
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to("own.json")


def folder_of_plans_is_a_link(bundle: Path, victim: Path) -> None:
    (bundle / "schedules").rename(bundle / "elsewhere")
    (bundle / "schedules").symlink_to("elsewhere")


def folder_of_plans_leads_out(bundle: Path, victim: Path) -> None:
    shutil.copytree(bundle / "schedules", victim.parent / "copy")
    shutil.rmtree(bundle / "schedules")
    (bundle / "schedules").symlink_to(victim.parent / "copy")


HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    "the scratch's old name": old_name_of_scratch,
    "the manifest": manifest_is_a_link,
    "the folder of plans": folder_of_plans_is_a_link,
    "the folder of plans, out of the bundle": folder_of_plans_leads_out,
}


@pytest.mark.fault("1.2", "`latentc schedule` writes through a link that the bundle brings")
@pytest.mark.parametrize("link", HOSTILE)
def test_adding_plans_writes_through_no_link(link: str, bundle: Path, victim: Path) -> None:
    HOSTILE[link](bundle, victim)
    outside = {path: path.read_bytes() for path in (victim.parent / "copy").rglob("ddpm-*")}

    if link == "the scratch's old name":
        add_to_bundle(bundle, schedulers=["ddpm"], steps=[3])
    else:
        with pytest.raises(BundleError, match="link"):
            add_to_bundle(bundle, schedulers=["ddpm"], steps=[3])

    assert unharmed(victim)
    assert {path: path.read_bytes() for path in (victim.parent / "copy").rglob("ddpm-*")} == outside


def test_adding_plans_leaves_only_what_the_manifest_lists(bundle: Path) -> None:
    add_to_bundle(bundle, schedulers=["ddpm", "euler"], steps=[3])

    listed = {file.path for file in Manifest.load(bundle).files()} | {MANIFEST}
    there = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert there == listed
    assert Bundle.open(bundle, hashing="always").check() > 0


@pytest.mark.fault("1.9", "tables that a killed `latentc schedule` left stay in the bundle")
def test_tables_that_a_killed_run_left_are_removed(bundle: Path, victim: Path) -> None:
    (bundle / "schedules" / "ddpm-01234567.json").write_bytes(b"of a killed run")
    (bundle / "schedules" / "euler-89abcdef.json").symlink_to(victim / "file")
    (bundle / "schedules" / "notes.txt").write_text("somebody's own")

    add_to_bundle(bundle, schedulers=["ddpm"], steps=[3])

    listed = {file.path for file in Manifest.load(bundle).files()} | {"schedules/notes.txt"}
    there = {f"schedules/{path.name}" for path in (bundle / "schedules").iterdir()}
    assert there == {path for path in listed if path.startswith("schedules/")}
    assert unharmed(victim)


def altered(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_out(path: Path) -> None:
    shutil.copyfile(path, path.parent.parent.parent / "outside")
    path.unlink()
    path.symlink_to(path.parent.parent.parent / "outside")


@pytest.mark.fault("1.2", "an old table of plans is read without the bundle's own checks")
@pytest.mark.parametrize("damage", [altered, fifo, link_out])
def test_an_old_table_is_checked_before_it_is_merged(
    damage: Callable[[Path], None], bundle: Path
) -> None:
    (table,) = (bundle / "schedules").glob("ddpm-*.zip")
    damage(table)

    with pytest.raises(BundleError):
        add_to_bundle(bundle, schedulers=["ddpm"], steps=[3])


def with_schedule(bundle: Path, **changes: str) -> None:
    """Rewrite the manifest's first schedule without any check."""
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["schedules"][0] |= changes
    (bundle / MANIFEST).write_text(json.dumps(document))


@pytest.mark.fault("1.2", "files are named after a bundle's builds, schedulers and keys, unchecked")
@pytest.mark.parametrize("key", ["../../victim/key", "/tmp/key", "", "a/b", "..", "k\n"])
def test_a_key_names_no_other_file(key: str, bundle: Path) -> None:
    with_schedule(bundle, key=key)

    with pytest.raises(BundleError, match="is no plain word"):
        Manifest.load(bundle)


@pytest.mark.fault("1.2", "files are named after a bundle's builds, schedulers and keys, unchecked")
@pytest.mark.parametrize("name", ["../victim/file", "/tmp/file", "a/b", "..", "", "a\\b", "c:d"])
def test_a_schedulers_name_names_no_other_file(name: str, bundle: Path, tmp_path: Path) -> None:
    with_schedule(bundle, name=name)

    with pytest.raises(BundleError, match="cannot be a file's name"):
        write_plans(Bundle.open(bundle), tmp_path / "plans")


def test_a_store_writes_no_mark_outside_of_its_staging_folder(bundle: Path, victim: Path) -> None:
    """The last line of defence: of a manifest that no reader would have let through."""
    manifest = Manifest.load(bundle)
    first = msgspec.structs.replace(manifest.schedules[0], key="../../victim/mark")
    hostile = msgspec.structs.replace(manifest, schedules=(first, *manifest.schedules[1:]))
    store = Store(bundle, hostile)

    with pytest.raises(ExportError, match="cannot write"):
        store.keep(first.key)

    assert unharmed(victim)


@pytest.mark.fault("1.2", "a staging folder that is a link is written through")
def test_a_staging_folder_that_is_a_link_is_not_used(bundle: Path, victim: Path) -> None:
    (bundle.parent / ".bundle.partial").symlink_to(victim)

    store = Store(bundle, None)
    store.item("key", "folder", lambda work: {"size": (work / "file").write_text("new")})

    assert unharmed(victim)
    assert (bundle.parent / ".bundle.partial/folder/file").read_text() == "new"


@pytest.mark.fault("1.2", "a staging folder that is a link is written through")
@pytest.mark.parametrize("name", ["folder", ".done"])
def test_a_link_in_the_staging_folder_is_not_written_through(
    name: str, bundle: Path, victim: Path
) -> None:
    staging = bundle.parent / ".bundle.partial"
    staging.mkdir()
    (staging / name).symlink_to(victim)

    with pytest.raises(ExportError, match="no link"):
        Store(bundle, None).item("key", "folder", lambda work: {"n": (work / "x").write_text("x")})

    assert unharmed(victim)


@pytest.mark.fault("1.2", "files of a bundle to share with are taken over through links out of it")
@pytest.mark.parametrize("way", ["share", "take over"])
def test_files_are_shared_from_inside_of_the_other_bundle_only(
    way: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentc.exporter.compiler.sharing._SMALLEST", 1)
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = Manifest.load(other)
    path = other / manifest.schedule("ddpm").file.path
    link_out(path)
    outside = tmp_path / "outside"

    if way == "share":
        share(bundle, Manifest.load(bundle), [other])
    else:
        assert Store(tmp_path / "new", None, [other]).keep(manifest.schedule("ddpm").key) is None

    assert outside.stat().st_nlink == 1


@pytest.mark.fault("1.2", "hard links are put in the place of files through a link in the bundle")
def test_sharing_puts_no_file_outside_of_the_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentc.exporter.compiler.sharing._SMALLEST", 1)
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    outside = Path(shutil.copytree(bundle / "schedules", tmp_path / "copy"))
    shutil.rmtree(bundle / "schedules")
    (bundle / "schedules").symlink_to(outside)
    before = {path.name: path.stat().st_ino for path in outside.iterdir()}

    with pytest.raises(LatentcError, match="link"):
        share(bundle, Manifest.load(bundle), [other])

    assert {path.name: path.stat().st_ino for path in outside.iterdir()} == before


@pytest.mark.fault("1.8", "a reader finds a table gone that was replaced after it had opened")
def test_readers_go_on_with_a_bundle_that_plans_were_added_to(bundle: Path) -> None:
    call = {"prompt": "a", "scheduler": "ddpm", "num_inference_steps": 2, "seed": 0}
    with load(bundle, fakes.FakeBackend()) as used, load(bundle, fakes.FakeBackend()) as opened:
        before = used(**call).latents
        add_to_bundle(bundle, schedulers=["ddpm"], steps=[3])
        assert (used(**call).latents == before).all()
        assert (opened(**call).latents == before).all()
        opened(**{**call, "num_inference_steps": 3})
    with load(bundle, fakes.FakeBackend()) as again:
        assert (again(**call).latents == before).all()


def test_readers_are_told_that_a_bundle_was_changed(bundle: Path) -> None:
    with load(bundle, fakes.FakeBackend()) as opened:
        (table,) = (bundle / "schedules").glob("ddpm-*.zip")
        table.unlink()
        document = json.loads((bundle / MANIFEST).read_bytes())
        document["schedules"].pop()
        (bundle / MANIFEST).write_text(json.dumps(document))
        with pytest.raises(BundleError, match=r"changed after it was opened.*load it again"):
            opened("a", scheduler="ddpm", num_inference_steps=2)


def assert_kept(bundle: Path, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace a missing count, then find it where nothing can be traced.

    `steps`: those that the bundle says of the scheduler in between.
    """
    call = {"prompt": "a", "scheduler": "ddpm", "num_inference_steps": 5, "seed": 0}
    with load(bundle, fakes.FakeBackend()) as opened:
        before = opened(**call).latents
    assert Manifest.load(bundle).schedule("ddpm").steps == steps
    monkeypatch.setattr(plans, "TRACER", "latentc.not_installed:add_plan")
    with load(bundle, fakes.FakeBackend()) as again:
        assert (again(**call).latents == before).all()


def test_a_step_count_that_is_missing_is_traced_and_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_kept(bundle, (2, 5), monkeypatch)


def test_a_step_count_of_a_bundle_that_cannot_be_written_is_kept_in_the_cache(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda *_, **__: False)  # nothing stops the root user
    assert_kept(bundle, (2,), monkeypatch)


def test_plans_of_one_bundle_are_not_those_of_another(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tables of two schedulers may be the same to the last bit: those of few steps often are."""
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    add_to_bundle(bundle, schedulers=["ddim"], steps=[1])
    document = json.loads((bundle / MANIFEST).read_bytes())
    ddim = next(each for each in document["schedules"] if each["name"] == "ddim")
    document["schedules"].append({**ddim, "name": "euler", "class_name": "EulerDiscreteScheduler"})
    (bundle / MANIFEST).write_text(json.dumps(document))
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    opened = plans.Plans(Bundle.open(bundle))
    one, other = (opened.table(name, 5).encoded() for name in ("ddim", "euler"))
    assert one != other
    again = plans.Plans(Bundle.open(bundle))
    assert [again.table(name, 5).encoded() for name in ("ddim", "euler")] == [one, other]


def test_plans_that_cannot_be_kept_are_used(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither in the bundle, where another writer fails, nor in the cache folder."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "file" / "cache"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentc.exporter.schedulers.on_demand.add_to_bundle", full)
    with load(bundle, fakes.FakeBackend()) as opened:
        assert opened("a", scheduler="ddpm", num_inference_steps=5, seed=0).images
    assert Manifest.load(bundle).schedule("ddpm").steps == (2,)


@pytest.mark.parametrize("steps", [0, 1001])
def test_step_counts_that_no_plan_is_made_for(bundle: Path, steps: int) -> None:
    with pytest.raises(PlanNotFound, match="plans are made for 1 to 1,000"):
        plans.Plans(Bundle.open(bundle)).table("ddpm", steps)


def test_a_configuration_without_limits_is_refused(bundle: Path) -> None:
    """No scheduler is made of what a stranger's bundle says, whatever memory that takes."""
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["source"]["scheduler_config"]["num_train_timesteps"] = 4_000_000_000
    (bundle / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(PlanNotFound, match="num_train_timesteps 4000000000"):
        plans.Plans(Bundle.open(bundle)).table("ddpm", 5)
    with pytest.raises(ExportError, match="num_train_timesteps 4000000000"):
        add_to_bundle(bundle, schedulers=["ddim"], steps=[2])


def test_a_step_count_that_the_scheduler_refuses(bundle: Path) -> None:
    add_to_bundle(bundle, schedulers="lcm", steps=2)
    told: list[str] = []
    refusal = "none can be made: LCMScheduler refuses 100 steps: diffusers itself fails there"
    with pytest.raises(PlanNotFound, match=refusal):
        plans.Plans(Bundle.open(bundle)).table("lcm", 100, told.append)
    assert told == ["tracing 'lcm' for 100 steps, of which the bundle has no plan …"]
    assert Manifest.load(bundle).schedule("lcm").steps == (2,)
