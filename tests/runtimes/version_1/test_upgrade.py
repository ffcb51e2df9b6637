"""Bundles of format 1, which an earlier version made of every kind of pipeline, become bundles of
format 2."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentc.cli import cli
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.storage import files
from latentc.runtimes.storage.locks import WAITING, writing
from latentc.runtimes.version_1.upgrade import upgrade

ARCHIVE = Path(__file__).with_name("bundles_of_format_1.zip")
KINDS = sorted({name.partition("/")[0] for name in zipfile.ZipFile(ARCHIVE).namelist()})


class Quiet:
    """Stages that are noted."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    @contextmanager
    def stage(self, subject: str, stage: str) -> Iterator[None]:
        """Note a stage."""
        self.stages.append(stage)
        yield


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[[str], Path]:
    """A function: kind of pipeline → a bundle of format 1 of it."""

    def unpack(kind: str) -> Path:
        with zipfile.ZipFile(ARCHIVE) as archive:
            members = [name for name in archive.namelist() if name.startswith(f"{kind}/")]
            archive.extractall(tmp_path, members)
        return tmp_path / kind

    return unpack


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a bundle's manifest again after `change` altered its JSON values."""
    document = json.loads((bundle / MANIFEST).read_bytes())
    change(document)
    (bundle / MANIFEST).write_bytes(json.dumps(document).encode())


def content(bundle: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    places = (path for path in bundle.rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in places}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, bundle_of: Callable[[str], Path]) -> None:
    """The new manifest has a program for each task, all else as it was, and no file too many."""
    bundle = bundle_of(kind)
    before, kept = json.loads((bundle / MANIFEST).read_bytes()), content(bundle)
    tables = {each["name"]: kept[each["file"]["path"]] for each in before["schedules"]}
    manifest = upgrade(bundle, Quiet())
    assert manifest == Manifest.load(bundle)
    assert manifest is not None
    assert [each.name for each in manifest.programs] == [each["name"] for each in before["tasks"]]
    assert json.loads(manifest.encode())["builds"] == before["builds"]
    assert manifest.source.fingerprint == before["source"]["fingerprint"]
    listed = {file.path for file in manifest.files()}
    assert content(bundle).keys() == listed | {MANIFEST}
    for schedule in manifest.schedules:
        place = bundle / "old.npz"
        place.write_bytes(tables[schedule.name])
        assert same_tables(PlanTable.load(bundle / schedule.file.path, schedule.steps), place)
        place.unlink()
    assert upgrade(bundle, Quiet()) is None


def same_tables(table: PlanTable, place: Path) -> bool:
    """Return whether a table has the numbers of one of format 1, to the bit."""
    from latentc.runtimes.sampling.plan_schema import DTYPES
    from latentc.runtimes.version_1.plans import read_plans

    old = read_plans(place)
    return all(getattr(table, name).tobytes() == getattr(old, name).tobytes() for name in DTYPES)


def test_loading_says_what_to_do(bundle_of: Callable[[str], Path]) -> None:
    with pytest.raises(BundleError, match=r"latentc upgrade .*/sd"):
        Manifest.load(bundle_of("sd"))


def test_the_command(bundle_of: Callable[[str], Path]) -> None:
    bundle = bundle_of("sdxl")
    run = CliRunner().invoke(cli, ["upgrade", str(bundle)])
    assert run.exit_code == 0, run.output
    assert "format 2, with the programs text-to-image" in run.output
    assert "is up to date" in CliRunner().invoke(cli, ["upgrade", str(bundle)]).output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("guidance"), "missing required field `guidance`"),
        (lambda d: d.update(surprise=1), "unknown field `surprise`"),
        (lambda d: d["guidance"].update(single="nobody"), "not a manifest whose fields fit"),
        (lambda d: d["components"].clear(), "not a manifest whose fields fit"),
        (lambda d: d["vectors"].append({"input": "timestep", "arguments": ["x"]}), "fields fit"),
        (lambda d: d["latents"].update(multiple=0), "multiple"),
        (lambda d: d["latents"].update(factor=1 << 40), "multiple and least"),
        (lambda d: d["schedules"][0].update(steps=[7]), r"expected the steps \[7\]"),
        (lambda d: d["schedules"][0]["file"].update(sha256="0" * 64), "expected SHA-256"),
        (lambda d: d["tokenizers"][0]["file"].update(path="../x"), "leaves the bundle|leads out"),
        (lambda d: d["tokenizers"][0].update(max_length=10**9), "as the manifest says"),
        (lambda d: d.update(format_version=True), "format_version"),
        (lambda d: d["schedules"].append(d["schedules"][0]), "two schedules of one name|are named"),
        (lambda d: d["arguments"].extend([{"name": "a", "default": []}] * 300), "at most 256"),
    ],
)
def test_bad_bundles_stay_as_they_are(
    change: Callable[[dict[str, Any]], object], says: str, bundle_of: Callable[[str], Path]
) -> None:
    bundle = bundle_of("sd")
    edit(bundle, change)
    before = content(bundle)
    with pytest.raises(BundleError, match=says):
        upgrade(bundle, Quiet())
    assert content(bundle) == before


