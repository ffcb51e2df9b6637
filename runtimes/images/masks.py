"""Making a masked part of an image anew: blurred masks, crops around them, and what was made put
back into the image.

The rules are those of diffusers' ``VaeImageProcessor`` (``blur``, ``get_crop_region``, the resize
modes "fill" and "crop", ``apply_overlay``), whose inpainting pipelines these results equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from latentc.runtimes.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_FILTERED = ("L", "LA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK")  # modes that Pillow blurs
Box: TypeAlias = tuple[int, int, int, int]  # left, upper, right, lower


def pillow(image: Any) -> Image:
    """Return an image as Pillow has it.

    An array of floats in [0, 1] (`given_images.listed` saw to that) becomes an image of 8 bits.
    """
    from PIL import Image

    if not isinstance(image, np.ndarray):
        pillow_image: Image.Image = image
        return pillow_image
    return Image.fromarray((image * np.float32(255)).round().astype(np.uint8))


def blurred(mask: Image, radius: float) -> Image:
    """Return the mask with soft edges: Gaussian, `radius` in pixels."""
    from PIL import ImageFilter

    if mask.mode not in _FILTERED:
        mask = mask.convert("L")
    return mask.filter(ImageFilter.GaussianBlur(radius))


def resized(
    image: Image, height: int, width: int, crop: bool = False, resample: str = "bicubic"
) -> Image:
    """Return an image in RGB of the size, by the interpolation that Pillow calls so, as
    transformers' image processors do.

    With `crop` (of square sizes) the shorter side is made to fit, and the middle of the longer one
    is taken.
    """
    from PIL import Image

    whole, method = image.convert("RGB"), Image.Resampling[resample.upper()]
    if not crop:
        return whole.resize((width, height), method)
    short, long = sorted(whole.size)
    sides = height, int(height * long / short)
    size = sides if whole.width == short else sides[::-1]
    enlarged = whole.resize(size, method)
    left, upper = (enlarged.width - width) // 2, (enlarged.height - height) // 2
    return enlarged.crop((left, upper, left + width, upper + height))


def crop_box(mask: Image, width: int, height: int, padding: int) -> Box:
    """Return the box of all that is not black, with `padding` pixels around it.

    It is made wider or higher to the proportions of `width` and `height`, as far as the image goes.

    Raises:
        InputError: all of it is black.
    """
    box = mask.convert("L").getbbox()
    if box is None:
        raise InputError("the mask is all black: white is what is made anew")
    left, upper, right, lower = box
    x = max(left - padding, 0), min(right + padding, mask.width)
    y = max(upper - padding, 0), min(lower + padding, mask.height)
    if (x[1] - x[0]) / (y[1] - y[0]) > width / height:
        y = _widened(*y, int((x[1] - x[0]) / (width / height) - (y[1] - y[0])), mask.height)
    else:
        x = _widened(*x, int((y[1] - y[0]) * (width / height) - (x[1] - x[0])), mask.width)
    return x[0], y[0], x[1], y[1]


def _widened(start: int, end: int, more: int, limit: int) -> tuple[int, int]:
    """Return the span widened by `more`, half on each side.

    It is moved back inside 0 … `limit` and cut off where it does not fit.
    """
    start, end = start - more // 2, end + more - more // 2
    beyond = max(end - limit, 0)
    start, end = start - beyond, end - beyond
    below = max(-start, 0)
    return start + below, min(end + below, limit)


def filled(image: Image, width: int, height: int) -> Image:
    """Return the whole image in the middle of one of that size.

    Its outermost lines are drawn out over what is left at two sides.
    """
    small, corner = _fitted(image, width, height, inside=True)
    whole = _blank(width, height)
    whole.paste(small, corner)
    left, upper = corner
    if upper > 0:
        whole.paste(small.resize((width, upper), box=(0, 0, width, 0)), (0, 0))
        edge = (0, small.height, width, small.height)
        whole.paste(small.resize((width, upper), box=edge), (0, upper + small.height))
    if left > 0:
        whole.paste(small.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        edge = (small.width, 0, small.width, height)
        whole.paste(small.resize((left, height), box=edge), (left + small.width, 0))
    return whole


def _fitted(image: Image, width: int, height: int, inside: bool) -> tuple[Image, tuple[int, int]]:
    """Return the image in its own proportions, and its corner if it stands in the middle.

    It is as large as fits inside, or so that it covers all.
    """
    from PIL import Image

    wide = width / height >= image.width / image.height
    by_width = (width, image.height * width // image.width)
    by_height = (image.width * height // image.height, height)
    size = by_height if wide == inside else by_width
    fitted = image.resize(size, Image.Resampling.LANCZOS)
    return fitted, (width // 2 - size[0] // 2, height // 2 - size[1] // 2)


def _blank(width: int, height: int) -> Image:
    from PIL import Image

    return Image.new("RGB", (width, height))


@dataclass(frozen=True)
class Overlay:
    """An overlay holds what stays of the images of a call: what lies outside the masks, of which
    `boxes` were cut out.
    """

    images: Sequence[Image]
    masks: Sequence[Image]
    boxes: Sequence[Box]

    def repeated(self, images: int) -> Overlay:
        """Return an overlay for so many images that are made.

        Those of one that was given are not next to each other.
        """
        return replace(
            self,
            images=[self.images[i % len(self.images)] for i in range(images)],
            masks=[self.masks[i % len(self.masks)] for i in range(images)],
            boxes=[self.boxes[i % len(self.boxes)] for i in range(images)],
        )

    def put(self, made: Sequence[Image]) -> list[Image]:
        """Return each of `made` in its box of an image, under what the mask leaves of it."""
        every = self.repeated(len(made))
        rows = zip(made, every.images, every.masks, every.boxes, strict=True)
        return [_put(*row) for row in rows]


def _put(made: Image, image: Image, mask: Image, box: Box) -> Image:
    from PIL import Image, ImageOps

    left, upper, right, lower = box
    part, corner = _fitted(made, right - left, lower - upper, inside=False)
    cut = _blank(right - left, lower - upper)
    cut.paste(part, corner)
    whole = Image.new("RGBA", image.size)
    whole.paste(cut, (left, upper))
    kept = Image.new("RGBa", image.size)
    around = ImageOps.invert(mask.convert("L"))
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=around)
    result = whole.convert("RGB").convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")
