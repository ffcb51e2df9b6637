"""The loop without a model: every scheduler and shape is measured, and the limit is named."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from latentc.benchmarks import loop_overhead
from latentc.exporter.schedulers.tables import DEFAULT_SCHEDULERS


def test_the_command_runs(tmp_path: Path) -> None:
    written = tmp_path / "loop.json"
    arguments = ["--runs", "1", "--steps", "4", "--json", str(written)]
    result = CliRunner().invoke(loop_overhead.main, arguments)
    assert result.exit_code == 0, result.output
    assert f"allowed: {loop_overhead.LIMIT_MS} ms" in result.output
    found = json.loads(written.read_text())
    assert set(DEFAULT_SCHEDULERS) < set(found["results"])
    assert len(found["growth"]) == len(loop_overhead.GROWING)
    assert all(min(each) > 0 for each in found["growth"].values())
