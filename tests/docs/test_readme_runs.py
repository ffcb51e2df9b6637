"""The README's quick start, run as it stands: every latentc command, then the Python block."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from latentc.runtimes.bundle.manifest import MANIFEST, Manifest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("latentc ")]


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LATENTC_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(builtin_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the bundle has the graphs of the README's targets already, so that the
    export adds what is not there; `make demo` exports into an empty folder."""
    folder = tmp_path_factory.mktemp("readme")
    bundle = folder / "shapes"
    shutil.copytree(builtin_bundle, bundle)
    manifest = Manifest.load(bundle)
    builds = tuple(build for build in manifest.builds if build.target != "torch")
    (bundle / MANIFEST).write_bytes(structs.replace(manifest, builds=builds).checked())
    return folder


def test_commands(folder: Path) -> None:
    found = commands()
    assert {"export", "inspect", "generate", "schedule", "verify", "backends"} == {
        command[1] for command in found
    }
    for command in found:
        run(folder, "-m", *command)
    assert (folder / "circle.png").stat().st_size > 500
    assert len(list(folder.glob("*.png"))) == 5  # one circle, and -n 4


def test_python(folder: Path) -> None:
    (block,) = blocks("python")
    output = run(folder, "-c", block)
    assert len(output.splitlines()) == 20
