"""An export refuses at once what can be refused before the source is looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentc.exporter.compiler import export as compiler
from latentc.exporter.compiler.export import export, preflight
from latentc.exporter.source import resolving as source
from latentc.runtimes.backends import backend
from latentc.runtimes.errors import InputError, SourceError
from tests.conftest import Run
from tests.support.fakes import make_bundle


@pytest.fixture(autouse=True)
def no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the source fails the test."""

    def reached(*_: Any) -> None:
        pytest.fail("the source was looked at")

    monkeypatch.setattr(compiler, "resolve", reached)


def nothing(folder: Path) -> Path:
    return folder / "bundle"


def other_files(folder: Path) -> Path:
    (folder / "bundle").mkdir()
    (folder / "bundle" / "thesis.txt").write_text("the only copy")
    return folder / "bundle"


def link(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "link").symlink_to(folder / "real")
    return folder / "link"


def file(folder: Path) -> Path:
    (folder / "bundle").write_text("a file")
    return folder / "bundle"


OUTPUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a folder that is no bundle": (other_files, "exists and is not a bundle"),
    "a link": (link, "is a link; give the folder"),
    "a file": (file, "is a file; give a folder"),
    "below a file": (lambda folder: file(folder) / "in", "nothing can be written in"),
    "the working folder": (lambda _: Path("."), "working folder or one above it"),
    "a folder above": (lambda _: Path(".."), "working folder or one above it"),
}
OPTIONS: dict[str, tuple[list[str], str]] = {
    "scheduler": (["--scheduler", "coffee"], "unknown scheduler 'coffee'"),
    "scheduler class": (["--scheduler", "CoffeeScheduler"], "unknown scheduler 'CoffeeScheduler'"),
    "target": (["--target", "coffee"], "coffee"),
    "precision": (["--precision", "fp3"], "no precision 'fp3'"),
    "pass": (["--pass", "coffee"], "coffee"),
    "task": (["--task", "coffee"], "coffee"),
    "steps": (["--steps", "0"], "0"),
    "size": (["--height", "64"], "both height and width"),
    "width": (["--width", "0"], "--width"),
    "component": (["--precision", "coffee=fp16"], "no component 'coffee'"),
    "part": (["--without", "unet"], "no pipeline can be exported without it"),
    "prompts": (["--calibration-prompts", "none.txt"], "No such file"),
    "samples": (["--calibration-samples", "0"], "--calibration-samples"),
    "Core ML's sizes": (["-t", "coreml", "--coreml-sizes", "coffee"], "expected up to 128 sizes"),
    "Core ML's range": (["-t", "coreml", "--coreml-sizes", "512-256"], "the range is empty"),
    "Core ML's batch": (["-t", "coreml", "--coreml-batch", "0"], "must be at least 1"),
    "Core ML's chunks": (["-t", "coreml", "--chunk-denoiser"], "needs a fixed size"),
    "Core ML's system": (["-t", "coreml", "--coreml-target", "iOS3"], "--coreml-target"),
    "Core ML's attention": (["-t", "coreml", "--coreml-attention", "no"], "--coreml-attention"),
    "another target's": (["--coreml-batch", "1"], "for target 'coreml', which is not asked for"),
    "image encoder alone": (["--image-encoder", "."], "give --ip-adapter too"),
    "a folder to share with": (["--share-with", "."], "is not a bundle"),
    "floor": (["--fidelity-floor", "-1"], "must be above 0"),
}


@pytest.mark.fault("3.1", "an output that cannot become a bundle")
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(
    name: str, dry: bool, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = OUTPUTS[name]
    output = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, errors = run("export", "source", "-o", output, *(["--dry-run"] if dry else []))
    assert (code, message in errors) == (2, True), errors
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError):
        (preflight if dry else export)("source", output)


@pytest.mark.fault("3.1", "an output folder that cannot be written")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, *_: Path(path) != tmp_path)
    code, _, errors = run("export", "source", "-o", tmp_path / "a" / "bundle")
    assert (code, f"nothing can be written in {tmp_path}" in errors) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("3.1", "an image's folder that cannot be written")
