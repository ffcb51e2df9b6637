"""Decoding images that are too large for memory at once: image by image, or tile by tile.

Tiles overlap by a quarter and are blended over the overlap, as diffusers' `enable_vae_tiling` does
(`AutoencoderKL.tiled_decode`): the same tiles give the same image. A decoder that looks at the
whole image (group normalisation, attention) makes a slightly different one of each tile than of
the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.latents import Latents

OVERLAP = 0.25  # of a tile's side, as in diffusers

# Latents [images, ..., height, width] → images or frames [images, ..., height, width].
Decode = Callable[[Array], Array]


@dataclass(frozen=True)
class Tiling:
    """A tiling says how to decode.

    `slicing` decodes one image at a time; `tile` is the side of a tile in rows of latents, 0 for
    the whole image.
    """

    slicing: bool = False
    tile: int = 0


def tile_of(latents: Latents, side: int | None) -> int:
    """Return a tile's side in rows of latents, given one in pixels.

    None is the smaller default side, made smaller to what tiles must be multiples of.

    Raises:
        InputError: not a multiple of what tiles and their overlap must be.
    """
    unit = latents.factor * latents.multiple * round(1 / OVERLAP)
    if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
        raise InputError(
            f"tiles: expected a side in pixels, a multiple of {unit}, not {side!r:.80}"
        )
    if side is None:
        usual = min(latents.default_height, latents.default_width)
        side = usual // unit * unit or usual
    if side < unit or side % unit:
        raise InputError(f"tiles of {side} pixels: expected a multiple of {unit}")
    return side // latents.factor


def decode(run: Decode, latents: Array, tiling: Tiling) -> Array:
    """Return all images, decoded as `tiling` says."""
    if tiling.slicing and len(latents) > 1:
        return np.concatenate(
            [_whole(run, latents[i : i + 1], tiling) for i in range(len(latents))]
        )
    return _whole(run, latents, tiling)


def _whole(run: Decode, latents: Array, tiling: Tiling) -> Array:
    if not tiling.tile or max(latents.shape[-2:]) <= tiling.tile:
        return run(latents)
    return _tiled(run, latents, tiling.tile)


def _tiled(run: Decode, latents: Array, tile: int) -> Array:
    height, width = latents.shape[-2:]
    stride = int(tile * (1 - OVERLAP))
    above: list[Array] = []
    rows = []
    for top in range(0, height, stride):
        row: list[Array] = []
        for left in range(0, width, stride):
            part = run(np.ascontiguousarray(latents[..., top : top + tile, left : left + tile]))
            factor = part.shape[-2] // min(tile, height - top)
            extent = int(tile * factor * OVERLAP)
            part = np.array(part, np.float32)
            if above:
                _blend(above[len(row)], part, extent, axis=-2)
            if row:
                _blend(row[-1], part, extent, axis=-1)
            row.append(part)
        limit = tile * factor - extent
        rows.append(np.concatenate([part[..., :limit, :limit] for part in row], axis=-1))
        above = row
    return np.concatenate(rows, axis=-2)


def _blend(before: Array, after: Array, extent: int, axis: int) -> None:
    """Fade from the end of one tile into the beginning of the next, in place."""
    before, after = before.swapaxes(axis, -1), after.swapaxes(axis, -1)
    extent = min(before.shape[-1], after.shape[-1], extent)
    share = np.arange(extent, dtype=np.float32) / np.float32(extent)
    after[..., :extent] = before[..., -extent:] * (1 - share) + after[..., :extent] * share
