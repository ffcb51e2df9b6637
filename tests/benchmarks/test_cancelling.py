"""The benchmark of giving up runs: its figures and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from latentc.benchmarks import cancelling
from latentc.runtimes.pipeline.pipeline import load
from tests.support.fakes import FakeBackend, make_bundle


@pytest.mark.fault("1.7", "how long a step goes on after it was given up is measured")
@pytest.mark.parametrize(("limit", "code"), [(60.0, 0), (-1.0, 1)])
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, code: int
) -> None:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cancelling, "LIMIT", limit)
    monkeypatch.setattr(cancelling, "_STEPS", 4)
    monkeypatch.setattr(cancelling, "load", lambda path, backend: load(path, FakeBackend()))
    report = tmp_path / "report.json"
    arguments = [make_bundle(tmp_path / "bundle"), "--runs", 3, "--seconds", 0.001, "--size", 16]
    done = CliRunner().invoke(
        cancelling.main, [*map(str, arguments), "--backend", "fake", "--json", str(report)]
    )
    assert done.exit_code == code, done.output
    (result,) = json.loads(report.read_text())["results"]
    assert len(result["each"]) == 3
    assert 0 <= result["median"] <= result["largest"]
