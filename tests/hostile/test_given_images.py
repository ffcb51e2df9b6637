"""Whatever is given as an image or mask: the same numbers as diffusers', or an error that says what
is accepted; never numbers that wrapped or were clipped."""

from __future__ import annotations

import io
import struct
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from latentc.runtimes.calls import given_images
from latentc.runtimes.errors import InputError
from latentc.runtimes.images import masks

HEIGHT, WIDTH = 16, 24
GREYS = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round().astype(np.uint8)
COLOURS = np.stack([GREYS, GREYS[::-1], GREYS[:, ::-1]], axis=-1)
UNIT = COLOURS.astype(np.float32) / 255
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def gamma() -> PngInfo:
    """A chunk of a PNG file that tells a gamma of 1."""
    chunks = PngInfo()
    chunks.add(b"gAMA", (100_000).to_bytes(4, "big"))
    return chunks


def of_mode(mode: str) -> Image.Image:
    return Image.fromarray(COLOURS).convert("L" if mode == "PA" else "RGB").convert(mode)


def deep(mode: str) -> Image.Image:
    """16-bit greys whose upper bytes are `GREYS`."""
    levels = GREYS.astype(np.uint16) * 257
    if mode == "I":
        return Image.fromarray(levels.astype(np.int32))
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (WIDTH, HEIGHT), levels.astype(order).tobytes())


