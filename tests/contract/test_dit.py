"""DiT makes the same images as diffusers, of one class and of several, and says what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiTPipeline

import latentc
from latentc.benchmarks.bench.latentc_case import arguments
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.commands.generate import generate
from latentc.runtimes.errors import InputError
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.verification.verify import relative_l2
from tests.docs import independent_loader as reader

STEPS = 5
LABELS = [207, 0, 999]


@pytest.fixture(scope="module")
def bundle(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "bundle"
    options: dict[str, Any] = {"schedulers": ["dpmpp_2m"], "steps": [4, STEPS]}
    return export(pipeline_folder("dit"), folder, targets=["onnx", "openvino"], **options).bundle


@pytest.fixture(scope="module")
def original(pipeline_folder: Callable[[str], Path]) -> Any:
    with quiet_loading():
        pipe = DiTPipeline.from_pretrained(pipeline_folder("dit"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["onnxruntime", "openvino"])
def ours(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with latentc.load(bundle, backend=request.param) as pipe:
        yield pipe


@pytest.mark.support(family="dit", task="class-to-image", target="onnxruntime")
@pytest.mark.support(family="dit", task="class-to-image", target="openvino")
@pytest.mark.parametrize("seeds", [5, [5, 6, 7]])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_same_images(ours: Pipeline, original: Any, scale: float, seeds: Any) -> None:
    generator: Any = [torch.Generator().manual_seed(s) for s in seeds] if seeds != 5 else None
    expected = original(
        class_labels=LABELS,
        guidance_scale=scale,
        num_inference_steps=STEPS,
        generator=generator or torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    call = {"guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "np"}
    result = ours(class_labels=LABELS, seed=seeds, **call)
    assert np.abs(result.images - expected).max() < 2e-4
    assert result.settings["class_labels"] == LABELS
    same = {name: result.settings[name] for name in ("class_labels", "guidance_scale", "seed")}
    again = ours(**{**call, **same})
    assert np.array_equal(again.images, result.images)


def test_one_class_is_for_all(ours: Pipeline) -> None:
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": 1}
    alone = ours(class_labels=207, **call).latents
    assert alone.shape == (1, 4, 8, 8)
    assert np.array_equal(ours(class_labels=[207], **call).latents, alone)
    assert np.array_equal(ours(class_labels=np.array([207]), **call).latents, alone)
    twice = ours(class_labels=207, num_images_per_prompt=2, **call).latents
    np.testing.assert_allclose(twice[0], alone[0], atol=1e-5)
    assert not np.array_equal(ours(class_labels=208, **call).latents, alone)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "'class_labels' is missing: this call needs it"),
        ({"class_labels": 1001}, "'class_labels' must be from 0 to 1000, not 1001"),
        ({"class_labels": [1, -1]}, "'class_labels' must be from 0 to 1000, not 1, -1"),
        ({"class_labels": 1.5}, "'class_labels' must be an integer, not 1.5"),
        ({"class_labels": []}, "'class_labels' must be a number, or 1 to [0-9]+ of them"),
        ({"class_labels": "otter"}, "'class_labels' must be an integer, not 'otter'"),
        ({"class_labels": 1, "batch_size": 2}, "unknown argument 'batch_size'"),
        ({"class_labels": 1, "height": 32}, "height 32: this bundle was exported for 16 only"),
        ({"class_labels": [1, 2], "latents": np.zeros((1, 4, 8, 8))}, "must have the shape"),
    ],
)
def test_bad_input(call: dict[str, Any], says: str, ours: Pipeline) -> None:
    with pytest.raises(InputError, match=says):
        ours(**call)


def test_on_the_command_line(bundle: Path, tmp_path: Path) -> None:
    images = tmp_path / "image.png"
    asked = [str(bundle), "--arg", "class_labels=207,360", "--steps", "4", "-o", str(images)]
    result = CliRunner().invoke(generate, asked)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_other_reader(bundle: Path) -> None:
    """The reader of tests/docs has rows of numbers, and numbers in the place of arguments."""
    other = reader.Bundle(bundle)
    call: dict[str, Any] = {"num_inference_steps": 4, "scheduler": "ddim"}
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        for labels, seed in (([207, 360], 3), (207, 1)):
            latents, _ = other(class_labels=labels, seed=seed, **call)
            found = pipe(class_labels=labels, seed=seed, output_type="latent", **call)
            assert relative_l2(latents, found.latents) < 1e-5
    with pytest.raises(reader.Refused, match="class_labels"):
        other(class_labels=[1001], **call)
    with pytest.raises(reader.Refused, match="class_labels"):
        other(**call)


def test_one_size_for_a_list_of_classes(bundle: Path, tmp_path: Path) -> None:
    """Loaded for the images that the list says."""
    asked = [str(bundle), "--arg", "class_labels=1,2", "--static", "--steps", "4", "--json"]
    result = CliRunner().invoke(generate, [*asked, "-o", str(tmp_path / "{index}.png")])
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_what_other_commands_say(bundle: Path, ours: Pipeline) -> None:
    twice = ["--arg", "class_labels=1", "--arg", "class_labels=2"]
    result = CliRunner().invoke(generate, [str(bundle), *twice])
    assert "--arg class_labels is given twice" in str(result.exception)
    with pytest.raises(InputError, match="this bundle takes no texts"):
        ours.encode_prompt("red")
    request = {"case": dict.fromkeys(("height", "width", "batch"), 1) | {"call": {}}}
    with pytest.raises(InputError, match="this bundle needs 'class_labels'"):
        arguments(request, ours.signature, None, 4, 1, None)
    assert ours.signature.needed_rows == {"class_labels": 500}
    assert ours(**ours.signature.needed_rows, num_inference_steps=4).images
