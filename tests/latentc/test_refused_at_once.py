"""What each command refuses, before it does any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.conftest import Run
from tests.fakes import make_bundle

# By command, what its work begins with: reaching it fails the test.
WORK = {
    "generate": "runtimes.pipeline.load_asked",
    "verify": "runtimes.bundle.Bundle.check",
    "plans": "runtimes.plan_json.document",
    "schedule": "exporter.schedules.writing",
    "bench": "benchmarks.bench.runner.run",
    "build": "runtimes.build_cli._build",
    "tune": "runtimes.tune.tune",
}
# Arguments after the bundle ({here} is a folder with `file` and `folder` in it), and the message.
REFUSED: tuple[tuple[str, str, str], ...] = (
    ("generate", "a --scheduler coffee", "no scheduler 'coffee' in this bundle"),
    ("generate", "a --steps 0", "num_inference_steps"),
    ("generate", "a --steps 999", "no sampling plan for 999 steps"),
    ("generate", "a --height 7", "height 7 is not a multiple of 4"),
    ("generate", "a --guidance-scale nan", "guidance_scale"),
    ("generate", "a --arg coffee=1", "coffee"),
    ("generate", "a --strength 0.5", "strength"),
    ("generate", "a --image {here}/none.png", "no such file"),
    ("generate", "a -o {here}/none/a.png", "does not exist"),
    ("generate", "a -o {here}/a.bmp", "the extension '.bmp'"),
    ("verify", "--backend coffee", "no backend named 'coffee'"),
    ("verify", "--build coffee", "no build 'coffee'"),
    ("verify", "--json {here}/folder", "is a folder; give a file"),
    ("verify", "--json {here}/none/figures.json", "does not exist"),
    ("plans", "-o {here}/file", "is a file; give a folder"),
    ("plans", "-o {here}/file/in", "nothing can be written in"),
    ("plans", "-o {here}/plans --scheduler coffee", "no scheduler 'coffee'"),
    ("plans", "-o {here}/plans --steps 0", "no plan for 0 steps"),
    ("schedule", "--scheduler coffee", "unknown scheduler 'coffee'"),
    ("schedule", "--scheduler CoffeeScheduler", "unknown scheduler 'CoffeeScheduler'"),
    ("schedule", "--scheduler euler --steps 0", "--steps"),
    ("bench", "-o {here}/file", "is a file"),
    ("bench", "-o {here}/file/in", "nothing can be written in"),
    ("bench", "-o {here}/report --build coffee", "no build 'coffee'"),
    ("bench", "-o {here}/report --backend coffee", "no backend named 'coffee'"),
    ("bench", "-o {here}/report --scenario coffee", "no scenario 'coffee'"),
    ("bench", "-o {here}/report --peer coffee", "no peer 'coffee'"),
    ("bench", "-o {here}/report --steps 0", "--steps"),
    ("build", "--target coffee", "nothing to build"),
    ("build", "--height coffee", "--height"),
    ("tune", "--seconds 0", "--seconds"),
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.fault("3.1", "each command refuses bad names, numbers and outputs at once")
@pytest.mark.parametrize(("command", "arguments", "message"), REFUSED)
def test_commands(
    command: str,
    arguments: str,
    message: str,
    here: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("the work was begun")

    monkeypatch.setattr(WORK[command], reached)
    before = sorted(here.rglob("*"))
    given = [each.format(here=here) for each in arguments.split()]
    code, _, errors = run(command, here / "bundle", *given)
    assert (code, message in errors) == (2, True), errors
    assert sorted(here.rglob("*")) == before


@pytest.mark.fault("3.1", "folders that cannot be written, of each command that writes one")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("plans", "-o {here}/new"),
        ("bench", "-o {here}/new"),
        ("schedule", "--scheduler euler"),
        ("verify", "--json {here}/new.json"),
    ],
)
def test_folders_that_cannot_be_written(
    command: str, arguments: str, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("the work was begun")

    monkeypatch.setattr(WORK[command], reached)
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    given = [each.format(here=here) for each in arguments.split()]
    code, _, errors = run(command, here / "bundle", *given)
    assert (code, "nothing can be written in" in errors) == (2, True), errors


@pytest.mark.fault("3.1", "the demo's output")
def test_the_demos_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentc import demo

    monkeypatch.setattr(demo, "compile_builtin", lambda *_: pytest.fail("the work was begun"))
    for output in (here / "file", here / "file" / "in"):
        assert CliRunner().invoke(demo.main, ["-o", str(output)]).exit_code == 2
