"""Type checkers know the arguments of our functions, which are declared in TypedDicts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT

# Only what says the arguments is read: seconds otherwise.
CONFIGURATION = """
[mypy]
strict = true
follow_imports = skip
[mypy-latentc,latentc.exporter.compiler.export,latentc.exporter.export_arguments,latentc.exporter.targets.coreml.options,latentc.runtimes.options]
follow_imports = silent
"""
PROGRAMS = {
    "export": (
        """
        import latentc
        latentc.export("a", "b", height=64, targets=["onnx"], coreml_target="iOS17", steps=4)
        latentc.export("a", "b", heigth=64)
        latentc.export("a", "b", height="64")
        latentc.export("a", "b", coreml_batch="two")
        """,
        {
            4: 'Unexpected keyword argument "heigth" for "export"; did you mean "height"?',
            5: 'Argument "height" to "export" has incompatible type "str"',
            6: 'Argument "coreml_batch" to "export" has incompatible type "str"',
        },
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_arguments_are_found_before_a_program_runs(name: str, tmp_path: Path) -> None:
    text, wrong = PROGRAMS[name]
    (tmp_path / "program.py").write_text("\n".join(map(str.strip, text.splitlines())))
    (tmp_path / "mypy.ini").write_text(CONFIGURATION)
    command = (sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"))
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "program.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = {
        int(line): message
        for line, message in re.findall(r"program\.py:(\d+): error: (.*)", done.stdout)
    }
    assert errors.keys() == wrong.keys(), done.stdout
    assert all(wrong[line] in errors[line] for line in wrong), done.stdout
