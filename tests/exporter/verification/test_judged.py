"""A source that names a judge: PyTorch's images are judged at export, then each build's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.compiler.run import Exported
from latentc.exporter.verification import judging as judged
from latentc.runtimes import plugins
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import SourceError
from latentc.runtimes.verification import judges

ASKED = {
    "name": "reddish",
    "images": 12,
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "arguments": {"guidance_scale": 2.0},
}


class Reddish:
    """Likes images of more red than green."""

    def prompts(self, count: int) -> Sequence[str]:
        return [f"a red thing, number {number}" for number in range(count)]

    def agrees(self, image: Image.Image, prompt: str) -> bool:
        red, green, _ = np.asarray(image).mean(axis=(0, 1))
        return bool(red > green) and "red" in prompt


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda _: {"reddish": f"{__name__}:Reddish"})


@pytest.fixture
def source(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(pipeline_folder("sd"), tmp_path / "source"))
    (folder / "latentc.json").write_text(json.dumps({"judge": ASKED}))
    return folder


def quick(source: Path, output: Path, **options: Any) -> Exported:
    return export(source, output, steps=(2,), schedulers=(), **options)


def test_every_build_is_judged(source: Path, sd_bundle: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    result = quick(source, tmp_path / "bundle", share_with=sd_bundle)
    manifest = Manifest.load(result.bundle)
    probe = manifest.probes.judged if manifest.probes else None
    assert probe is not None
    assert (probe.judge, len(probe.prompts), probe.num_inference_steps) == ("reddish", 12, 2)
    verification = manifest.builds[0].verification
    assert verification is not None
    assert verification.score is not None
    assert (verification.score.right, verification.score.images) == (probe.right, 12)
    assert verification.score.passed

    # The images that were judged are those of the pipeline for these seeds.
    import torch

    pipe = DiffusionPipeline.from_pretrained(source, safety_checker=None)
    images = pipe(
        list(probe.prompts),
        num_inference_steps=2,
        guidance_scale=2.0,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(probe.seed + i) for i in range(12)],
    ).images
    right = sum(map(Reddish().agrees, images, probe.prompts))
    assert right == probe.right
    assert not quick(source, tmp_path / "bundle").made


def test_other_sizes_are_not_judged(source: Path, tmp_path: Path) -> None:
    manifest = quick(source, tmp_path / "bundle", height=64, width=64).manifest
    assert manifest.probes is not None
    assert manifest.probes.judged is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "latentc.json"),
        ('{"judge": {"name": "reddish"}}', "missing required field `images`"),
        ('{"judges": 1}', "unknown field `judges`"),
        (json.dumps({"judge": ASKED | {"images": 0}}), "expected positive numbers"),
        (json.dumps({"judge": ASKED | {"images": 10**6}}), "at most 10000 images"),
        (json.dumps({"judge": ASKED | {"name": "stranger"}}), "no judge named 'stranger'"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "latentc.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        judged.read(tmp_path)


def test_nothing_asked(tmp_path: Path) -> None:
    assert judged.read(tmp_path) is None
    (tmp_path / "latentc.json").write_text("{}")
    assert judged.read(tmp_path) is None


def test_the_built_in_model_has_a_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the entry points as they are installed
    asked = judged.read(latentc.builtin_model())
    assert asked is not None
    judge = judges.get(asked.name)
    prompts = judge.prompts(asked.images)
    assert len(set(prompts)) == asked.images == 50
    blank = Image.new("RGB", (asked.width, asked.height), "white")
    assert not any(judge.agrees(blank, prompt) for prompt in prompts)
