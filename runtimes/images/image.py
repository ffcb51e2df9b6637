"""From a decoder's output to images: arrays, Pillow images, contact sheets, files.

The conversions equal those of diffusers' ``VaeImageProcessor.postprocess`` (its
``pt_to_numpy`` and ``numpy_to_pil``), except that 0 is black and 1 is white already: a bundle's
decoder graph includes the denormalisation, but for its limits. Pillow is imported when it is first
needed, so that a program which only wants arrays never pays for it.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from latentc.runtimes.errors import InputError, LatentcError, NumericalError, first_line
from latentc.runtimes.storage.files import replacing

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

Pixels: TypeAlias = npt.NDArray[np.floating[Any]]

# File name extension to Pillow's format name: the ones that can carry the parameters.
FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
METADATA_KEY = "parameters"  # the PNG text chunk where other tools look for them, too

_EXIF_DESCRIPTION = 0x010E  # ImageDescription, an ASCII tag
# Pixels of a side; PNG has room.
_LONGEST: Mapping[str, int] = {"WEBP": 16_383, "JPEG": 65_500, "GIF": 65_535}
_LONGEST_EXIF = 65_533  # bytes in a segment of a JPEG
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def to_numpy(images: Pixels) -> npt.NDArray[np.float32]:
    """Return images as diffusers returns them for ``output_type="np"``.

    Args:
        images: (batch, channels, height, width), as a decoder gives them: those beyond 0 and 1
            are limited.

    Returns:
        float32 in [0, 1], (batch, height, width, channels), a copy in C order.

    Raises:
        InputError: not four axes, or neither 1, 3 nor 4 channels.
        NumericalError: NaN or infinity, which would silently become black or white.
    """
    _check_pixels(images)
    if not np.isfinite(images).all():
        raise NumericalError("the image holds NaN or infinity")
    pixels = np.array(images.transpose(0, 2, 3, 1), dtype=np.float32, order="C")
    return np.clip(pixels, 0, 1, out=pixels)


def resized(images: Pixels, height: int, width: int) -> Pixels:
    """Return images enlarged or made smaller until they cover a size, and its middle: diffusers'
    ``VaeImageProcessor.resize_and_crop_tensor``. Where that has a side one pixel too short, for
    which it returns a strip, this one is stretched by that pixel.

    Args:
        images: float32 (batch, channels, rows, columns).
        height, width: in pixels.
    """
    rows, columns = images.shape[2:]
    if (rows, columns) == (height, width):
        return images
    ratio = max(height / rows, width / columns)
    sides = max(int(rows * ratio), height), max(int(columns * ratio), width)
    upper, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return _interpolated(
        _interpolated(images, 2, sides[0], slice(upper, upper + height)),
        *(3, sides[1], slice(left, left + width)),
    )


def _interpolated(images: Pixels, axis: int, count: int, part: slice) -> Pixels:
    """Return an axis with `count` linearly interpolated places, of which `part` is kept: those of
    ``torch.nn.functional.interpolate`` with ``align_corners=False``."""
    length = images.shape[axis]
    places = np.maximum((np.arange(count)[part] + 0.5) * (length / count) - 0.5, 0)
    lower = np.minimum(places.astype(np.intp), length - 1)
    upper = np.minimum(lower + 1, length - 1)
    shape = [-1 if each == axis else 1 for each in range(images.ndim)]
    share = (places - lower).astype(np.float32).reshape(shape)
    first, second = np.take(images, lower, axis), np.take(images, upper, axis)
    made: Pixels = first * (1 - share) + second * share
    return made


def to_pil(images: Pixels) -> list[Image.Image]:
    """Return images as diffusers returns them for ``output_type="pil"``.

    Args:
        images: (batch, channels, height, width), values in [0, 1]; those outside are clipped.

    Returns:
        One image per image, of mode L, RGB or RGBA for 1, 3 or 4 channels. Values are
        rounded half to even, as numpy and diffusers do.

    Raises:
        InputError: not four axes, or neither 1, 3 nor 4 channels.
        NumericalError: NaN or infinity, which would silently become a black image.
    """
    from PIL import Image

    pixels = to_numpy(images)
    levels = (pixels * np.float32(255)).round().astype(np.uint8)
    if levels.shape[-1] == 1:
        levels = levels[..., 0]
    return [Image.fromarray(image) for image in levels]


def grid(
    images: Sequence[Image.Image],
    rows: int,
    cols: int,
    *,
    labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    col_labels: Sequence[str] = (),
    scale: int = 1,
) -> Image.Image:
    """Return a contact sheet: `images` row by row, on white.

    Args:
        images: at most rows × cols of any mode; smaller ones are centred in their cell.
        labels: one per image, below it.
        row_labels: one per row, above it, over the whole width.
        col_labels: one per column, at the top.
        scale: enlarges the images by a whole factor, without smoothing.

    Returns:
        An image of mode RGB. Labels that are too long end in an ellipsis.

    Raises:
        InputError: no images, more than fit, a wrong number of labels, or a `scale`, `rows`
            or `cols` below 1.
    """
    from PIL import Image, ImageDraw

    _check_grid(images, rows, cols, labels, row_labels, col_labels, scale)
    layout = _Layout.of(images, cols, scale, bool(labels), bool(row_labels), bool(col_labels))
    sheet = Image.new("RGB", (layout.width, layout.row_top(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    font = _font()
    for col, text in enumerate(col_labels):
        _write(pen, font, (layout.col_left(col), _GAP), text, layout.cell_width)
    for row, text in enumerate(row_labels):
        _write(pen, font, (_GAP, layout.row_top(row)), text, layout.width - 2 * _GAP)
    for index, image in enumerate(images):
        row, col = divmod(index, cols)
        left, top = layout.col_left(col), layout.image_top(row)
        width, height = image.width * scale, image.height * scale
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        inset = (layout.cell_width - width) // 2, (layout.cell_height - height) // 2
        sheet.paste(enlarged, (left + inset[0], top + inset[1]))
        if labels:
            below = top + layout.cell_height
            _write(pen, font, (left, below), labels[index], layout.cell_width)
    return sheet


def save(
    image: Image.Image,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an image whole or not at all: beside its place first, then renamed.

    Args:
        path: the extension chooses the format, one of `FORMATS`; the folder must exist.
        metadata: written as JSON, into PNG's text chunk ``parameters`` or the EXIF image
            description of JPEG and WebP.

    Returns:
        The path written.

    Raises:
        InputError: an unknown extension, metadata that JSON cannot express, a transparent
            image as JPEG, or a path that cannot be written to.
        LatentcError: the disk failed or is full.
    """
    target = Path(path)
    return write(image, target, save_options(image, target, _format_of(target), metadata))


