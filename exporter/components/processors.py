"""Parts of graphs do what image processors of transformers do."""

from __future__ import annotations

from typing import Any

import torch

from latentc.runtimes.errors import UnsupportedPipeline

LEVELS = 255  # of a channel of 8 bits, above black
_BILINEAR, _BICUBIC = 2, 3  # Pillow's numbers
_REACH = 2.0  # of Pillow's bicubic filter, in pixels
_KINDS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
_SHARPNESS = -0.5  # of Pillow's bicubic filter: its slope where it first crosses zero


class Normalised(torch.nn.Module):
    """Images [batch, 3, height, width] in [0, 1] → less the processor's mean, by its standard
    deviation."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, processor: Any) -> None:
        super().__init__()
        for name, values in (("mean", processor.image_mean), ("deviation", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.deviation


class Cropped(torch.nn.Module):
    """Images [batch, channels, height, width] of whole numbers from 0 to 255 → the middle of the
    same with the shorter side of a processor, filled up with black where that is smaller: what
    Pillow's ``resize`` makes of images of 8 bits, and ``center_crop`` of transformers.

    Pillow weighs the pixels that its filter reaches along one side, rounds, and does the same along
    the other (``ImagingResample`` in Pillow's Resample.c). Where an image is made smaller, the
    filter reaches so many times further. The weights are matrices here, made of the sides of the
    image by plain arithmetic.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.filter = int(processor.resample)
        self.shorter = int(processor.size["shortest_edge"])
        self.sides = int(processor.crop_size["height"]), int(processor.crop_size["width"])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        places = [torch.arange(side, dtype=torch.float32) for side in image.shape[2:]]
        sides = [place.amax(dim=0, keepdim=True) + 1.0 for place in places]
        shorter, longer = torch.minimum(*sides), torch.maximum(*sides)
        # The half keeps a quotient that is a whole number from becoming a little less.
        enlarged = torch.floor((self.shorter * longer + 0.5) / shorter)
        usual = torch.full_like(enlarged, float(self.shorter))
        resized = [torch.where(side > shorter, enlarged, usual) for side in sides]
        down, across = map(self._weights, places, sides, resized, self.sides)
        return _rounded(down @ _rounded(image @ across.transpose(0, 1)))

    def _weights(
        self, places: torch.Tensor, side: torch.Tensor, resized: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Return the weights [count, side] of the pixels at `places` along a side in the `count`
        ones in the middle of the resized side."""
        row = torch.arange(count, dtype=torch.float32) + torch.floor((resized - count) / 2)
        scale = side / resized
        centre = (row + 0.5) * scale
        distance = (places[None] + 0.5 - centre[:, None]) / torch.clamp(scale, min=1.0)
        weights = self._filter(distance.abs())
        inside = ((row >= 0) & (row < resized)).to(torch.float32)[:, None]
        total = weights.sum(dim=1, keepdim=True) * inside + (1.0 - inside)
        made: torch.Tensor = weights * inside / total
        return made

    def _filter(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weight of a pixel at a distance (Keys 1981, or a triangle)."""
        if self.filter == _BILINEAR:
            return torch.clamp(1.0 - x, min=0.0)
        a = _SHARPNESS
        near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
        reached: torch.Tensor = torch.where(x < 1.0, near, far) * (x < _REACH).to(torch.float32)
        return reached


class Prepared(torch.nn.Module):
    """Images [batch, 3, height, width] in [0, 1], and what is beyond cut off → what a
    ``CLIPImageProcessor`` makes of them as Pillow images: [batch, 3, rows, columns] of its size."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        _check(processor)
        self.cropped = Cropped(processor)
        self.factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
        self.normalised = Normalised(processor) if processor.do_normalize else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        levels = torch.round(torch.clamp(image, 0.0, 1.0) * LEVELS)
        pixels: torch.Tensor = self.cropped(levels) * self.factor
        if self.normalised is not None:
            pixels = self.normalised(pixels)
        return pixels


def _rounded(image: torch.Tensor) -> torch.Tensor:
    """Return 8 bits as Pillow makes them of sums: halves go up, what is beyond is cut off."""
    return torch.clamp(torch.floor(image + 0.5), 0.0, float(LEVELS))


def _check(processor: Any) -> None:
    """Refuse a processor that nothing is known about, or whose images are not all of one size.

    Raises:
        UnsupportedPipeline: naming what was expected.
    """
    kind = type(processor).__name__
    if not kind.startswith(_KINDS):
        raise UnsupportedPipeline(
            f"an image processor of the class {kind} is not supported, only {_KINDS[0]}"
        )
    if int(processor.resample) not in (_BILINEAR, _BICUBIC):
        raise UnsupportedPipeline(
            f"an image processor with resample {int(processor.resample)} is not supported; "
            f"supported: {_BILINEAR} (bilinear), {_BICUBIC} (bicubic)"
        )
    sizes = {name for name, value in dict(processor.size).items() if value is not None}
    if not (processor.do_resize and processor.do_center_crop and sizes == {"shortest_edge"}):
        raise UnsupportedPipeline(
            f"an image processor with do_resize {processor.do_resize}, do_center_crop "
            f"{processor.do_center_crop} and a size by {', '.join(sorted(sizes)) or 'nothing'} is "
            "not supported, only one that resizes the shortest_edge and crops the middle"
        )
