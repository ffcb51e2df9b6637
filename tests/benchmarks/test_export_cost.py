"""These tests check how an export's cost is shown, and the peak of anonymous memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from latentc.benchmarks import export_cost
from latentc.benchmarks.measure import Child

STAGE = {"subject": "denoiser", "stage": "capture", "seconds": 12.3, "cpu": 11.0, "size": 5_000_000}
FOUND: dict[str, Any] = {
    "stages": [{**STAGE, "anonymous": 1 << 29}],
    "seconds": 20.0,
    "cpu": 18.0,
    "anonymous": 3 << 29,
    "resident": 4 << 30,
    "size": 7_000_000,
    "expected": {"memory": 2 << 30, "disk": 8_000_000, "seconds": 25.0},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def run(arguments: Sequence[str], echo: bool = False) -> Child:
        seen.append(json.loads(arguments[-1]))
        Path(seen[-1][1]).mkdir()
        return Child(20.0, 18.0, 1, 1, FOUND)

    monkeypatch.setattr(export_cost, "run_child", run)
    return seen


def test_measured_and_expected_stand_together(asked: list[Any], tmp_path: Path) -> None:
    arguments = [str(tmp_path), "-o", str(tmp_path / "out"), "-t", "openvino", "-p", "fp16"]
    shown = CliRunner().invoke(export_cost.main, [*arguments, "--no-verify"])
    assert shown.exit_code == 0, shown.output
    assert asked == [[str(tmp_path), str(tmp_path / "out"), ["openvino"], "fp16", False]]
    assert not (tmp_path / "out").exists()
    lines = {line.split("  ")[0]: line for line in shown.output.splitlines()}
    assert "0.50 GiB" in lines["denoiser: capture"]
    assert "1.50 GiB" in lines["all"]
    assert "2.00 GiB" in lines["expected"]


def test_what_is_there_is_not_removed(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused = CliRunner().invoke(export_cost.main, [str(tmp_path), "-o", str(tmp_path / "out")])
    assert refused.exit_code == 1
    assert (tmp_path / "out").exists()
    assert not asked


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_the_peak_between_two_looks() -> None:
    peak = export_cost.Peak()
    with peak.watched():
        before = peak.take()
        held = np.ones(1 << 24)  # 128 MiB
        after = peak.take()
        del held
    peak.take()
    assert after - before > 100 << 20
    assert peak.whole == after