def test_links_are_not_followed(bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    bundle, outside = bundle_of("sd"), tmp_path / "outside"
    shutil.move(bundle / "schedules", outside)
    (bundle / "schedules").symlink_to(outside)
    before = content(outside)
    with pytest.raises(BundleError, match="link"):
        upgrade(bundle, Quiet())
    assert content(outside) == before


def test_no_bundle(tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["upgrade", str(tmp_path / "nothing")])
    assert isinstance(run.exception, BundleError)


def test_a_run_that_is_ended_loses_nothing(
    bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before the manifest takes the old one's place, the bundle is one of format 1 still."""
    bundle = bundle_of("sd")
    before = content(bundle)
    write = files.write

    def ended(path: Any, data: bytes, *, root: Any = None) -> None:
        if Path(path).name == MANIFEST:
            raise KeyboardInterrupt
        write(path, data, root=root)

    monkeypatch.setattr(files, "write", ended)
    with pytest.raises(KeyboardInterrupt):
        upgrade(bundle, Quiet())
    assert content(bundle).items() >= before.items()
    monkeypatch.undo()
    manifest = upgrade(bundle, Quiet())
    assert manifest is not None
    assert content(bundle).keys() == {file.path for file in manifest.files()} | {MANIFEST}


def test_another_process_is_waited_for(bundle_of: Callable[[str], Path]) -> None:
    bundle, stages = bundle_of("sd"), Quiet()
    with writing(bundle, Quiet()):
        thread = threading.Thread(target=upgrade, args=(bundle, stages))
        thread.start()
        while WAITING not in stages.stages:
            thread.join(0.01)
        assert json.loads((bundle / MANIFEST).read_bytes())["format_version"] == 1
    thread.join()
    Manifest.load(bundle)


def test_a_folder_that_cannot_be_written(
    bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of("sd")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="nothing can be written"):
        upgrade(bundle, Quiet())


def test_a_file_in_the_place_of_a_table(bundle_of: Callable[[str], Path]) -> None:
    """A listed file is not written over, nor is a link or a folder."""
    bundle = bundle_of("sd")
    document = json.loads((bundle / MANIFEST).read_bytes())
    schedule, tokenizer = document["schedules"][0], document["tokenizers"][0]
    taken = f"schedules/{schedule['name']}.json"
    (bundle / tokenizer["file"]["path"]).rename(bundle / taken)
    edit(bundle, lambda d: d["tokenizers"][0]["file"].update(path=taken))
    before = content(bundle)
    with pytest.raises(BundleError, match="where a table of plans is to stand"):
        upgrade(bundle, Quiet())
    assert content(bundle) == before


def test_a_folder_in_the_place_of_a_table(bundle_of: Callable[[str], Path]) -> None:
    bundle = bundle_of("sd")
    (bundle / "schedules" / "pndm.json").mkdir()
    with pytest.raises(BundleError, match="a file is to stand there"):
        upgrade(bundle, Quiet())


def test_a_full_disk(bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of("sd")
    before = content(bundle)
    write = files.write

    def full(path: Any, data: bytes, *, root: Any = None) -> None:
        if Path(path).name == MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data, root=root)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(InputError, match=r"No space left on device; the bundle is as it was"):
        upgrade(bundle, Quiet())
    assert content(bundle) == before


def test_the_others_are_upgraded_all_the_same(
    bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = bundle_of("sd")
    run = CliRunner().invoke(cli, ["upgrade", str(tmp_path / "nothing"), str(bundle)])
    assert isinstance(run.exception, BundleError)
    Manifest.load(bundle)
