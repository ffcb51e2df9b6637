"""These tests check what mypy says of programs that use latentc: types of images, misspellings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOUND = """
from typing import Any
import latentc

other: dict[str, Any] = {"an_argument_of_another_bundle": 3}
with latentc.load("bundle", "openvino", threads=2) as pipe:
    result = pipe("a red circle", num_inference_steps=2, seed=[1, 2])
    reveal_type(result.images)
    reveal_type(pipe("a red circle", output_type="np", height=64).images)
    reveal_type(pipe("a red circle", output_type="latent").frames)
    reveal_type(pipe.stream("a red circle", strength=0.5).finish().images)
    reveal_type(pipe.compute("prompt_embeds", prompt="a red circle"))
    pipe(**pipe.encode_prompt("a red circle", negative_prompt="blue"), **other)
kept: latentc.Result = result
latentc.export("a", "b", height=64, targets=["onnx"], coreml_target="iOS17", steps=4)
"""
BEGIN = """from pathlib import Path
import latentc
from latentc.benchmarks.bench.compare import compare
from latentc.benchmarks.bench.model import read
from latentc.benchmarks.bench.requested_plan import requested_plan
from latentc.exporter.schedulers.plans import add_to_bundle
from latentc.runtimes.building.engines import build_engines
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.sampling.plan_json import write_plans
from latentc.runtimes.tuning.tune import tune
from latentc.runtimes.verification.whole_bundle import verify
pipe = latentc.load("bundle")
"""
ARRAY = "numpy.ndarray[Any, numpy.dtype[Any]]"
REVEALED = {8: "list[PIL.Image.Image]", 9: ARRAY, 10: ARRAY, 11: "list[PIL.Image.Image]", 12: ARRAY}
# A line of a program, and what is said of it.
FAULTS = (
    ('pipe("a", num_inference_step=2)', 'did you mean "num_inference_steps"'),
    ('pipe("a", strength="high")', 'No overload variant of "__call__" of "Pipeline"'),
    ('pipe("a", output_type="jpg")', 'No overload variant of "__call__" of "Pipeline"'),
    ('pipe.stream("a", heigth=64)', 'did you mean "height"?'),
    ('pipe.compute("latents", sed=3)', 'did you mean "seed"?'),
    ('pipe.encode_prompt("a", negative_promt="b")', 'did you mean "negative_prompt"'),
    ('latentc.load("bundle", thread=2)', 'did you mean "threads"?'),
    ('latentc.export("a", "b", heigth=64)', 'did you mean "height"?'),
    ('latentc.export("a", "b", height="64")', '"height" to "export" has incompatible type "str"'),
    ('latentc.export("a", "b", coreml_batch="two")', '"coreml_batch" to "export" has incomp'),
    ('tune(Bundle.open("a"), second=9)', 'did you mean "seconds"?'),
    ('verify("a", file_only=True)', 'did you mean "files_only"?'),
    ('build_engines("a", workspce=2)', 'did you mean "workspace"?'),
    ('add_to_bundle(Path("a"), schedulers="euler", step=3)', 'did you mean "steps"?'),
    ('add_to_bundle(Path("a"), steps=3)', 'Missing named argument "schedulers"'),
    ('requested_plan("a", batch=3)', 'did you mean "batches"?'),
    ('write_plans(Bundle.open("a"), Path("b"), step=3)', 'did you mean "steps"?'),
    ('compare(read(Path("a")), read(Path("b")), treshold=0.1)', 'did you mean "threshold"?'),
    ('latentc.load("bundle", threads="2")', '"threads" to "load" has incompatible type "str"'),
)
FAULTY = BEGIN + "\n".join(line for line, _ in FAULTS)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[str]]:
    """Return what mypy says of both programs, by program and line."""
    folder = tmp_path_factory.mktemp("typed")
    for name, text in (("sound", SOUND), ("faulty", FAULTY)):
        (folder / f"{name}.py").write_text(text, "utf-8")
    programs = [str(path) for path in sorted(folder.glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *programs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines: dict[tuple[str, int], list[str]] = {}
    for name, line, text in re.findall(r"(\w+)\.py:(\d+): (.*)", done.stdout):
        lines.setdefault((name, int(line)), []).append(text)
    assert lines, done.stdout + done.stderr
    return lines


def test_a_sound_program(said: dict[tuple[str, int], list[str]]) -> None:
    expected = {
        ("sound", line): [f'note: Revealed type is "{kind}"'] for line, kind in REVEALED.items()
    }
    assert {place: texts for place, texts in said.items() if place[0] == "sound"} == expected


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[line for line, _ in FAULTS])
def test_a_fault(said: dict[tuple[str, int], list[str]], number: int) -> None:
    assert FAULTS[number][1] in "\n".join(said["faulty", BEGIN.count("\n") + number + 1])
