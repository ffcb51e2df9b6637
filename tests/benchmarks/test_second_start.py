"""The first start against the second: what is compared, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from latentc.benchmarks import second_start
from latentc.benchmarks.measure import summarise


def test_ratios_are_of_medians() -> None:
    first = second_start.Start(summarise([9.0, 4.0, 4.0]), summarise([3.0, 3.0, 8.0]))
    second = second_start.Start(summarise([2.0]), summarise([1.0]))
    shown = second_start.show({second_start.FIRST: first, second_start.SECOND: second}).splitlines()
    assert shown[1].split() == ["first", "start", "4.00", "3.00", "1.0×", "1.0×"]
    assert shown[2].split() == ["second", "start", "2.00", "1.00", "2.0×", "3.0×"]


def test_the_command_runs(sd_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    written = tmp_path / "starts.json"
    arguments = [str(sd_bundle), "--build", "openvino-fp32", "--runs", "1", "--json", str(written)]
    result = CliRunner().invoke(second_start.main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(written.read_text())["rows"]
    assert set(rows) == {second_start.FIRST, second_start.SECOND, second_start.UNCACHED}
    assert all(0 < row["load"]["median"] < row["process"]["median"] for row in rows.values())


def test_an_unknown_build_is_an_error(sd_bundle: Path) -> None:
    result = CliRunner().invoke(second_start.main, [str(sd_bundle), "--build", "wrong"])
    assert result.exit_code == 1
    assert "no build 'wrong'" in result.output