def drawn(
    value: Any, kind: given_images.Kind, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    return given_images.arrays(
        "image", given_images.listed("image", value, kind), height, width, kind
    )


def of_diffusers(value: Any, kind: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return what a ControlNet's processor makes of an image, and an inpainting pipeline's of a
    mask.
    """
    own = {"do_convert_rgb": True} if kind == "image" else MASKS
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, **own)
    made: np.ndarray = processor.preprocess(value, height=height, width=width).numpy()
    return made


MASKS = {"do_convert_grayscale": True, "do_binarize": True}


@pytest.mark.fault("2.3", "an image of another mode is resized otherwise than diffusers does")
@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (32, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_modes_are_as_in_diffusers(mode: str, size: tuple[int, int], kind: Any) -> None:
    image = of_mode(mode)
    np.testing.assert_array_equal(drawn(image, kind, *size), of_diffusers(image, kind, *size))


@pytest.mark.fault("2.3", "second look: a Lab image is resized otherwise than diffusers does")
def test_lab_is_as_in_diffusers() -> None:
    image = Image.frombytes("LAB", (WIDTH, HEIGHT), COLOURS.tobytes())
    for size in ((HEIGHT, WIDTH), (32, 16)):
        np.testing.assert_array_equal(
            drawn(image, "image", *size), of_diffusers(image, "image", *size)
        )
    assert set(np.unique(drawn(image, "mask"))) <= {0, 1}  # diffusers has no such mask


@pytest.mark.fault("2.3", "second look: images of any mode that are cropped to a mask")
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (32, 16), (16, 48)])
@pytest.mark.parametrize("mode", [*MODES, "RGBa"])
def test_crops_are_as_in_diffusers(mode: str, size: tuple[int, int]) -> None:
    """The part that is made anew, and what is put around the result."""
    height, width = size
    image = of_mode("RGBA").convert("RGBa") if mode == "RGBa" else of_mode(mode)
    mask = Image.new("L", image.size)
    mask.paste(255, (4, 3, 11, 9))
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False)
    box = processor.get_crop_region(mask, width, height, pad=2)
    crop = {"crops_coords": box, "resize_mode": "fill"}
    expected = processor.preprocess(image, height=height, width=width, **crop).numpy()
    (checked,) = given_images.listed("image", image)
    assert masks.crop_box(mask, width, height, 2) == box
    part = masks.filled(checked.crop(box), width, height)
    found = given_images.arrays("image", [part], height, width)
    np.testing.assert_array_equal(found, expected)

    made = Image.fromarray(255 - COLOURS).resize((width, height))
    whole = processor.apply_overlay(mask, image, made, box)
    (ours,) = masks.Overlay([checked], [mask], [box]).put([made])
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(whole))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (UNIT, "image"),
        (UNIT[None], "image"),
        ([UNIT, UNIT[::-1]], "image"),
        (UNIT.astype(np.float64), "image"),
        (np.asfortranarray(UNIT), "image"),
        (torch.from_numpy(UNIT.transpose(2, 0, 1).copy()), "image"),
        (torch.from_numpy(UNIT.transpose(2, 0, 1).copy())[None], "image"),
        ([torch.from_numpy(UNIT.transpose(2, 0, 1).copy())] * 2, "image"),
        (torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.bfloat16, requires_grad=True), "image"),
        (UNIT[:, :, 0], "mask"),
        (UNIT[:, :, :1], "mask"),
        (UNIT[None, :, :, 0], "mask"),
        (torch.from_numpy(UNIT[None, :, :, 0].copy()), "mask"),
        (torch.from_numpy(UNIT[None, None, :, :, 0].copy()), "mask"),
    ],
    ids=lambda value: f"{type(value).__name__}{list(getattr(value, 'shape', ''))}",
)
def test_arrays_and_tensors_are_as_in_diffusers(value: Any, kind: Any) -> None:
    if isinstance(value, torch.Tensor) and value.requires_grad:
        expected = value.detach().float().numpy()  # numpy has no bfloat16
    elif kind == "mask" and getattr(value, "ndim", 3) == 2:
        expected = of_diffusers(value[None], kind)
    else:
        expected = of_diffusers(value, kind)
    np.testing.assert_allclose(drawn(value, kind), expected, atol=1e-7)


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize(
    ("array", "scale"),
    [
        (COLOURS, 255),
        (COLOURS.astype(np.uint16) * 257, 65535),
        (COLOURS > 127, 1),
        (UNIT.astype(np.float16), 1),
    ],
    ids=["uint8", "uint16", "bool", "float16"],
)
@pytest.mark.fault("2.3", "an array of 16 bits wraps")
def test_numbers_of_a_range_are_scaled(array: np.ndarray, scale: int, kind: Any) -> None:
    array = array if kind == "image" else array[:, :, 0]
    values = array.astype(np.float32) / scale
    expected = values.transpose(2, 0, 1)[None] if kind == "image" else (values >= 0.5)[None, None]
    np.testing.assert_array_equal(drawn(array, kind), expected)
    (checked,) = given_images.listed("image", array, kind)
    through = np.asarray(masks.pillow(checked))
    np.testing.assert_array_equal(through, (values * np.float32(255)).round().astype(np.uint8))


@pytest.mark.fault("2.3", "greys of 16 bits are clipped to white")
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_deep_greys_are_scaled(mode: str, kind: Any) -> None:
    shallow = Image.fromarray(GREYS)
    np.testing.assert_array_equal(drawn(deep(mode), kind), drawn(shallow, kind))
    (checked,) = given_images.listed("image", deep(mode), kind)
    for one, other in ((masks.pillow(checked), shallow), (masks.blurred(checked, 1), None)):
        expected = masks.blurred(shallow, 1) if other is None else other
        np.testing.assert_array_equal(np.asarray(one.convert("L")), np.asarray(expected))
    np.testing.assert_array_equal(  # as an IP-Adapter's encoder has it
        np.asarray(masks.resized(checked, 8, 8, crop=True)),
        np.asarray(masks.resized(shallow, 8, 8, crop=True)),
    )


def tiff_of_12_bits() -> bytes:
    """A TIFF of `GREYS` with 12 bits a pixel, two pixels in three bytes."""
    levels = (GREYS.astype(np.uint32) * 4095 / 255).round().astype(np.uint32).reshape(-1, 2)
    pairs = (levels[:, 0] << 12 | levels[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)
    data = pairs[:, 1:].tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: HEIGHT}
    tags |= {279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    folder = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + folder


@pytest.mark.fault("2.3", "greys of 12 bits are taken for 16, nearly black")
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_greys_of_12_bits_are_scaled(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(tiff_of_12_bits())
    shallow = drawn(Image.fromarray(GREYS), kind)
    np.testing.assert_array_equal(drawn(given_images.read(path), kind), shallow)
    np.testing.assert_array_equal(drawn(Image.open(path), kind), shallow)


@pytest.mark.fault("2.3", "comments of a PPM are read byte by byte, or copied without a bound")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("P3\n#" + "a" * 100_000 + "\n1 1\n255\n1 2 3\n", "no size in the first"),
        ("P6" + " " * 100_000 + "1 1 255 abc", "no size in the first"),
        ("P2 9 9 255 " + "0 " * 80_000 + "#\n" * 100, "comments after 65536 bytes"),
    ],
    ids=["a long comment", "a long space", "late comments"],
)
def test_slow_comments_are_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        given_images.read(path)


@pytest.mark.parametrize(
    "text", ["P3 1 1 255 1 #\n2 3\n", "P3\n# by GIMP\n1 1\n255\n1 2 3\n", "P6 1 1\n#a\n255\n\1\2\3"]
)
def test_usual_comments_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_text(text)
    assert given_images.read(path).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.fault("2.3", "second look: greys of 8 bits in wider numbers are almost black")
@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_shallow_greys_in_wide_numbers_are_refused(mode: str, kind: Any, tmp_path: Path) -> None:
    """diffusers takes them for what they are, and others for white."""
    levels = GREYS.astype(np.int32 if mode == "I" else ">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (WIDTH, HEIGHT), levels.tobytes())
    with pytest.raises(InputError, match=r"'given': greys of 8 bits .* convert it to the mode L"):
        given_images.listed("given", image, kind)
    image.save(tmp_path / "grey.tiff")
    with pytest.raises(InputError, match=r"grey\.tiff: greys of 8 bits"):
        given_images.read(tmp_path / "grey.tiff")
    assert not drawn(Image.new(mode, (WIDTH, HEIGHT)), kind).any()  # black is black


@pytest.mark.fault("2.3", "second look: what an array masks is not looked at, and drawn")
@pytest.mark.parametrize("hidden", [np.nan, np.inf, 255.0, -1.0])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_masked_arrays(hidden: float, kind: Any) -> None:
    values = UNIT.copy() if kind == "image" else UNIT[:, :, 0].copy()
    values[3, 4] = hidden
    masked = np.ma.masked_array(values, values == values.flat[0])
    masked[3, 4] = np.ma.masked
    masked.data[3, 4] = hidden
    with pytest.raises(InputError, match="holds numbers from"):
        given_images.listed("given", masked, kind)


@pytest.mark.fault("2.3", "second look: arrays of other kinds and byte orders")
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (UNIT[:, :, 0].view(np.matrix), "mask"),
        (np.ma.masked_array(UNIT, np.zeros_like(UNIT)), "image"),
        (UNIT.astype(">f4"), "image"),
        (UNIT.astype(np.longdouble), "image"),
        ((COLOURS.astype(np.uint16) * 257).astype(">u2"), "image"),
        ((COLOURS.astype(np.uint16) * 257).astype("<u2"), "image"),
        (UNIT[::-1, ::-1][::-1, ::-1], "image"),
        (np.repeat(UNIT, 2, axis=0)[::2], "image"),
        (deque([UNIT]), "image"),
        (torch.nn.Parameter(torch.from_numpy(UNIT.transpose(2, 0, 1).copy())), "image"),
        (torch.from_numpy(UNIT).permute(2, 0, 1), "image"),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_arrays_of_other_kinds(value: Any, kind: Any) -> None:
    plain = UNIT if kind == "image" else UNIT[:, :, 0]
    np.testing.assert_allclose(drawn(value, kind), drawn(plain, kind), atol=1e-7)


@pytest.mark.fault("2.3", "second look: files of many layers, depths and colour spaces")
@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("animated.gif", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]}),
        ("animated.png", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]}),
        ("pages.tiff", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]}),
        ("print.jpg", "CMYK", {}),
        ("print.tiff", "CMYK", {"icc_profile": PROFILE}),
        ("lab.tiff", "LAB", {}),
        ("video.tiff", "YCbCr", {}),
        ("alpha.webp", "RGBA", {"lossless": True}),
        ("transparent.png", "P", {"transparency": 3}),
        ("gamma.png", "L", {"pnginfo": gamma()}),
    ],
)
def test_files_are_read_as_in_diffusers(
    name: str, mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The first layer, without its alpha; profiles and gammas change nothing."""
    image = Image.new("LAB", (24, 16), (90, 20, 200)) if mode == "LAB" else of_mode(mode)
    image.save(tmp_path / name, **options)
    expected = load_image(str(tmp_path / name))
    np.testing.assert_array_equal(
        np.asarray(given_images.read(tmp_path / name)), np.asarray(expected)
    )


@pytest.mark.fault("2.3", "blurring a mask of 1 bit is a traceback")
@pytest.mark.parametrize("mode", [*MODES, "I;16"])
def test_masks_of_all_modes_can_be_blurred(mode: str) -> None:
    mask = deep(mode) if mode == "I;16" else of_mode(mode)
    (checked,) = given_images.listed("mask_image", mask, "mask")
    soft = given_images.arrays("mask", [masks.blurred(checked, 2)], HEIGHT, WIDTH, "mask")
    assert soft.shape == (1, 1, HEIGHT, WIDTH)
    assert masks.crop_box(checked, 8, 8, 2)


@pytest.mark.fault("2.3", "numbers outside of their range wrap where Pillow is asked")
@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize(
    ("array", "says"),
    [
        (UNIT * 255, "numbers from 0 to 255; expected bytes, or numbers from 0 to 1"),
        (UNIT * 2 - 1, "numbers from -1 to 1"),
        (np.where(UNIT > 0.9, np.nan, UNIT), "nan"),
        (np.where(UNIT > 0.9, np.inf, UNIT), "inf"),
        (COLOURS.astype(np.int64), "array of int64; expected bytes"),
        (COLOURS.astype(np.int16), "array of int16"),
        (COLOURS.astype(np.complex64), "array of complex64"),
        (COLOURS.astype(object), "array of object"),
        (COLOURS.astype(str), "array of <U"),
        (UNIT[:0], "array \\[0, 24"),
        (UNIT[:, :0], "array \\[16, 0"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "20000x20000 pixels"),
        (torch.from_numpy(COLOURS.transpose(2, 0, 1).astype(np.int32)), "array of int32"),
    ],
    ids=str,
)
def test_other_numbers_are_refused(array: Any, says: str, kind: Any) -> None:
    if kind == "mask":
        array = array[0] if isinstance(array, torch.Tensor) else array[:, :, 0]
    with pytest.raises(InputError, match=says):
        given_images.listed("image", array, kind)


@pytest.mark.fault("2.3", "an array of another shape")
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (UNIT[:, :, 0], "image"),
        (UNIT[:, :, :1], "image"),
        (np.dstack([UNIT, UNIT[:, :, :1]]), "image"),
        (UNIT[None, None], "image"),
        (np.float32(1), "image"),
        (UNIT, "mask"),
        ([[0.5, 0.5], [0.5, 0.5]], "image"),
        ([], "mask"),
        ((), "image"),
        (np.zeros((0, 8, 8, 3)), "image"),
        ("photo.png", "image"),
        (Path("photo.png"), "image"),
        (None, "mask"),
        ({"image": UNIT}, "image"),
        (torch.zeros(4, HEIGHT, WIDTH), "image"),
        (Image.new("RGB", (0, 4)), "image"),
        (Image.new("F", (4, 4)), "image"),
        (Image.new("La", (4, 4)), "mask"),
        (Image.new("I", (4, 4), 1 << 20), "image"),
        (Image.new("I", (4, 4), -1), "mask"),
    ],
    ids=lambda value: f"{type(value).__name__}{list(getattr(value, 'shape', ''))}",
)
def test_what_is_no_image_is_refused(value: Any, kind: Any) -> None:
    with pytest.raises(InputError, match="'given'"):
        given_images.listed("given", value, kind)


