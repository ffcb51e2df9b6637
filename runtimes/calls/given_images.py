"""Images and masks of a call: the one place that turns what callers have into checked data.

What is accepted is what diffusers' ``VaeImageProcessor`` accepts, and what it would draw wrong
without a word is converted or refused: depths of more than 8 bits, which Pillow clips to white,
and numbers outside of 0 to 1, which wrap where they become bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.calls.values import shown
from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.files import open_regular
from latentc.runtimes.storage.parsing import parser, parsing

if TYPE_CHECKING:
    from PIL import Image

_EXPECTED = {
    "image": "a Pillow image, an array [height, width, 3], or several of either",
    "mask": "a Pillow image, an array [height, width], or several of either",
}
Kind: TypeAlias = Literal["image", "mask"]

# Formats that are read from files: those that Pillow decodes by itself (it gives PostScript to
# another program).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000")
LARGEST_FILE = 1 << 30  # bytes
_MOST_PIXELS = 178_956_970  # from here on Pillow refuses a file as a decompression bomb
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits a pixel
_SHALLOW, _DEEPEST = 255, 65535  # white, of 8 and of 16 bits
_BITS = 258  # the tag of TIFF for bits a sample
# Netpbm's formats (PPM) are read byte by byte in their headers, and comments among numbers that are
# written out are cut out one by one, each time with a copy of a mebibyte.
_NETPBM = re.compile(rb"P[0-9A-Za-z]{1,5}\s")
_NETPBM_HEADER = re.compile(rb"P[0-9A-Za-z]{1,5}(?:\s+[0-9.+-]+){2,3}\s")
_NETPBM_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]")
_WRITTEN_OUT = (b"P1", b"P2", b"P3")
_LONGEST_HEADER = 1 << 16  # bytes
# Pillow's modes that it resizes, pastes, and converts to RGB, of masks to grey.
_GREY = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_MODES: Mapping[Kind, Sequence[str]] = {"mask": _GREY, "image": (*_GREY, "LAB")}


@parser(InputError, "path", "an image that can be read")
def read(path: Path) -> Image.Image:
    """Return the image in a file, upright and in RGB, as ``diffusers.utils.load_image`` does.

    Greys of 12 and 16 bits are scaled to 8 bits.

    Raises:
        InputError: the file is missing, damaged, cut short, too large or of an unknown format.
    """
    from PIL import Image, ImageOps

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with open_regular(path, LARGEST_FILE) as stream:
        _refuse_slow_netpbm(path, stream)
        with Image.open(stream, formats=formats) as file:
            file.load()
            upright, white = ImageOps.exif_transpose(file), _white(file)
    return _checked_pillow(str(path), upright, "image", white).convert("RGB")


def _refuse_slow_netpbm(path: Path, stream: BinaryIO) -> None:
    """Refuse a Netpbm file whose header is longer than `_LONGEST_HEADER`, or that has comments
    after so many bytes."""
    head = stream.read(_LONGEST_HEADER)
    if _NETPBM.match(head):
        plain = _NETPBM_COMMENT.sub(b"", head)
        header = _NETPBM_HEADER.match(plain)
        if header is None:
            raise InputError(f"{path}: its header has no size in the first {_LONGEST_HEADER} bytes")
        rest = plain[header.end() :]
        while rest and head.startswith(_WRITTEN_OUT):
            if b"#" in rest:
                raise InputError(f"{path}: comments after {_LONGEST_HEADER} bytes; save it as PNG")
            rest = stream.read(_LONGEST_HEADER)
    stream.seek(0)


def listed(name: str, value: Any, kind: Kind = "image") -> list[Any]:
    """Return the single images of a value, checked.

    Each is a Pillow image that Pillow can convert and resize, or an array float32 [height, width,
    3] in [0, 1], of masks [height, width].

    Args:
        value: one or several Pillow images, numpy arrays or PyTorch tensors. Arrays are bytes
            (uint8), 16-bit numbers (uint16), truth values, or floats in [0, 1]. Tensors have their
            channels first, as in diffusers.

    Raises:
        InputError: it is no image, or its size, type or range is another one.
    """
    value = _without_tensors(name, value, kind)
    several = isinstance(value, Sequence) or (
        isinstance(value, np.ndarray) and (value.ndim == 4 or (kind, value.ndim) == ("mask", 3))
    )
    # [height, width, 1] is one mask, and no list of lines; [height, width, 3] is none.
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] in (1, 3):
        several = False
    if isinstance(value, str | bytes) or (several and not len(value)):
        raise InputError(f"{name!r}: expected {_EXPECTED[kind]}, not {shown(value)}")
    return [_checked(name, image, kind) for image in (value if several else [value])]


def size(name: str, images: Sequence[Any]) -> tuple[int, int]:
    """Height and width in pixels, of images that `listed` returned.

    Raises:
        InputError: the images differ in size.
    """
    sizes = {_size(image) for image in images}
    if len(sizes) != 1:
        raise InputError(f"{name!r} holds images of {len(sizes)} sizes; expected one size")
    return sizes.pop()


def arrays(
    name: str, images: Sequence[Any], height: int, width: int, kind: Kind = "image"
) -> Array:
    """float32 [n, 3, height, width] in [0, 1], of masks [n, 1, height, width] of 0 and 1.

    Args:
        images: what `listed` returned. Pillow images are resized as diffusers'
            ``VaeImageProcessor`` does (Lanczos, in their own mode) and become RGB, or grey for a
            mask, which is 1 from half on. Arrays must have the size.

    Raises:
        InputError: an array of another size.
    """
    return np.stack([_array(name, image, height, width, kind) for image in images])


def reduced(image: Any, height: int, width: int, resample: str, gap: float) -> Any:
    """Return a Pillow image in a size, made smaller in whole steps first where it is `gap` times
    larger (diffusers' ``VaeImageProcessor`` with a ``reducing_gap``); an array as it is."""
    if isinstance(image, np.ndarray):
        return image
    from PIL import Image

    method = Image.Resampling[resample.upper()]
    return image.resize((width, height), method, reducing_gap=gap)


def _array(name: str, image: Any, height: int, width: int, kind: Kind) -> Array:
    if not isinstance(image, np.ndarray):
        from PIL import Image

        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = np.asarray(image.convert("RGB" if kind == "image" else "L"))
        image = image.astype(np.float32) / 255
    if image.shape[:2] != (height, width):
        raise InputError(
            f"{name!r} is an array of {image.shape[1]}x{image.shape[0]} pixels, expected "
            f"{width}x{height}: give a Pillow image to have it resized"
        )
    channels = image if image.ndim == 3 else image[:, :, np.newaxis]
    values = np.ascontiguousarray(channels.transpose(2, 0, 1), np.float32)
    return values if kind == "image" else (values >= 0.5).astype(np.float32)


def _size(image: Any) -> tuple[int, int]:
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return int(image.size[1]), int(image.size[0])


def _checked(name: str, image: Any, kind: Kind) -> Any:
    if isinstance(image, np.ndarray):
        return _checked_array(name, image, kind)
    if not hasattr(image, "convert") or not hasattr(image, "resize"):
        raise InputError(f"{name!r}: expected {_EXPECTED[kind]}, not {shown(image)}")
    return _checked_pillow(repr(name), image, kind, _white(image))


def _white(image: Image.Image) -> int:
    """Return the number that is white in an image of `_DEEP`: Pillow gives greys of 12 bits, which
    TIFF files have, as they are."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return (1 << 12) - 1 if tags.get(_BITS) == (12,) else _DEEPEST


def _checked_pillow(label: str, image: Image.Image, kind: Kind, white: int) -> Image.Image:
    """Return the image, its pixels read, in one of `_MODES`; `white` is what `_white` says."""
    _check_size(label, *image.size)
    with parsing(label, InputError, "an image that can be read"):
        image.load()  # files are read when they are first needed
    if image.mode in _DEEP:
        return _shallow(label, image, white)
    if image.mode in _MODES[kind]:
        return image
    if image.mode == "F":
        raise InputError(
            f"{label}: Pillow's mode F says no range; expected an array of numbers from 0 to 1, or "
            "an image of another mode"
        )
    with parsing(label, InputError, f"an image that can be drawn, of mode {image.mode}"):
        return image.convert("RGB")


def _shallow(label: str, image: Image.Image, white: int) -> Image.Image:
    """Return greys of 16 bits scaled to 8; Pillow's own conversion makes all above 255 white.

    Raises:
        InputError: greys beyond `white`, or none above 255: those are of 8 bits where a library
            keeps them in wider numbers, as diffusers reads them, and almost black where it does
            not.
    """
    from PIL import Image

    levels = np.asarray(image).astype(np.int64)
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > white:
        raise InputError(f"{label}: greys from {low} to {high}; expected 0 to {white}")
    if 0 < high <= _SHALLOW:
        raise InputError(
            f"{label}: greys of 8 bits ({low} to {high}) in an image of 16 (mode {image.mode}); "
            "convert it to the mode L"
        )
    return Image.fromarray((levels * _SHALLOW / white).round().astype(np.uint8))


def _checked_array(name: str, array: np.ndarray, kind: Kind) -> Array:
    """float32, images [height, width, 3], masks [height, width]."""
    # Subclasses have rules of their own: what is masked is left out of a minimum, and goes on.
    array = np.asarray(array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    coloured = array.ndim == 3 and array.shape[2] == 3
    if not (grey if kind == "mask" else coloured) or not array.size:
        raise InputError(
            f"{name!r}: expected {_EXPECTED[kind]}, not an array {list(array.shape)} of "
            f"{array.dtype}"
        )
    _check_size(repr(name), array.shape[1], array.shape[0])
    if array.dtype in (np.uint8, np.uint16):
        values = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif array.dtype.kind in "fb":
        values = array.astype(np.float32)
    else:
        raise InputError(
            f"{name!r} is an array of {array.dtype}; expected bytes (uint8), uint16, or floats "
            "from 0 to 1"
        )
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise InputError(
            f"{name!r} holds numbers from {low:g} to {high:g}; expected bytes, or numbers from 0 "
            "to 1"
        )
    return values[:, :, 0] if kind == "mask" and values.ndim == 3 else values


def _check_size(label: str, width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > _MOST_PIXELS:
        raise InputError(
            f"{label} has {width}x{height} pixels; expected at least one, and at most "
            f"{_MOST_PIXELS} in all"
        )


def _without_tensors(name: str, value: Any, kind: Kind) -> Any:
    """With PyTorch's tensors as arrays whose channels come last."""
    if isinstance(value, list | tuple) and any(map(_is_tensor, value)):
        return [_without_tensors(name, item, kind) for item in value]
    if not _is_tensor(value):
        return value
    with parsing(repr(name), InputError, "a tensor of real numbers"):
        tensor = value.detach().cpu()
        array = np.asarray(tensor.float() if tensor.is_floating_point() else tensor)
    if kind == "mask":
        return array[:, 0] if array.ndim == 4 and array.shape[1] == 1 else array
    return np.moveaxis(array, -3, -1) if array.ndim in (3, 4) else array


def _is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of PyTorch, which is not imported for that."""
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach")
