"""The cold-start comparison measures equal work and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from latentc.benchmarks import bare_onnx, cold_start, importtime
from latentc.benchmarks.measure import Child

SEED, STEPS, GUIDANCE = 5, 4, 5.0


def child(seconds: float, memory: int) -> Child:
    return Child(seconds, seconds, memory, memory, None)


def test_ratios_are_those_of_medians() -> None:
    rows = cold_start.evaluate(
        {
            cold_start.BARE: [child(1.0, 100), child(9.0, 100), child(1.0, 100)],
            "latentc onnx-fp32": [child(1.2, 90), child(1.1, 130), child(1.3, 120)],
        }
    )
    assert rows["latentc onnx-fp32"].time_ratio == pytest.approx(1.2)
    assert rows["latentc onnx-fp32"].memory_ratio == pytest.approx(1.2)
    shown = cold_start.show(rows)
    assert "time 1.20, memory 1.20 (target: at most 1.3 each)" in shown


def test_without_the_bare_script_there_are_no_ratios() -> None:
    rows = cold_start.evaluate({"latentc openvino-fp32": [child(1.0, 100)]})
    assert rows["latentc openvino-fp32"].time_ratio is None
    assert "target" not in cold_start.show(rows)


def test_import_times_are_summed_by_package() -> None:
    text = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |        100 |   json.decoder\n"
        "import time:        50 |        150 |     numpy.linalg\n"
        "import time:       200 |        350 |   numpy\n"
        "something else\n"
        "import time:         7 |          7 | _frozen_importlib_external\n"
    )
    spent = importtime.by_package(text)
    assert list(spent) == ["numpy", importtime.STANDARD]
    assert spent["numpy"] == importtime.Spent(2, 250)
    assert spent[importtime.STANDARD] == importtime.Spent(2, 107)
    assert importtime.rows(spent)[-1] == ("all", "4", "0.4")


def test_the_bare_script_makes_the_same_image(builtin_bundle: Path, tmp_path: Path) -> None:
    import latentc

    pipe = latentc.load(builtin_bundle, backend="onnxruntime")
    spec = pipe.manifest.latents
    shape = [1, spec.channels, *(s // spec.factor for s in (spec.default_height,) * 2)]
    bare_onnx.main(
        str(builtin_bundle), "a red cube", STEPS, GUIDANCE, SEED, shape, str(tmp_path / "bare.png")
    )
    result = pipe(
        "a red cube",
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        scheduler=cold_start.SCHEDULER,
        latents=np.random.default_rng(SEED).standard_normal(shape, np.float32),
    )
    bare = np.asarray(Image.open(tmp_path / "bare.png"), np.int16)
    assert np.abs(bare - np.asarray(result.images[0], np.int16)).max() <= 1


def test_the_command_runs(sd_bundle: Path, tmp_path: Path) -> None:
    arguments = [str(sd_bundle), "--runs", "1", "--build", "onnx-fp32", "--breakdown"]
    result = CliRunner().invoke(
        cold_start.main, [*arguments, "--json", str(tmp_path / "cold.json")]
    )
    assert result.exit_code == 0, result.output
    assert "latentc on ONNX Runtime to the bare script: time" in result.output
    assert "numpy" in result.output
    assert (tmp_path / "cold.json").exists()


def test_an_unknown_build_is_an_error(sd_bundle: Path) -> None:
    result = CliRunner().invoke(cold_start.main, [str(sd_bundle), "--build", "wrong"])
    assert result.exit_code == 1
    assert "none of these builds: wrong" in result.output
