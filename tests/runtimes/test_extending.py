"""docs/extending.md is true: its backend, installed by its entry point, makes pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
EXAMPLE = ROOT / "examples" / "numpy_backend.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the page's package is installed."""
    (project,) = (tomllib.loads(block) for block in blocks("toml"))
    points = project["project"]["entry-points"]["latentc.backends"]
    module = points["numpy"].partition(":")[0]
    shutil.copy(EXAMPLE, tmp_path / f"{module}.py")
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 1.0\n"
    )
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[latentc.backends]", *lines, ""]))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "LATENTC_CACHE": str(tmp_path / "cache")}


def latentc(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "latentc", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_quotes_the_example() -> None:
    example = EXAMPLE.read_text("utf-8")
    quoted = [block for block in blocks("python") if "latentc.load" not in block]
    assert len(quoted) == 2
    for block in quoted:
        assert block.rstrip("\n") in example, block


def test_the_backend_is_found(installed: dict[str, str]) -> None:
    records = {each["name"]: each for each in json.loads(latentc(installed, "backends", "--json"))}
    assert records["numpy"]["installed"]
    assert records["numpy"]["targets"] == ["onnx"]


def test_the_backend_verifies_and_generates(
    installed: dict[str, str], sd_bundle: Path, tmp_path: Path
) -> None:
    # The onnx package refuses files with several hard links, as bundles that share files have.
    shutil.copytree(sd_bundle, tmp_path / "bundle")
    bundle, picture = str(tmp_path / "bundle"), tmp_path / "circle.png"
    found = json.loads(latentc(installed, "verify", bundle, "--backend", "numpy", "--json", "-"))
    assert [each["passed"] for each in found["verified"]] == [True]
    latentc(
        installed, "generate", bundle, "a large red circle", "--backend", "numpy",
        "--steps", "1", "-o", str(picture),
    )  # fmt: skip
    assert picture.exists()
