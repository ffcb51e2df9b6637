"""Files that two bundles have in common, or two graphs of one. With real ones:
tests/contract/test_refiner.py, tests/contract/test_kandinsky.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from latentc.cli import run as command
from latentc.exporter.artifacts.store import Store, missing_artifacts
from latentc.exporter.compiler import sharing
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.errors import BundleError, ExportError
from tests.support import fakes


@pytest.fixture(autouse=True)
def small_files_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_SMALLEST", 1)


def pair(folder: Path) -> tuple[Path, Path]:
    """Two bundles that differ in their denoiser's graph only."""
    other = {"denoiser": "plain_denoiser"}
    return fakes.make_bundle(folder / "a"), fakes.make_bundle(folder / "b", graphs=other)


def _refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_links_stand_for_what_is_the_same(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    own = Manifest.load(second)
    before = {file.path: (second / file.path).read_bytes() for file in own.files()}
    shared = sharing.share(second, own, [first])
    known = {(file.size, file.sha256) for file in Manifest.load(first).files()}
    same = {f.path: f.size for f in own.files() if (f.size, f.sha256) in known}
    assert shared == sum(same.values()) > 0
    assert {path: (second / path).read_bytes() for path in before} == before
    found = {path for path in before if (second / path).stat().st_nlink > 1}
    assert found == same.keys() < before.keys()
    assert sharing.share(second, own, [first]) == shared
    assert not list(second.rglob("*.shared"))
    Bundle.open(second, hashing="always")


@pytest.mark.parametrize("links", [True, False])
def test_graphs_with_the_same_file_store_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle", graphs={"decoder": "denoiser"})
    manifest = Manifest.load(bundle)
    if not links:
        monkeypatch.setattr(os, "link", _refuse)
    sharing.store_once(bundle, manifest)
    linked = {f.path for f in manifest.files() if (bundle / f.path).stat().st_nlink > 1}
    artifacts = manifest.builds[0].artifacts
    same = {file.path for name in ("decoder", "denoiser") for file in artifacts[name].files}
    assert linked == (same if links else set())
    Bundle.open(bundle, hashing="always")


def test_an_altered_file_is_not_taken(tmp_path: Path) -> None:
    """A file that another bundle lists, and no longer has."""
    first, second = pair(tmp_path)
    own = Manifest.load(second)
    for file in Manifest.load(first).files():
        (first / file.path).write_bytes(b"x" * file.size)
    assert sharing.share(second, own, [first]) == 0
    for file in Manifest.load(first).files():
        (first / file.path).unlink()
    assert sharing.share(second, own, [first]) == 0


def test_a_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair(tmp_path)
    monkeypatch.setattr(os, "link", _refuse)
    with pytest.raises(ExportError, match=r"hard link .*not permitted. Leave --share-with out"):
        sharing.share(second, Manifest.load(second), [first])
    Bundle.open(second, hashing="always")


def test_what_cannot_be_shared_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair(tmp_path)
    with pytest.raises(ExportError, match="with itself"):
        sharing.check([first], first)
    with pytest.raises(BundleError):
        sharing.check([tmp_path / "nothing"], tmp_path / "new")
    sharing.check([first, second], tmp_path / "deep" / "new")
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and elsewhere.stat().st_dev != tmp_path.stat().st_dev:
        with pytest.raises(ExportError, match="different disks"):
            sharing.check([first], elsewhere / "new")
    call = ["export", "builtin", "-o", str(tmp_path / "new"), "-q", "--share-with"]
    assert command([*call, str(tmp_path / "nothing")]) == BundleError.exit_code
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    """Unless its file has other content than its bundle lists."""
    first, _ = pair(tmp_path)
    manifest = Manifest.load(first)
    (build,) = manifest.builds
    artifacts = {
        name: replace(each, key=f"{number:064x}")
        for number, (name, each) in enumerate(build.artifacts.items())
    }
    builds = (replace(build, artifacts=artifacts),)
    (first / MANIFEST).write_bytes(replace(manifest, builds=builds).encode())
    artifact = artifacts["denoiser"]

    def taken(name: str) -> bool:
        store = Store(tmp_path / name, None, [first])
        item = store.keep(artifact.key)
        if item is None:
            return False
        assert item.files == artifact.files
        assert all((store.staging / f.path).samefile(first / f.path) for f in item.files)
        return store.made == []

    assert taken("new")
    keys = {("onnx", "fp32"): {"denoiser": artifact.key, "decoder": "none has it"}}
    missing = missing_artifacts(keys, tmp_path / "other", None, [first])
    assert missing == {("onnx", "fp32"): ["decoder"]}
    for file in artifact.files:
        (first / file.path).write_bytes(b"x" * file.size)
    assert not taken("newer")
