"""Checkpoints of one file: the same weights as the folder's, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from latentc.cli import run as command
from latentc.exporter.compiler.export import export
from latentc.exporter.source import resolving as source
from latentc.runtimes.errors import SourceError
from tests.support.original_layout import checkpoint


@pytest.fixture
def config(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A pipeline's configuration without its weights."""

    def weights(_: Any, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".safetensors")]

    return Path(shutil.copytree(pipeline_folder("sd"), tmp_path / "config", ignore=weights))


@pytest.fixture
def file(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(checkpoint(DiffusionPipeline.from_pretrained(pipeline_folder("sd"))), path)
    return path


def test_the_same_weights(pipeline_folder: Callable[[str], Path], file: Path, config: Path) -> None:
    found = source.resolve(file, config=str(config))
    assert found.id == "model.safetensors"
    assert found.pipeline_class == "StableDiffusionPipeline"
    ours, expected = source.load(found), DiffusionPipeline.from_pretrained(pipeline_folder("sd"))
    for part in ("unet", "vae", "text_encoder"):
        made, wanted = (getattr(pipe, part).state_dict() for pipe in (ours, expected))
        assert made.keys() == wanted.keys()
        assert all(torch.equal(made[key], wanted[key]) for key in wanted), part
    assert ours.scheduler.config == expected.scheduler.config


def test_an_export(file: Path, config: Path, tmp_path: Path) -> None:
    """Verified like any other; another file under the same name is another source."""
    settings: dict[str, Any] = {"config": config, "schedulers": (), "steps": (4,)}
    made = export(file, tmp_path / "b", **settings)
    assert made.manifest.source.id == "model.safetensors"
    assert not export(file, tmp_path / "b", **settings).made
    state = load_file(file)
    save_file({key: value * 1.01 for key, value in state.items()}, file)
    other = export(file, tmp_path / "b", **settings, verify=False)
    assert other.manifest.source.fingerprint != made.manifest.source.fingerprint


def test_weights_that_are_missing(file: Path, config: Path) -> None:
    state = load_file(file)
    lost = next(key for key in state if ".input_blocks.1.0.in_layers.2.weight" in key)
    del state[lost]
    save_file(state, file)
    with pytest.raises(SourceError, match=r"model.safetensors .*(lacks|does not fit)"):
        source.load(source.resolve(file, config=str(config)))


@pytest.mark.fault("2.1", "a checkpoint's weight that is NaN")
def test_weights_that_are_not_finite(file: Path, config: Path) -> None:
    state = load_file(file)
    bad = next(key for key in state if key.endswith(".input_blocks.0.0.weight"))
    state[bad].view(-1)[-1] = torch.nan
    save_file(state, file)
    says = r"^model.safetensors \(unet\): its tensor 'conv_in.weight' holds NaN or infinity"
    with pytest.raises(SourceError, match=says):
        source.load(source.resolve(file, config=str(config)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["{tmp}/old.ckpt", "--config", "{config}"], "is a pickle, which can run whatever code"),
        (["{tmp}/text.txt"], "is a file of no known kind"),
        (["{tmp}/cut.safetensors", "--config", "{config}"], "is damaged or cut short"),
        (["{tmp}/model.safetensors", "--config", "{tmp}"], "is not a diffusers pipeline"),
        (["{config}", "--config", "{config}"], "has its own configuration"),
        (["{tmp}/model.safetensors", "--config", "{sdxl}"], "does not fit StableDiffusionXLPipel"),
    ],
)
def test_bad_input(
    pipeline_folder: Callable[[str], Path],
    file: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    says: str,
) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:100])
    places = {"tmp": tmp_path, "config": config, "sdxl": pipeline_folder("sdxl")}
    arguments = [each.format(**places) for each in given]
    output = tmp_path / "b"
    assert command(["export", *arguments, "-o", str(output)]) == 3
    assert says in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_a_pickle_that_is_trusted(file: Path, config: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(file)}, tmp_path / "old.ckpt")
    found = source.resolve(tmp_path / "old.ckpt", config=str(config), allow_pickle=True)
    assert source.load(found).unet is not None


UNET = "model.diffusion_model"
UNREAD = {
    "scales of weights in 8 bits": {
        "scaled_fp8": torch.zeros(2),
        f"{UNET}.input_blocks.1.0.in_layers.2.scale_weight": torch.ones(1),
    },
    "a layer that the configuration does not have": {
        f"{UNET}.input_blocks.9.0.in_layers.2.weight": torch.ones(4, 4, 3, 3),
    },
    "a layer of a text encoder": {
        "cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.weight": torch.ones(4, 4),
    },
    "something else": {"embedding_manager.cat": torch.ones(4)},
}


@pytest.mark.fault("2.13", "a checkpoint of one file loses tensors: scales, layers")
@pytest.mark.parametrize("case", UNREAD)
def test_tensors_that_nothing_reads(file: Path, config: Path, case: str) -> None:
    save_file({**load_file(file), **UNREAD[case]}, file)
    with pytest.raises(SourceError, match=r"model\.safetensors: Stable.* reads all but") as error:
        source.load(source.resolve(file, config=str(config)))
    said = str(error.value)
    assert f"all but {len(UNREAD[case])} of its tensors" in said
    assert all(key in said for key in UNREAD[case])
    assert ("convert it to fp16" in said) == case.startswith("scales")


def test_tensors_that_diffusers_leaves_out_on_purpose(file: Path, config: Path) -> None:
    names = ["betas", "model_ema.decay", "first_stage_model.loss.logvar", "alphas_cumprod_prev"]
    names.append("cond_stage_model.transformer.text_model.embeddings.position_ids")
    save_file({**load_file(file), **{name: torch.ones(2) for name in names}}, file)
    assert source.load(source.resolve(file, config=str(config))).unet is not None