def write(image: Image.Image, target: Path, options: Mapping[str, Any]) -> Path:
    """Write an image with these arguments of Pillow's ``save``, whole or not at all; see `save`."""
    with _atomic(target) as file:
        try:
            image.save(file, **options)
        except (ValueError, TypeError, struct.error, OverflowError) as error:
            raise InputError(f"cannot write {target}: {first_line(error)}") from error
    return target


def check_size(path: str | os.PathLike[str], width: int, height: int) -> None:
    """Refuse an image that is too large for the format of its file.

    Raises:
        InputError: it names the format's limit.
    """
    target = Path(path)
    check_format(target, _format_of(target), width, height)


def check_format(target: Path, format_name: str, width: int, height: int) -> None:
    """Refuse an image that is too large for a format. Raises InputError."""
    longest = _LONGEST.get(format_name)
    if longest is not None and max(width, height) > longest:
        raise InputError(
            f"cannot write {target}: {width}x{height} pixels, and {format_name} holds at most "
            f"{longest} a side; use .png"
        )


def check_path(path: str | os.PathLike[str]) -> Path:
    """Refuses a path that `save` could not write, before the work of making an image.

    Raises:
        InputError: an unknown extension, a folder that does not exist or cannot be written, or a
            path that is one.
    """
    target = Path(path)
    _format_of(target)
    return check_place(target)


def check_place(target: Path) -> Path:
    """Refuse a file whose folder is missing or read-only, or that is a folder.

    Raises:
        InputError: it says which.
    """
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {target}: the folder {target.parent} is read-only")
    return target