@pytest.mark.fault("2.3", "a file that is cut short fails where its pixels are needed")
@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_files_that_are_cut_short_are_refused(name: str, tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole, name)
    path = tmp_path / "cut"
    for length in (0, 1, 7, 20, len(whole.getvalue()) // 2):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(InputError, match="not an image that can be read"):
            given_images.read(path)
    with pytest.raises(InputError, match="'image'"):
        given_images.listed("image", Image.open(path) if name != "WEBP" else Path("cut"))


@pytest.mark.fault("2.3", "the orientation of a file is ignored")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp", "photo.tiff"])
def test_files_are_upright_as_in_diffusers(name: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / name, exif=exif)
    expected = load_image(str(tmp_path / name))
    read = given_images.read(tmp_path / name)
    assert (read.mode, read.size) == ("RGB", expected.size)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(expected))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_files_of_all_modes_are_read(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    (deep(mode) if mode == "I;16" else of_mode(mode)).save(path)
    expected = Image.fromarray(GREYS) if mode == "I;16" else load_image(str(path))
    np.testing.assert_array_equal(
        np.asarray(given_images.read(path)), np.asarray(expected.convert("RGB"))
    )


@pytest.mark.fault("2.3", "a decompression bomb, or a document that another program draws")
@pytest.mark.parametrize(
    "data",
    [
        b"P5 100000 100000 255\n" + b"\0" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"GIF89a\0\0\0\0\0\0\0",
    ],
    ids=["bomb", "postscript", "empty"],
)
def test_files_that_are_not_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(InputError, match=r"image"):
        given_images.read(tmp_path / "image")
