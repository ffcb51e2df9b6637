"""Weights of a source that are NaN or infinity: refused by their names, before work is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from latentc.exporter.source import resolving as source
from latentc.exporter.source.resolving import load_model
from latentc.runtimes.errors import SourceError
from tests.conftest import Run
from tests.support import tiny

UNET = "unet/diffusion_pytorch_model.safetensors"
# File → one of its weights: a matrix that is large, a bias, a row of a table.
WEIGHTS = {
    UNET: "conv_in.weight",
    "vae/diffusion_pytorch_model.safetensors": "decoder.conv_norm_out.bias",
    "text_encoder/model.safetensors": "embeddings.token_embedding.weight",
}


@pytest.fixture
def folder(smallest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smallest, tmp_path / "pipeline"))


def spoil(path: Path, weight: str, value: float, kind: torch.dtype = torch.float32) -> str:
    """Write one bad number into a weight of a file whose numbers become `kind`; return the name."""
    tensors = {name: each.to(kind) for name, each in load_file(path).items()}
    name: str = next(each for each in tensors if each.endswith(weight))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    return name


@pytest.mark.fault("2.1", "a source's weight that is NaN or infinity is found late, or not at all")
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("file", WEIGHTS)
def test_parts_of_a_pipeline(
    file: str, value: float, kind: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentc.exporter.stored_weights.SMALLEST", 16)  # halves stay in their file
    name = spoil(folder / file, WEIGHTS[file], value, kind)
    part = folder / Path(file).parent
    with pytest.raises(SourceError, match=f"^{part}: its tensor '{name}' holds NaN or infinity"):
        source.load(source.resolve(folder))


@pytest.mark.fault("2.1", "--no-verify publishes weights that are NaN")
@pytest.mark.parametrize("verify", [True, False])
def test_an_export(
    verify: bool, folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("the work was begun")

    monkeypatch.setattr("latentc.exporter.schedulers.plans.add_all", reached)
    name = spoil(folder / UNET, WEIGHTS[UNET], torch.nan)
    given = [] if verify else ["--no-verify"]
    code, _, errors = run("export", folder, "-o", tmp_path / "bundle", *given)
    assert (code, f"its tensor '{name}' holds NaN" in errors) == (3, True), errors
    assert not (tmp_path / "bundle").exists()


def controlnet() -> Any:
    widths = {"block_out_channels": (8,), "conditioning_embedding_out_channels": (8, 16)}
    kinds = {"down_block_types": ("DownBlock2D",), "norm_num_groups": 4, "cross_attention_dim": 8}
    return ControlNetModel(**widths, **kinds, attention_head_dim=4)


def t2i_adapter() -> Any:
    return tiny.t2i_adapter("full_adapter", 0)


@pytest.mark.fault("2.1", "the same in ControlNets and T2I-Adapters")
@pytest.mark.parametrize("make", [controlnet, t2i_adapter])
def test_models_beside_a_pipeline(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    weight = max((name for name, _ in model.named_parameters()), key=len)
    model.save_pretrained(tmp_path / "model")
    load_model(type(model), tmp_path / "model", None)
    spoil(tmp_path / "model" / "diffusion_pytorch_model.safetensors", weight, torch.inf)
    with pytest.raises(SourceError, match=f"model: its tensor '{weight}' holds NaN or infinity"):
        load_model(type(model), tmp_path / "model", None)