_GAP = 8  # pixels between cells and around the sheet
_FONT_SIZE = 13  # pixels
_LINE = 18  # height of a line of text


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things go on a sheet, in pixels. A strip is 0 high when it has no labels."""

    cols: int
    cell_width: int
    cell_height: int
    label_strip: int
    row_strip: int
    col_strip: int

    @classmethod
    def of(
        cls,
        images: Sequence[Image.Image],
        cols: int,
        scale: int,
        has_labels: bool,
        has_row_labels: bool,
        has_col_labels: bool,
    ) -> _Layout:
        return cls(
            cols=cols,
            cell_width=scale * max(image.width for image in images),
            cell_height=scale * max(image.height for image in images),
            label_strip=_LINE * has_labels,
            row_strip=_LINE * has_row_labels,
            col_strip=_LINE * has_col_labels,
        )

    @property
    def width(self) -> int:
        return self.col_left(self.cols)

    def col_left(self, col: int) -> int:
        return _GAP + col * (self.cell_width + _GAP)

    def row_top(self, row: int) -> int:
        height = self.row_strip + self.cell_height + self.label_strip + _GAP
        return _GAP + self.col_strip + row * height

    def image_top(self, row: int) -> int:
        return self.row_top(row) + self.row_strip


def _font() -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size=_FONT_SIZE)


def _write(
    pen: ImageDraw.ImageDraw, font: Font, position: tuple[int, int], text: str, width: int
) -> None:
    from PIL import ImageFont

    text = " ".join(text.split())  # one line
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow built without FreeType
        text = text.encode("latin-1", "replace").decode("latin-1")
    pen.text(position, _shorten(font, text, width), fill="black", font=font)


def _shorten(font: Font, text: str, width: int) -> str:
    """Return `text`, or its longest beginning that fits into `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    for end in range(len(text) - 1, 0, -1):
        shortened = text[:end].rstrip() + "..."
        if font.getlength(shortened) <= width:
            return shortened
    return ""


def _check_pixels(images: Pixels) -> None:
    if images.ndim != 4 or images.shape[1] not in _CHANNELS:
        raise InputError(
            "images must have the shape (batch, 1, 3 or 4 channels, height, width), "
            f"not {images.shape}"
        )


def _check_grid(
    images: Sequence[Image.Image],
    rows: int,
    cols: int,
    labels: Sequence[str],
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    scale: int,
) -> None:
    if rows < 1 or cols < 1 or scale < 1:
        raise InputError(f"rows ({rows}), cols ({cols}) and scale ({scale}) must be at least 1")
    if not 1 <= len(images) <= rows * cols:
        raise InputError(
            f"a {rows} × {cols} grid holds 1 to {rows * cols} images, not {len(images)}"
        )
    expected = {"labels": len(images), "row_labels": rows, "col_labels": cols}
    given = {"labels": labels, "row_labels": row_labels, "col_labels": col_labels}
    for name, count in expected.items():
        if given[name] and len(given[name]) != count:
            raise InputError(f"{name} has {len(given[name])} entries where {count} are needed")


def _format_of(target: Path) -> str:
    try:
        return FORMATS[target.suffix.lower()]
    except KeyError:
        known = ", ".join(FORMATS)
        raise InputError(
            f"cannot write {target}: the extension {target.suffix!r} is none of {known}"
        ) from None


def save_options(
    image: Image.Image, target: Path, format_name: str, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return arguments for Pillow's ``save``.

    Raises:
        InputError: the format cannot hold the image, or JSON not express the metadata.
    """
    options: dict[str, Any] = {"format": format_name}
    if format_name == "PNG":
        options["compress_level"] = 4  # half the time of the default 6, the same size
    elif format_name != "GIF":
        options["quality"] = 95
    check_format(target, format_name, *image.size)
    if not image.width or not image.height:
        raise InputError(f"cannot write {target}: the image is empty")
    if options["format"] == "JPEG" and "A" in image.getbands():
        raise InputError(f"cannot write {target}: JPEG has no transparency; use .png or .webp")
    if metadata is not None:
        options |= _metadata_options(options["format"], metadata)
    return options


def _metadata_options(format_name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    from PIL import Image, PngImagePlugin

    try:
        text = json.dumps(dict(metadata), allow_nan=False)  # ASCII only, which EXIF needs
    except (TypeError, ValueError) as error:
        raise InputError(f"the image's metadata cannot be written as JSON: {error}") from None
    if format_name == "GIF":
        return {"comment": text.encode()}
    if format_name == "PNG":
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text(METADATA_KEY, text)
        return {"pnginfo": chunk}
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = text
    if format_name == "JPEG" and (length := len(exif.tobytes())) > _LONGEST_EXIF:
        warnings.warn(
            f"the image is written without its settings: they take {length} bytes, and JPEG has "
            f"room for {_LONGEST_EXIF}; .png and .webp have more",
            stacklevel=4,
        )
        return {}
    return {"exif": exif}


@contextmanager
def _atomic(target: Path) -> Iterator[BinaryIO]:
    """Yield a file beside `target` that takes its place on success and vanishes otherwise."""
    check_place(target)
    try:
        with replacing(target) as file:
            yield file
    except PermissionError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    except OSError as error:
        raise LatentcError(f"cannot write {target}: {error.strerror or error}") from error
