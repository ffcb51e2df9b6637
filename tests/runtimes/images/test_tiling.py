"""Decoding in slices and tiles: the same tiles and blending as in diffusers, on any session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentc.runtimes.arrays import Array
from latentc.runtimes.errors import InputError
from latentc.runtimes.images.tiling import Tiling, decode, tile_of
from latentc.runtimes.pipeline.pipeline import load
from latentc.runtimes.programs.latents import Latents
from tests.support.fakes import FakeBackend, make_bundle

FACTOR = 4
LATENTS = Latents(channels=4, factor=FACTOR, multiple=2, default_height=64, default_width=96)


def enlarge(latents: Array) -> Array:
    """A decoder that looks at nothing but the pixel itself."""
    return latents[:, :3].repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)


def noise(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("sides", [(16, 16), (24, 16), (40, 26), (18, 50)])
def test_tiles_of_a_local_decoder_are_the_whole(sides: tuple[int, int]) -> None:
    latents, seen = noise(2, 4, *sides), list[tuple[int, ...]]()

    def run(part: Array) -> Array:
        assert part.flags.c_contiguous
        seen.append(part.shape)
        return enlarge(part)

    found = decode(run, latents, Tiling(tile=16))
    np.testing.assert_allclose(found, enlarge(latents), atol=1e-6)
    assert all(max(shape[2:]) <= 16 for shape in seen)
    assert (len(seen) == 1) == (sides == (16, 16))
    assert latents.dtype == found.dtype == np.float32


def test_slices_and_tiles() -> None:
    seen: list[tuple[int, ...]] = []

    def run(part: Array) -> Array:
        seen.append(part.shape)
        return enlarge(part)

    latents = noise(3, 4, 24, 8)
    found = decode(run, latents, Tiling(slicing=True, tile=16))
    np.testing.assert_allclose(found, enlarge(latents), atol=1e-6)
    assert seen == [(1, 4, 16, 8), (1, 4, 12, 8)] * 3


def test_as_diffusers_tiles() -> None:
    """On the real class, with random weights and group normalisation over each tile."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        sample_size=64,
    ).eval()
    latents = noise(2, 4, 28, 40)

    def run(part: Array) -> Array:
        with torch.no_grad():
            made: Array = vae.decode(torch.from_numpy(part)).sample.numpy()
        return made

    found, whole = decode(run, latents, Tiling(tile=16)), run(latents)
    vae.enable_tiling()
    expected = run(latents)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - whole).max() > 1e-3


def test_sides_of_tiles() -> None:
    assert tile_of(LATENTS, None) == 16
    assert tile_of(LATENTS, 96) == 24
    for side in (0, -32, 48, 65):
        with pytest.raises(InputError, match=f"tiles of {side} pixels: expected a multiple of 32"):
            tile_of(LATENTS, side)


@pytest.mark.parametrize("size", ["x", [], (1, 2), True, 7])
def test_tiles_of_no_size(tmp_path: Path, size: Any) -> None:
    with (
        load(make_bundle(tmp_path / "bundle"), FakeBackend()) as pipe,
        pytest.raises(InputError, match=r"tiles.*a multiple of 16"),
    ):
        pipe.enable_vae_tiling(size)


def test_a_pipeline_with_tiles(tmp_path: Path) -> None:
    with load(make_bundle(tmp_path / "bundle"), FakeBackend()) as pipe:
        latents = noise(2, 4, 20, 24)
        whole = pipe.decode(latents, "np")
        pipe.enable_vae_slicing()
        pipe.enable_vae_tiling(16)
        np.testing.assert_allclose(pipe.decode(latents, "np"), whole, atol=1e-6)
        pipe.disable_vae_slicing()
        pipe.disable_vae_tiling()
        assert (pipe.decode(latents, "np") == whole).all()
