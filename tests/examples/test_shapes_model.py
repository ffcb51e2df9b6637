"""The shapes pipeline as it ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open

from examples.shapes import evaluate
from latentc import builtin_lora
from latentc.benchmarks.shapes import captions
from latentc.exporter.source.adapters import lora

FOLDER = Path(__file__).parents[2] / "latentc" / "models" / "shapes"
PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return DiffusionPipeline.from_pretrained(FOLDER)


def test_folder_is_small_and_plain() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15_000_000
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md"}
    for path in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8"))


def test_classes_are_the_ordinary_ones() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["safety_checker"] == [None, None]


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_stored_weight_is_loaded(pipeline: StableDiffusionPipeline, part: str) -> None:
    loaded = dict(getattr(pipeline, part).named_parameters())
    with safe_open(FOLDER / part / PARTS[part], framework="pt") as stored:
        names = {name.removeprefix("text_model."): name for name in stored.keys()}  # noqa: SIM118
        assert {name.removeprefix("text_model.") for name in loaded} == set(names)
        for name, value in loaded.items():
            kept = stored.get_tensor(names[name.removeprefix("text_model.")])
            assert value.dtype == torch.float32
            assert torch.equal(value.detach(), kept.float()), name


def test_images_agree_with_their_prompts(pipeline: StableDiffusionPipeline) -> None:
    texts = [
        "a large red circle",
        "a small green triangle on the left",
        "a purple star at the bottom right",
        "a yellow square",
    ]
    prompts = [captions.read(text) for text in texts] + captions.held_out_prompts(4, 1)
    results = evaluate.evaluate(pipeline, prompts, steps=12)
    assert evaluate.share_right(results) >= 0.75, [r.faults for r in results]


def test_every_layer_of_the_lora_is_used() -> None:
    """A file whose names are of two kinds is read by half, without an error of diffusers'."""
    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    before = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    with safe_open(builtin_lora() / "pytorch_lora_weights.safetensors", framework="pt") as stored:
        layers = {key.rpartition(".lora_")[0] for key in stored.keys()}  # noqa: SIM118
    lora.apply(pipe, [lora.find(str(builtin_lora()))])
    changed = {
        f"unet.{name.removesuffix('.weight')}"
        for name, value in pipe.unet.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed == layers
    assert len(changed) == 94
