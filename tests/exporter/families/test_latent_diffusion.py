"""Latent diffusion: what its class takes and bundles do not is refused before any work, and its
text encoder's files are read as carefully as others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from latentc.exporter.compiler.export import export, preflight
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, SourceError, UnsupportedPipeline
from latentc.runtimes.interpreter.loop import live_branches
from tests.support import tiny, tiny_transformers
from tests.support.uncaptured import uncaptured

CLASS = "LDMTextToImagePipeline"


@pytest.fixture
def folder(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(pipeline_folder("ldm"), tmp_path / "pipeline"))


def without_text() -> Any:
    """Return a UNet for images alone."""
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "other latents": (
        "vqvae",
        lambda: tiny_transformers.autoencoder(4, 3),
        "a VAE for latents of 3 channels does not fit the UNet, which has 4",
    ),
    "another VAE": ("vqvae", torch.nn.Identity, "a VAE of the class Identity is not supported"),
    "another factor": (
        "vqvae",
        lambda: tiny.autoencoder(0.18215),
        "a VAE that makes 2 pixels of a latent along a side: LDMTextToImagePipeline counts on 8",
    ),
    "no text": ("unet", without_text, "a UNet2DModel takes no text"),
    "more channels": (
        "unet",
        lambda: tiny.conditional_unet(in_channels=4, out_channels=8),
        "a UNet with 4 input and 8 output channels does not fit LDMTextToImagePipeline",
    ),
    "class labels": (
        "unet",
        lambda: tiny.conditional_unet(num_class_embeds=4),
        "a UNet with num_class_embeds 4 takes class labels",
    ),
    "noise that is scaled": (
        "scheduler",
        diffusers.LMSDiscreteScheduler,
        "with a LMSDiscreteScheduler: diffusers' class scales no noise",
    ),
    "noise in each step": ("scheduler", diffusers.DDPMScheduler, "save it with a DDIMScheduler or"),
    "short texts": (
        "bert",
        lambda: tiny.bert(145, max_position_embeddings=64),
        "a bert with 64 positions: LDMTextToImagePipeline makes 77 ids of each text",
    ),
    "no encoder": ("bert", lambda: None, "was saved without its bert"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_parts_that_are_refused(what: str, pipeline_folder: Callable[[str], Path]) -> None:
    part, make, message = REFUSED[what]
    with quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(pipeline_folder("ldm"))
        setattr(pipe, part, make())
    with pytest.raises(UnsupportedPipeline, match=message):
        family_of(CLASS).describe(pipe)


def test_an_export_refuses_them_too(folder: Path, tmp_path: Path) -> None:
    with quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.register_modules(vqvae=tiny.autoencoder(0.18215))
        pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedPipeline, match="makes images of another size than asked for"):
        export(tmp_path / "other", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_scales_below_one(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The class guides by them; a bundle refuses them."""
    pipe = uncaptured(pipeline_folder("ldm"), tmp_path / "bundle", mixing=True)
    with pytest.raises(InputError, match=r"guidance_scale.*1"):
        pipe.stream("red", guidance_scale=0.5)
    request = pipe.stream("red").request
    assert request.scales["guidance_scale"] == 1.0
    assert len(live_branches(request, request.facts.loop)) == 1


def test_weights_that_are_missing(folder: Path) -> None:
    """The text encoder would have random ones in their place."""
    path = folder / "bert" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.fc1.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SourceError, match="the weights do not fit the model, 1 missing"):
        load(resolve(folder))
    path.unlink()
    with pytest.raises(SourceError, match=r"expected model\.safetensors, found none"):
        resolve(folder)


def test_a_vocabulary_of_another_size(folder: Path, tmp_path: Path) -> None:
    manifest = uncaptured(folder, tmp_path / "bundle", mixing=True).manifest
    assert [each.vocabulary for each in manifest.tokenizers] == [len(tiny.bert_tokenizer())]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"a BertTokenizer needs vocab\.txt, or tokenizer\.json"):
        resolve(folder)
    (folder / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(SourceError, match="vocabulary of 6 words and bert embeddings of 145"):
        load(resolve(folder))


def test_weights_in_halves(folder: Path, tmp_path: Path) -> None:
    """They stay in their files, and are counted before the export."""
    with quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.to(torch.float16).save_pretrained(tmp_path / "halves")
    whole, halves = (load(resolve(each)) for each in (folder, tmp_path / "halves"))
    for name, weight in halves.bert.state_dict().items():
        assert weight.dtype is torch.float32
        torch.testing.assert_close(weight, whole.bert.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert preflight(folder, tmp_path / "bundle").memory


def test_what_is_in_a_bundle(folder: Path, tmp_path: Path) -> None:
    manifest: Manifest = uncaptured(folder, tmp_path / "bundle", mixing=True).manifest
    assert [each.name for each in manifest.components] == [*family_of(CLASS).COMPONENTS]
    assert not manifest.left_out
