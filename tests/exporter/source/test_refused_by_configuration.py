"""A pipeline is refused by its configuration before its weights are loaded, or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import DryRunFileInfo

from latentc.exporter.compiler.export import preflight
from latentc.exporter.source import hub
from latentc.exporter.source import resolving as source
from latentc.runtimes.errors import SourceError
from tests.conftest import Run

IMPOSSIBLE: Mapping[str, tuple[str, str]] = {
    "a height": ("--height 70000 --width 64", "height 70000: this model makes at most"),
    "a width": ("--height 64 --width 70000", "width 70000: this model makes at most"),
    "a task": ("--task upscaling", "StableDiffusionPipeline has no task upscaling; it has: text"),
    "a scheduler": ("--scheduler flow_euler", "is not for models of diffusion"),
    "several schedulers": ("--scheduler euler --scheduler flow_heun", "scheduler 'flow_heun'"),
}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading any weights fails the test."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(source, "load_model", reached)
    monkeypatch.setattr("latentc.exporter.compiler.run.load", reached)


@pytest.mark.fault("3.1", "sizes, tasks and schedulers that the pipeline cannot have")
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("what", IMPOSSIBLE)
@pytest.mark.usefixtures("no_weights")
def test_what_a_pipeline_cannot_have(
    what: str, dry: bool, smallest: Path, tmp_path: Path, run: Run
) -> None:
    arguments, message = IMPOSSIBLE[what]
    given = [*arguments.split(), *(["--dry-run"] if dry else [])]
    code, _, errors = run("export", smallest, "-o", tmp_path / "bundle", *given)
    assert (code, message in errors) == (2, True), errors
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("no_weights")
def test_what_it_can_have(smallest: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"height": 64, "width": 48, "tasks": ["image-to-image"]}
    assert preflight(smallest, tmp_path / "bundle", **asked, schedulers=["euler"]).disk


class Hub:
    """Downloads nothing; says that two files of a GiB are missing and one is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.downloads = folder, 0

    def snapshot(self, place: str, *, dry_run: bool = False, **_: Any) -> Any:
        if not dry_run:
            self.downloads += 1
            return str(self.folder)
        missing = [self._info(name, 1 << 30, False) for name in ("a.safetensors", "b.safetensors")]
        return [*missing, self._info("c.safetensors", 1 << 40, True)]

    def file(self, place: str, *, filename: str, dry_run: bool = False) -> Any:
        return self._info(filename, 2 << 30, False) if dry_run else self.snapshot(place)

    def _info(self, name: str, size: int, cached: bool) -> DryRunFileInfo:
        return DryRunFileInfo("0" * 40, size, name, str(self.folder / name), cached, not cached)


def model(_: Hub) -> None:
    hub.snapshot("owner/name", allow_patterns=["*.safetensors"])


def adapter(_: Hub) -> None:
    hub.file("owner/name", "style.safetensors")


def pipeline(_: Hub) -> None:
    source._download("owner/name", None, None)


@pytest.mark.fault("3.1", "a download that does not fit on the disk")
@pytest.mark.parametrize("room", [(2 << 30) - 1, 2 << 30])
@pytest.mark.parametrize("download", [model, adapter, pipeline])
def test_room_for_a_download(
    download: Any, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines import pipeline_utils

    fake = Hub(tmp_path)

    def download_pipeline(place: str, **_: Any) -> str:  # as diffusers does it, in the end
        return str(pipeline_utils.snapshot_download(place, allow_patterns=["unet/*"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.file)
    monkeypatch.setattr(pipeline_utils, "snapshot_download", fake.snapshot)
    monkeypatch.setattr(pipeline_utils.DiffusionPipeline, "download", download_pipeline)
    monkeypatch.setattr("latentc.exporter.source.hub.free_disk", lambda _: room)
    if room < 2 << 30:
        with pytest.raises(SourceError, match=r"owner/name: the download takes 2\.0 GiB, and 2\.0"):
            download(fake)
    else:
        download(fake)
    assert fake.downloads == (room >= 2 << 30)


def test_nobody_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the cache may have everything."""

    def snapshot(place: str, *, dry_run: bool = False) -> str:
        if dry_run:
            raise ConnectionError("no network")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.snapshot("owner/name") == str(tmp_path)
