"""Training data: images for the autoencoder, cached latents and captions for the denoiser.

Everything is a pure function of (seed, index) or (seed, step), so a resumed run sees exactly
what an uninterrupted one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import CLIPTokenizer

from latentc.benchmarks.shapes.captions import caption
from latentc.benchmarks.shapes.draw import render
from latentc.benchmarks.shapes.scenes import (
    COLOURS,
    SHAPES,
    Placed,
    Scene,
    Spec,
    place_scene,
    training_spec,
)

from .opponent import opponent_layout
from .tokenizer import MAX_LENGTH

CAPTION_DROPOUT = 0.1  # share of empty captions, for classifier-free guidance


@dataclass(frozen=True)
class Latents:
    """Scaled latents float32 [n, 4, 16, 16] and what each of the n images shows."""

    values: torch.Tensor
    specs: list[Spec]


def spec_at(seed: int, index: int) -> tuple[Spec, np.random.Generator]:
    """Return the spec of training image ``index``, and the generator that goes on to place it."""
    rng = np.random.default_rng([seed, 1, index])
    return training_spec(rng), rng


def image_at(seed: int, index: int) -> NDArray[np.uint8]:
    """Return training image ``index``: uint8 [64, 64, 3]."""
    spec, rng = spec_at(seed, index)
    return np.asarray(render(place_scene(spec, rng)))


def autoencoder_batch(seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [size, 3, 64, 64] from -1 to 1, and where their latents belong.

    The latents are [size, 4, 16, 16].

    Half are crowded with shapes at random places: they have far more edges to learn from
    than the training images, which are mostly background.
    """
    images, layouts = [], []
    for i in range(size):
        rng = np.random.default_rng([seed, 2, step, i])
        scene = _crowd(rng) if i % 2 else place_scene(training_spec(rng), rng)
        images.append(np.asarray(render(scene)))
        layouts.append(opponent_layout(scene))
    return to_tensor(np.stack(images)), torch.from_numpy(np.stack(layouts))


def to_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """Return images uint8 [n, 64, 64, 3] as float32 [n, 3, 64, 64] from -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_all(
    autoencoder: AutoencoderKL, seed: int, count: int, cache: Path, device: torch.device
) -> Latents:
    """Draw and encode ``count`` training images, or read them back from ``cache``."""
    specs = [spec_at(seed, index)[0] for index in range(count)]
    if cache.exists():
        values = torch.load(cache, weights_only=True)
        if values.shape[0] == count:
            return Latents(values.float(), specs)
    chunks = []
    for start in tqdm(range(0, count, 64), desc="encode", unit="batch"):
        indices = range(start, min(start + 64, count))
        images = to_tensor(np.stack([image_at(seed, index) for index in indices]))
        with torch.autocast(device.type, torch.bfloat16):
            means = autoencoder.encode(images.to(device)).latent_dist.mode()
        chunks.append((means.float() * autoencoder.config.scaling_factor).half().cpu())
    values = torch.cat(chunks)
    torch.save(values, cache)
    return Latents(values.float(), specs)


def denoiser_batch(
    latents: Latents, tokenizer: CLIPTokenizer, seed: int, step: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents [size, 4, 16, 16] and token ids [size, 77], captions worded afresh."""
    rng = np.random.default_rng([seed, 3, step])
    chosen = rng.integers(len(latents.specs), size=size)
    texts = [
        "" if rng.random() < CAPTION_DROPOUT else caption(latents.specs[int(i)], rng).text
        for i in chosen
    ]
    return latents.values[torch.from_numpy(chosen)], tokenize(tokenizer, texts)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Return token ids int64 [n, 77], padded as the pipeline pads them."""
    encoded = tokenizer(
        texts,
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = encoded.input_ids
    return ids


def _crowd(rng: np.random.Generator) -> Scene:
    return Scene(
        tuple(
            Placed(
                COLOURS[int(rng.integers(len(COLOURS)))],
                SHAPES[int(rng.integers(len(SHAPES)))],
                float(rng.uniform(13, 30)),
                float(rng.uniform(6, 58)),
                float(rng.uniform(6, 58)),
            )
            for _ in range(int(rng.integers(3, 7)))
        )
    )
