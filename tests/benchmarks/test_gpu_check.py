"""`make gpu-check`: what it runs, skips and writes, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from latentc.benchmarks import gpu_check
from latentc.benchmarks.gpu_check import CASES, Case, Outcome, write_record
from latentc.runtimes.backends import backend as engines
from tests.support.fake_tensorrt import Machine, installed

FACTS = {"GPU": "NVIDIA L4", "Driver": "580.1"}


def test_nothing_to_run_without_a_gpu(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        gpu_check.main, ["--records", str(tmp_path), "--folder", str(tmp_path / "out")]
    )
    assert result.exit_code == 5, result.output
    for case in CASES:
        assert f"{case.name}: skipped backend {case.backend!r}" in result.output
    assert "pip install 'latentc[tensorrt]'" in result.output
    assert not list(tmp_path.iterdir())


def test_the_cases_name_what_there_is() -> None:
    from latentc.exporter.options import export_options

    pairs = export_options()
    for case in CASES:
        kind = engines.find(case.backend)
        assert case.target in kind.targets
        assert case.precision not in kind.lacks
        assert case.engines is kind.builds
        pairs.passes(case.target, case.precision)  # refuses a pair that there is not


def test_a_record_and_its_line(tmp_path: Path) -> None:
    outcomes = [
        Outcome(CASES[0], "ok", "", "2.13", 1e-6, 2e-6, 1, 0.25),
        Outcome(CASES[1], "skipped", "not installed"),
        Outcome(CASES[4], "MISS", "", "10.13", 0.5, None, None, None),
    ]
    for _ in range(2):  # a second run of the day replaces the record and adds no second line
        path = write_record(tmp_path, FACTS, outcomes, "the built-in model")
    assert path.name.endswith("-nvidia-l4.md")
    text = path.read_text("utf-8")
    assert "| torch-fp32 | torch 2.13 cuda | 1.0e-06 | 2.0e-06 | 1 | 0.250 | ok |" in text
    assert "- onnx-fp32 on onnxruntime cuda, skipped: not installed" in text
    assert "| tensorrt-fp32 | tensorrt 10.13 cuda | 5.0e-01 |  |  |  | MISS |" in text
    assert (tmp_path / "README.md").read_text("utf-8").count(path.name) == 1


def test_a_case_on_the_stand_in(
    tensorrt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, on an engine that is ONNX Runtime in disguise: see
    tests.support.fake_tensorrt."""
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_check, "machine", lambda: FACTS)
    case = Case("tensorrt", "fp32", "tensorrt", "cuda", engines=True)
    monkeypatch.setattr(gpu_check, "CASES", (case,))
    monkeypatch.setattr(gpu_check, "_export", lambda *_: None)  # it is there
    folders = ["--records", str(tmp_path / "records"), "--folder", str(tensorrt_bundle.parent)]
    with installed(Machine()):
        result = CliRunner().invoke(gpu_check.main, [*folders, "--runs", "1"])
    assert result.exit_code == 0, result.output
    assert f"{case.name}: ok" in result.output
    (record,) = (tmp_path / "records").glob("*-nvidia-l4.md")
    assert "| tensorrt-fp32 | tensorrt 10.13.0 cuda |" in record.read_text("utf-8")
