"""The full-size pipelines: right architectures, cheaply; a real build behind a marker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from latentc.benchmarks import models

torch = pytest.importorskip("torch")

NETWORKS = [(model, part) for model, each in models.MODELS.items() for part in each.networks]


@pytest.mark.parametrize(("model", "part"), NETWORKS)
def test_a_network_has_its_parameters(model: str, part: str) -> None:
    network = models.MODELS[model].networks[part]
    with torch.device("meta"):
        module = network.build()
    assert models.count_parameters(module) == network.parameters


def test_the_unet_is_that_of_stable_diffusion_1() -> None:
    assert round(models.MODELS["sd15"].networks["unet"].parameters / 1e6, 1) == 859.5


def test_the_vocabulary_has_clips_form() -> None:
    vocabulary, merges = models.clip_vocabulary()
    assert len(vocabulary) == 49_408
    assert sorted(vocabulary.values()) == list(range(49_408))
    assert vocabulary["<|startoftext|>"] == 49_406
    assert vocabulary["<|endoftext|>"] == 49_407
    # Each merge joins two tokens that exist by then into a new one.
    known = set(list(vocabulary)[:512])
    for first, second in merges:
        assert first in known
        assert second in known
        assert first + second not in known
        known.add(first + second)


def test_the_tokenizer_reads_any_text(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    models.ClipTokenizer().save(tmp_path, "fp32")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a red cube, 日本 ½", padding="max_length").input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert ids[0] == 49_406
    assert ids[-1] == tokenizer.pad_token_id == 49_407
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red cube , 日本 ½"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    network = models.Network(
        "diffusers", "AutoencoderKL", {"block_out_channels": [32], "norm_num_groups": 8}, 12
    )
    with pytest.raises(Exception, match="expected 12"):
        network.save(tmp_path / "vae", "fp32")
    assert not (tmp_path / "vae").exists()


@pytest.mark.fullsize
@pytest.mark.timeout(1800)
def test_a_full_size_pipeline_is_built(tmp_path: Path) -> None:
    """2.1 GB on disk; every part loads with diffusers' own code."""
    from diffusers import DiffusionPipeline

    result = CliRunner().invoke(models.main, ["sd15", str(tmp_path), "--dtype", "fp16"])
    assert result.exit_code == 0, result.output
    assert "859.5 M parameters" in result.output
    index = json.loads((tmp_path / models.INDEX).read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    pipe = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert round(models.count_parameters(pipe.unet) / 1e6, 1) == 859.5
    assert models.count_parameters(pipe.text_encoder) == models.CLIP_L.parameters
    latents = pipe(
        "a red cube", num_inference_steps=2, height=64, width=64, output_type="latent"
    ).images
    assert torch.isfinite(latents).all()
    with torch.no_grad():
        image = pipe.vae.decode(latents).sample
    assert torch.isfinite(image).all()
    assert 0.01 < image.std() < 100
