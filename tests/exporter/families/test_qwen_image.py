"""The graphs of Qwen-Image do what diffusers' and transformers' own modules do, and models that
other pipelines have are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from latentc.exporter import targets
from latentc.exporter.components.qwen_image_graphs import Combiner, Denoiser, FrameDecoder
from latentc.exporter.families.qwen_image import describe
from latentc.exporter.targets.options import Settings
from latentc.runtimes.backends.backend import find
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.latents import Latents
from tests.support import tiny_qwen


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(5)


@pytest.mark.usefixtures("seeded")
@torch.no_grad()
def test_one_frame() -> None:
    """The decoder of one frame makes the video with that frame."""
    vae = tiny_qwen.autoencoder().eval()
    for side in ((3, 5), (1, 2)):
        latents = torch.randn(2, 16, *side)
        video = vae.decode(latents[:, :, None], return_dict=False)[0]
        (image,) = FrameDecoder(vae).decode(latents)
        assert video.shape[2] == 1
        assert torch.allclose(image.clamp(-1, 1), video[:, :, 0], atol=1e-5)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("side", [(6, 10), (14, 4), (2, 2)])
@torch.no_grad()
def test_patches_and_texts(side: tuple[int, int]) -> None:
    """Rows and columns of even, odd and least number; texts of three lengths, one filled up more
    than any needs."""
    transformer = tiny_qwen.transformer().eval()
    texts, mask = torch.randn(3, 9, tiny_qwen.WIDTH), torch.ones(3, 9)
    mask[0, 4:], mask[1, 1:] = 0, 0
    sample, timestep = torch.randn(3, 16, *side), torch.tensor([3.0, 500.0, 999.0])
    expected = transformer(
        hidden_states=QwenImagePipeline._pack_latents(sample, 3, 16, *side),
        timestep=timestep / 1000,
        encoder_hidden_states=texts,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, side[0] // 2, side[1] // 2)]] * 3,
        return_dict=False,
    )[0]
    unpacked = QwenImagePipeline._unpack_latents(expected, 8 * side[0], 8 * side[1], 8)[:, :, 0]
    filled = torch.cat([texts, torch.randn(3, 2, tiny_qwen.WIDTH)], dim=1)
    longer = torch.cat([mask, torch.zeros(3, 2)], dim=1)
    (found,) = Denoiser(transformer)(sample, timestep, filled, longer)
    assert torch.allclose(found, unpacked, atol=1e-5)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    ("target", "engine"), [("coreml", "coreml-reference"), ("tensorrt", "onnxruntime")]
)
def test_a_graph_without_weights(target: str, engine: str, tmp_path: Path) -> None:
    """A graph that combines predictions has nothing to store, and refers to no files of weights."""
    spec = TensorSpec("float32", (1, 16, 4, 6))
    forms = {"positive": spec, "guided": spec}
    component = Component("combiner", "combiner", forms, {"prediction": spec})
    inputs = {name: torch.randn(1, 16, 4, 6) for name in forms}
    program = torch.export.export(Combiner(), (), inputs)
    told: dict[str, Any] = {}
    if target == "coreml":
        own = targets.TARGETS[target].options()
        told = {"settings": Settings("fp32", own, Latents(16, 8, 2, 4, 6))}
    entry = tmp_path / targets.get(target).lower(program, component, tmp_path, **told)
    backend = find(engine)
    assert all(path.is_file() for path in backend.references(entry))
    with backend().open(entry, component) as session:
        found = session.run({name: value.numpy() for name, value in inputs.items()})
    assert np.allclose(found["prediction"], Combiner()(**inputs)[0], atol=1e-5)


def _pipeline(**parts: Any) -> QwenImagePipeline:
    tokens = tiny_qwen.tokenizer()
    usual = {
        "tokenizer": tokens,
        "text_encoder": tiny_qwen.text_encoder(tokens),
        "transformer": tiny_qwen.transformer(),
        "vae": tiny_qwen.autoencoder(),
        "scheduler": None,
    }
    return QwenImagePipeline(**{**usual, **parts})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: {"transformer": tiny_qwen.transformer(zero_cond_t=True)}, "with zero_cond_t"),
        (lambda: {"transformer": tiny_qwen.transformer(guidance_embeds=True)}, "guidance_embeds"),
        (lambda: {"transformer": tiny_qwen.transformer(in_channels=128)}, "128 input and 16 out"),
        (lambda: {"vae": tiny_qwen.autoencoder(z_dim=8)}, "for latents of 8 channels"),
        (lambda: {"vae": tiny_qwen.autoencoder(dim_mult=[1, 2])}, "makes 2 pixels of a latent"),
    ],
)
def test_models_of_other_pipelines(parts: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(UnsupportedPipeline, match=message):
        describe(_pipeline(**parts()))
