"""The judge's scores of a bundle, build by build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from examples.shapes.compare import main


def test_scores(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    arguments = ["--prompts", "4", "--steps", "20", "--build", "onnx-fp32", "--json", str(path)]
    result = CliRunner().invoke(main, [str(exported("builtin")), *arguments])
    assert result.exit_code == 0, result.output
    scores = json.loads(path.read_text())
    assert list(scores) == ["diffusers", "onnx-fp32"]
    assert scores["diffusers"] == scores["onnx-fp32"]
    assert max(scores["diffusers"].values()) > 0
    assert "openvino" not in result.output
