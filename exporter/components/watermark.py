"""The invisible watermark of SDXL's pipelines: 48 bits that are put into each image, as the package
invisible-watermark does by its method ``dwtDct``, which diffusers calls."""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import Any

import torch

from latentc.exporter.components.description import Description, Graph
from latentc.exporter.components.names import USUAL, WATERMARK
from latentc.exporter.components.text_to_image import image_spec, vae_factor
from latentc.exporter.programs.changes import with_postprocessor
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import UnsupportedPipeline

# The message of Stability AI's own code, as in diffusers' stable_diffusion_xl/watermark.py.
MESSAGE = 0b101100111110110010010000011110111011000110011110
BITS = 48
_STEP = 36.0  # between two coefficients that say the same bit
_ZERO, _ONE = 0.25, 0.75  # where in a step a coefficient says so
_LEAST_SIDE = 256  # pixels of the width
_LEAST_PIXELS = 256 * 256  # of the whole image: with fewer, diffusers fails
_WHITE = 255.0
_BLOCK = 4  # coefficients along a side
_LAST = -float(_BLOCK**2)  # below every other number of a comparison in a block
_MIDDLE = 0.5  # of OpenCV's chroma


class Watermark(torch.nn.Module):
    """image [batch, 3, f*height, f*width] in [0, 1] → marked, of the same shape, 0 to 1; the image
    as it is where it is too small.

    Of the chroma U in OpenCV's YUV the means of two by two pixels are looked at, doubled (the
    approximation of a Haar wavelet), in blocks of four by four. In each block the largest one, the
    first aside, is moved to the middle of the half of a step that says a bit; the blocks say the
    message again and again, row by row. What the package does besides is done too: it puts two
    details of the wavelet back in each other's place, which exchanges two pixels of U in every
    four.
    """

    bits: torch.Tensor
    halves: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        bits = [float(bit) for bit in f"{MESSAGE:0{BITS}b}"]
        self.register_buffer("bits", torch.tensor(bits), persistent=False)
        self.register_buffer("halves", torch.full((1, 1, 2, 2), 0.5), persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        red, green, blue = (image[:, each : each + 1] * _WHITE for each in range(3))
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        u = self._marked((blue - luma) * 0.492 + _MIDDLE) - _MIDDLE
        v = (red - luma) * 0.877
        channels = [luma + 1.14 * v, luma - 0.395 * u - 0.581 * v, luma + 2.032 * u]
        marked = torch.clamp(torch.cat(channels, dim=1) / _WHITE, 0.0, 1.0)
        height, width = (_count(_places(side)) for side in image.shape[2:])
        large = (width >= _LEAST_SIDE) & (height * width >= _LEAST_PIXELS)
        return (torch.where(large.view(1, 1, 1, 1), marked, image),)

    def _marked(self, u: torch.Tensor) -> torch.Tensor:
        """Return U [batch, 1, height, width] with the message."""
        change = self._change(torch.nn.functional.conv2d(u, self.halves, stride=2))
        spread = torch.nn.functional.interpolate(change, scale_factor=2.0)
        return _exchanged(u) + spread / 2.0

    def _change(self, means: torch.Tensor) -> torch.Tensor:
        """Return what is added to the coefficients [batch, 1, rows, columns] so that they say the
        message: in each whole block to one of them."""
        rows, columns = _places(means.shape[2]), _places(means.shape[3])
        block_rows, block_columns = _blocks(rows), _blocks(columns)
        inner_rows = rows - _BLOCK * block_rows
        inner_columns = columns - _BLOCK * block_columns
        place = _BLOCK * inner_rows[:, None] + inner_columns[None]
        size = torch.where(place > 0.5, means.abs(), torch.full_like(means, -1.0))
        largest = size >= _largest_of_blocks(size, block_rows, block_columns)
        # Of several that are as large the first one: the least place, found as a largest number.
        order = torch.where(largest, -place, torch.full_like(means, _LAST))
        first = largest & (order >= _largest_of_blocks(order, block_rows, block_columns))
        row_count, column_count = _whole_blocks(rows), _whole_blocks(columns)
        whole = (block_rows < row_count)[:, None] & (block_columns < column_count)[None]
        number = block_rows[:, None] * column_count + block_columns[None]
        bit = self.bits[(number - BITS * torch.floor((number + 0.5) / BITS)).to(torch.int64)]
        moved = (torch.floor(means.abs() / _STEP) + _ZERO + (_ONE - _ZERO) * bit) * _STEP
        signed = torch.where(means >= 0.0, moved, -moved)
        return torch.where(first & whole, signed - means, torch.zeros_like(means))


def _places(side: int) -> torch.Tensor:
    """Return 0, 1, 2 … along a side."""
    return torch.arange(side, dtype=torch.float32)


def _count(places: torch.Tensor) -> torch.Tensor:
    """Return how many places there are, [1]."""
    return places.amax(dim=0, keepdim=True) + 1.0


def _blocks(places: torch.Tensor) -> torch.Tensor:
    """Return the number of the block that each place is in."""
    return torch.floor((places + 0.5) / _BLOCK)


def _whole_blocks(places: torch.Tensor) -> torch.Tensor:
    """Return how many whole blocks these places are, [1]."""
    return torch.floor((_count(places) + 0.5) / _BLOCK)


def _largest_of_blocks(
    values: torch.Tensor, block_rows: torch.Tensor, block_columns: torch.Tensor
) -> torch.Tensor:
    """Return at each place of values [batch, 1, rows, columns] the largest one of its block."""
    found = torch.nn.functional.pad(values, (0, _BLOCK, 0, _BLOCK), value=_LAST)
    for axis, blocks in ((2, block_rows), (3, block_columns)):
        first = (_BLOCK * blocks).to(torch.int64)
        parts = [torch.index_select(found, axis, first + place) for place in range(_BLOCK)]
        found = reduce(torch.maximum, parts)
    return found


def _exchanged(u: torch.Tensor) -> torch.Tensor:
    """Return U where, of every two by two pixels in a whole four by four, the one beside the first
    and the one below it are exchanged."""
    rows, columns = _places(u.shape[2]), _places(u.shape[3])
    whole = (rows < _BLOCK * _whole_blocks(rows))[:, None]
    whole = whole & (columns < _BLOCK * _whole_blocks(columns))[None]
    lower, right = _is_odd(rows)[:, None], _is_odd(columns)[None]
    padded = torch.nn.functional.pad(u, (1, 1, 1, 1))
    above_right, below_left = padded[:, :, :-2, 2:], padded[:, :, 2:, :-2]
    half = torch.where(whole & lower & ~right, above_right, u)
    return torch.where(whole & ~lower & right, below_left, half)


def _is_odd(places: torch.Tensor) -> torch.Tensor:
    odd: torch.Tensor = places - 2.0 * torch.floor(places / 2.0) > 0.5
    return odd


class Marker:
    """Stands in the place of a diffusers pipeline's watermark, which is another package's."""

    def __init__(self) -> None:
        self._watermark = Watermark()

    def apply_watermark(self, images: torch.Tensor) -> torch.Tensor:
        """Return images [batch, 3, height, width] from -1 to 1 with the message."""
        marked: torch.Tensor = self._watermark(images / 2.0 + 0.5)[0]
        return marked * 2.0 - 1.0


def with_watermark(description: Description, vae: Any) -> Description:
    """Return the description of a pipeline whose images get the message.

    Raises:
        UnsupportedPipeline: images that are not of red, green and blue, or have odd sides.
    """
    spec = image_spec(vae)
    if spec.shape[1] != 3 or vae_factor(vae) % 2:
        raise UnsupportedPipeline(
            f"--watermark: expected images of 3 channels and even sides, found {list(spec.shape)}"
        )
    component = Component(
        WATERMARK,
        "postprocessor",
        {"image": spec},
        {"marked": spec},
        precision=USUAL[WATERMARK],
        jumps=True,
    )
    programs = (with_postprocessor(each, component, {}) for each in description.programs)
    unit = vae_factor(vae) * description.latents.multiple
    side = -(-_LEAST_SIDE // unit) * description.latents.multiple
    large = {"batch": 1, "height": side, "width": side}
    graphs = (*description.graphs, Graph(component, Watermark(), also=large))
    return dataclasses.replace(description, programs=tuple(programs), graphs=graphs)
