"""`latentc tune` with real engines: what it promises of a preset holds for its images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latentc import cli
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import BACKENDS
from latentc.runtimes.pipeline.pipeline import load
from latentc.runtimes.presets.preset import LIMITS
from latentc.runtimes.tuning.tune import SEED
from latentc.runtimes.verification.verify import compare_images, to_bytes

PROMPT = "a large red circle"
STEPS = 6


def test_presets_of_two_engines(
    sd_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("onnxruntime", "openvino")
    for name in names:
        pytest.importorskip(name)
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path))
    monkeypatch.setattr(engines, "BACKENDS", {name: BACKENDS[name] for name in names})
    how = ["--steps", str(STEPS), "--prompt", PROMPT, "--seconds", "60", "--json"]
    assert cli.run(["tune", str(sd_bundle), *how]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {trial["setup"]["backend"] for trial in found["trials"] if trial["seconds"]} == {*names}
    call = {"num_inference_steps": STEPS, "seed": SEED, "output_type": "np"}
    reference = found["reference"]["setup"]
    with load(sd_bundle, build=reference["build"], backend=reference["backend"]) as pipe:
        expected = to_bytes(pipe(PROMPT, **call).images)
    for name, limits in LIMITS.items():
        with load(sd_bundle, preset=name) as pipe:
            result = pipe(PROMPT, **call)
        assert compare_images(to_bytes(result.images), expected)[1] >= limits.image_psnr
        winner = found["winners"][name]
        assert {
            "preset": name,
            "build": winner["setup"]["build"],
        }.items() <= result.settings.items()
        assert winner["arguments"].items() <= result.settings.items()
    with load(sd_bundle, preset="fast") as pipe:
        assert np.isfinite(pipe(PROMPT, seed=1, height=64, width=64, output_type="np").images).all()
