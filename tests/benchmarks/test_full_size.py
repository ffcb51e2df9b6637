"""The full-size benchmark's own logic, on a tiny pipeline's bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentc.benchmarks import full_size, jobs
from latentc.benchmarks.measure import Child

SIZE = 32


def test_a_component_and_a_pipeline_are_measured_without_torch(sd_bundle: Path) -> None:
    arguments = {"bundle": str(sd_bundle), "backend": "onnxruntime", "size": SIZE}
    found = jobs.run("component", {**arguments, "name": "denoiser", "runs": 2})
    assert len(found.result["calls"]) == 2
    assert found.result["median"] > 0
    assert found.peak_memory >= found.result["memory_loaded"] > 0
    whole = jobs.run("pipeline", {**arguments, "steps": 2})
    assert len(whole.result["steps"]) == 3  # PNDM evaluates the model once more
    assert whole.peak_memory < 400 << 20  # with torch it would be above


class Jobs:
    """Stands in for `jobs.run`: makes a bundle's folder, remembers what was asked."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, arguments: Mapping[str, Any], echo: bool = False) -> Child:
        self.names.append(str(arguments.get("name", name)))
        stage = {
            "subject": "denoiser",
            "stage": "capture",
            "seconds": 1.0,
            "size": 5_000_000,
            "memory": 1 << 30,
            "peak_memory": 2 << 30,
        }
        result: dict[str, Any] = {
            "export": {"seconds": 3.0, "stages": [stage], "size": 7_000_000, "verified": True},
            "component": {"load": 1.0, "first": 2.0, "median": 1.5, "memory_loaded": 1 << 20},
            "pipeline": {"load": 1.0, "steps": [2.0, 1.0], "median": 1.5, "memory_loaded": 1},
        }[name]
        if name == "export":
            Path(arguments["output"]).mkdir(parents=True)
        return Child(4.0, 4.0, 5 << 30, 5 << 30, result)


@pytest.fixture
def fake_jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    fake = Jobs()
    monkeypatch.setattr(jobs, "run", fake)
    return fake


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_pieces_are_measured_once_and_the_bundle_goes(
    fake_jobs: Jobs, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [str(source), "-o", str(out), "--target", "onnx"]
    report = tmp_path / "report.json"
    first = CliRunner().invoke(full_size.main, [*arguments, "--json", str(report)])
    assert first.exit_code == 0, first.output
    assert fake_jobs.names == ["export", "text_encoder", "denoiser", "vae_decoder", "pipeline"]
    assert "peak memory of every export within 6 GiB" in first.output
    assert "denoiser: capture" in first.output
    assert not (out / "bundle-onnx").exists()
    assert json.loads(report.read_text())["targets"]["onnx"]["export"]["seconds"] == 3.0
    again = CliRunner().invoke(full_size.main, arguments)
    assert again.exit_code == 0
    assert len(fake_jobs.names) == 5
    other = CliRunner().invoke(full_size.main, [*arguments, "--size", "256"])
    assert other.exit_code == 0
    assert len(fake_jobs.names) == 10


def test_an_interrupted_run_goes_on(fake_jobs: Jobs, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(source), "-o", str(out), "--target", "onnx"]
    assert CliRunner().invoke(full_size.main, arguments).exit_code == 0
    (out / "pieces" / "onnx-denoiser.json").unlink()
    fake_jobs.names.clear()
    assert CliRunner().invoke(full_size.main, arguments).exit_code == 0
    assert fake_jobs.names == ["export", "denoiser"]  # the bundle had been removed


def test_too_much_memory_is_a_failure(fake_jobs: Jobs, source: Path, tmp_path: Path) -> None:
    arguments = [str(source), "-o", str(tmp_path / "out"), "--target", "onnx", "--limit", "4.5"]
    result = CliRunner().invoke(full_size.main, arguments)
    assert result.exit_code == 1
    assert "above 4.5 GiB: onnx" in result.output


def test_a_foreign_folder_is_never_removed(fake_jobs: Jobs, source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "bundle-onnx"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    result = CliRunner().invoke(full_size.main, [str(source), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert (mine / "thesis.txt").exists()
    assert not fake_jobs.names