def test_an_images_folder_that_cannot_be_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle")  # it says whether these are images
    monkeypatch.setattr(backend, "BACKENDS", {"fake": "tests.support.fakes:FakeBackend"})
    monkeypatch.setattr(os, "access", lambda path, *_: Path(path) != tmp_path)
    code, _, errors = run("generate", bundle, "red", "-o", tmp_path / "a.png")
    assert (code, f"the folder {tmp_path} is read-only" in errors) == (2, True)


@pytest.mark.fault("3.1", "unknown names and bad numbers of an export, --dry-run too")
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, dry: bool, tmp_path: Path, run: Run) -> None:
    arguments, message = OPTIONS[name]
    given = [*arguments, *(["--dry-run"] if dry else [])]
    code, _, errors = run("export", "source", "-o", nothing(tmp_path), *given)
    assert (code, message in errors) == (4 if "share" in name else 2, True), errors
    assert not list(tmp_path.iterdir())


BESIDE: dict[str, tuple[list[str], str]] = {
    "a LoRA's scale": (["--lora", "{file}:strong"], "expected a number after the colon"),
    "a Hub LoRA's scale": (["--lora", "owner/name:strong"], "expected a number after the colon"),
    "an endless scale": (["--lora", "{file}:1e999"], "expected a finite scale"),
    "LoRA": (["--lora", "./none.safetensors:0.5"], "no such LoRA: ./none.safetensors"),
    "LoRA in a folder": (["--lora", "none/style.safetensors"], "no such LoRA"),
    "textual inversion": (["--textual-inversion", "none.pt:<cat>"], "no such textual inversion"),
    "VAE": (["--vae", "./none"], "no such VAE: ./none"),
    "ControlNet": (["--controlnet", "/none"], "no such ControlNet"),
    "T2I-Adapter": (["--t2i-adapter", "none"], "no such T2I-Adapter"),
    "IP-Adapter": (["--ip-adapter", "none.safetensors"], "no such IP-Adapter"),
    "image encoder": (
        ["--image-encoder", "~/none", "--ip-adapter", "{file}"],
        "no such image encoder",
    ),
    "configuration": (["--config", "a/b/c"], "no such folder of a configuration"),
    "file of a configuration": (["--config", "{file}"], "is a file; give a folder"),
    "file of a VAE": (["--vae", "{file}"], "is a file; give a folder"),
    "file of a ControlNet": (["--controlnet", "{file}"], "is a file; give a folder"),
    "file of a T2I-Adapter": (["--t2i-adapter", "{file}"], "is a file; give a folder"),
    "folder of an IP-Adapter": (["--ip-adapter", "."], "give its file of weights"),
}


@pytest.mark.fault("3.1", "files and folders beside the source that are not there")
@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_the_source(name: str, tmp_path: Path, run: Run) -> None:
    arguments, message = BESIDE[name]
    style = tmp_path / "style.safetensors"
    style.touch()
    given = [each.format(file=style) for each in arguments]
    code, _, errors = run("export", "source", "-o", tmp_path / "bundle", *given)
    assert (code, message in errors) == (2, True), errors
    assert list(tmp_path.iterdir()) == [style]


INDEXES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "an unknown class": (
        {"_class_name": "CoffeePipeline"},
        [],
        "'CoffeePipeline' is not supported",
    ),
    "code of its own": ({"_class_name": ["pipeline", "Coffee"]}, [], "code of its own"),
    "a part that is needed": (
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
        ["text_encoder_3"],
        "cannot be exported without 'text_encoder_3'",
    ),
}


@pytest.mark.fault("3.1", "a pipeline on the Hub is downloaded before its class is looked at")
@pytest.mark.parametrize("name", INDEXES)
def test_pipelines_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import huggingface_hub

    index, without, message = INDEXES[name]
    (tmp_path / "model_index.json").write_text(json.dumps(index))

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("the pipeline was downloaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", reached)
    got = str(tmp_path / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: got)
    with pytest.raises((InputError, SourceError), match=message):
        source.resolve("owner/name", without=without)
