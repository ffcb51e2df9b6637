"""Images against diffusers' own post-processing, sheets by their pixels, files by reading."""

import errno
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from latentc.runtimes.errors import InputError, LatentcError, NumericalError
from latentc.runtimes.images import animation, image

METADATA = {"prompt": "a large red circle, größer", "seed": 2**63, "steps": 25, "nested": [1.5]}


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def diffusers_images(pixels: np.ndarray, output_type: str) -> Any:
    processor = VaeImageProcessor(do_normalize=False)  # [0, 1] already, like a bundle's decoder
    return processor.postprocess(torch.from_numpy(pixels), output_type=output_type)


def plain(color: str, size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 8), (3, 3, 16, 24), (2, 1, 9, 7), (1, 4, 5, 5)], ids=str
)
def test_images_equal_diffusers(shape: tuple[int, ...]) -> None:
    pixels = random_pixels(*shape)
    np.testing.assert_array_equal(image.to_numpy(pixels), diffusers_images(pixels, "np"))
    ours, theirs = image.to_pil(pixels), diffusers_images(pixels, "pil")
    assert [each.mode for each in ours] == [each.mode for each in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(2, 6), st.integers(2, 6)),
        elements=st.floats(0, 1, width=32),
    )
)
def test_any_image_equals_diffusers(pixels: np.ndarray) -> None:
    for mine, other in zip(image.to_pil(pixels), diffusers_images(pixels, "pil"), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


def test_rounding_at_every_half() -> None:
    """k + 1/2 of 255: where rounding half to even and half up would part."""
    pixels = np.resize(((np.arange(255) + 0.5) / 255).astype(np.float32), (1, 3, 10, 17))
    np.testing.assert_array_equal(
        np.asarray(image.to_pil(pixels)[0]), np.asarray(diffusers_images(pixels, "pil")[0])
    )


def test_values_outside_are_clipped_not_wrapped() -> None:
    pixels = np.array([-0.1, 1.1, 1.004], dtype=np.float32).reshape(1, 3, 1, 1)
    assert image.to_pil(pixels)[0].getpixel((0, 0)) == (0, 255, 255)


def test_one_pixel_high_grey() -> None:
    assert image.to_pil(random_pixels(1, 1, 1, 5))[0].size == (5, 1)


def test_half_precision_is_widened() -> None:
    result = image.to_numpy(random_pixels(1, 3, 4, 4).astype(np.float16))
    assert result.dtype == np.float32


def test_numpy_images_are_a_copy() -> None:
    pixels = np.zeros((1, 1, 4, 4), dtype=np.float32)
    assert not np.shares_memory(image.to_numpy(pixels), pixels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_silent_black_images(bad: float) -> None:
    pixels = random_pixels(1, 3, 4, 4)
    pixels[0, 1, 2, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        image.to_pil(pixels)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 8, 8), (1, 8, 8, 3), (8,)], ids=str)
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="must have the shape"):
        image.to_pil(random_pixels(*shape))


def test_grid_places_images_row_by_row() -> None:
    colors = ["red", "lime", "blue", "yellow", "cyan"]
    sheet = image.grid([plain(color) for color in colors], rows=2, cols=3, scale=2)
    gap = 8
    assert sheet.size == (3 * 40 + 4 * gap, 2 * 24 + 3 * gap)
    for index, color in enumerate(colors):
        row, col = divmod(index, 3)
        left, top = gap + col * (40 + gap), gap + row * (24 + gap)
        cell = sheet.crop((left, top, left + 40, top + 24))
        assert cell.getcolors() == [(40 * 24, plain(color).getpixel((0, 0)))]
    assert sheet.getpixel((sheet.width - gap - 1, sheet.height - gap - 1)) == (255, 255, 255)


def test_grid_centres_smaller_images_and_takes_any_mode() -> None:
    small = Image.new("L", (10, 4), 0)
    sheet = image.grid([plain("red"), small], rows=1, cols=2)
    assert sheet.mode == "RGB"
    cell = sheet.crop((36, 8, 56, 20))
    assert cell.getbbox() == (0, 0, 20, 12)
    assert cell.getpixel((0, 0)) == (255, 255, 255)
    assert cell.getpixel((5, 4)) == cell.getpixel((14, 7)) == (0, 0, 0)


def test_grid_labels_are_drawn_inside_their_strips() -> None:
    images = [plain("red", (100, 20)), plain("red", (100, 20))]
    bare = image.grid(images, 1, 2)
    sheet = image.grid(
        images,
        1,
        2,
        labels=["one", "a label that is far too long for the width of its image"],
        row_labels=["a row\nin one line"],
        col_labels=["left", "right"],
    )
    assert sheet.width == bare.width
    assert sheet.height == bare.height + 3 * 18
    grey = np.asarray(sheet.convert("L")) < 128
    assert grey[8:26, :108].any()  # column label
    assert grey[26:44].any()  # row label
    assert grey[64:82, 8:108].any()  # labels
    assert grey[64:82, 116:216].any()
    assert not grey[:, 216:].any()  # the long one was cut, not drawn into the margin
    assert not grey[:8].any()
    assert not grey[82:].any()


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "holds 1 to 2 images, not 0"),
        (3, {}, "holds 1 to 2 images, not 3"),
        (2, {"rows": 0}, "must be at least 1"),
        (2, {"scale": 0}, "must be at least 1"),
        (2, {"labels": ["one"]}, "labels has 1 entries where 2 are needed"),
        (2, {"row_labels": ["a", "b"]}, "row_labels has 2 entries where 1 are needed"),
        (2, {"col_labels": ["a"]}, "col_labels has 1 entries where 2 are needed"),
    ],
)
def test_bad_grids(count: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        image.grid([plain("red")] * count, **({"rows": 1, "cols": 2} | options))


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "b.jpg", "b.jpeg", "c.webp"])
def test_save_and_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert image.save(plain("red"), str(path), METADATA) == path
    with Image.open(path) as read:
        assert read.size == (20, 12)
        text = read.text["parameters"] if read.format == "PNG" else read.getexif()[0x010E]
        assert json.loads(text) == METADATA
        if read.format == "PNG":
            np.testing.assert_array_equal(np.asarray(read), np.asarray(plain("red")))
    assert list(tmp_path.iterdir()) == [path]


def test_save_without_metadata_replaces_and_respects_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    reference = tmp_path / "reference"
    reference.write_bytes(b"")
    image.save(plain("red"), path)
    with Image.open(path) as read:
        assert read.text == {}
    assert path.stat().st_mode == reference.stat().st_mode


@pytest.mark.parametrize("name", ["a.bmp", "a", "a.png.txt", ".png"])
def test_unknown_extensions(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"is none of \.png, \.jpg, \.jpeg, \.webp"):
        image.save(plain("red"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        image.check_path(tmp_path / "missing" / "a.png")
    with pytest.raises(InputError, match="it is a folder"):
        image.save(plain("red"), tmp_path / "folder.png")
    assert image.check_path(tmp_path / "fine.png") == tmp_path / "fine.png"


@pytest.mark.parametrize("metadata", [{"x": object()}, {"x": float("nan")}], ids=["type", "nan"])
def test_metadata_that_json_cannot_express(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="metadata"):
        image.save(plain("red"), tmp_path / "a.png", metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("3.1", "an image that is too large for its format fails after all steps")
@pytest.mark.parametrize(
    ("name", "longest"), [("a.webp", 16_383), ("a.jpg", 65_500), ("a.png", None)]
)
def test_formats_hold_so_many_pixels(tmp_path: Path, name: str, longest: int | None) -> None:
    path = tmp_path / name
    for size in ((longest or 70_000, 1), (1, longest or 70_000)):
        image.check_size(path, *size)
        image.save(Image.new("RGB", size), path)
    if longest is not None:
        for size in ((longest + 1, 1), (1, longest + 1)):
            with pytest.raises(InputError, match=f"at most {longest} a side"):
                image.check_size(path, *size)
            with pytest.raises(InputError, match=f"at most {longest} a side"):
                image.save(Image.new("RGB", size), path)


@pytest.mark.fault("3.1", "settings that are too long for a JPEG lose the image")
def test_settings_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    long = {"prompt": "ü" * 20_000}
    with pytest.warns(UserWarning, match="without its settings"):
        image.save(plain("red"), tmp_path / "a.jpg", long)
    with Image.open(tmp_path / "a.jpg") as made:
        assert made.size == (20, 12)
        assert not made.getexif()
    image.save(plain("red"), tmp_path / "a.webp", long)
    image.save(plain("red"), tmp_path / "a.png", long)
    with Image.open(tmp_path / "a.webp") as made:
        assert json.loads(made.getexif()[0x010E]) == long
    with Image.open(tmp_path / "a.png") as made:
        assert json.loads(made.text["parameters"]) == long  # type: ignore[attr-defined]
    image.save(plain("red"), tmp_path / "a.jpg", {"prompt": "a" * 65_000})
    with Image.open(tmp_path / "a.jpg") as made:
        assert made.getexif()


@pytest.mark.fault("3.1", "an image that its format cannot hold is a traceback")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "F", "I;16", "LAB", "empty"])
def test_other_images_are_written_or_refused(tmp_path: Path, name: str, mode: str) -> None:
    odd = Image.new("RGB", (0, 4)) if mode == "empty" else Image.new(mode, (4, 4))
    with suppress(LatentcError):
        image.save(odd, tmp_path / name, METADATA)
        with Image.open(tmp_path / name) as made:
            assert made.size == odd.size
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_no_transparency_in_jpeg(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no transparency"):
        image.save(Image.new("RGBA", (4, 4)), tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), LatentcError),
        (PermissionError(errno.EACCES, "Permission denied"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full disk", "permission", "interrupt"],
)
def test_a_failed_save_leaves_the_old_image(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    path = tmp_path / "a.png"
    image.save(plain("red"), path)
    before = path.read_bytes()

    def fail(self: Image.Image, file: Any, **options: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(expected) as caught:
        image.save(plain("blue"), path)
    if expected is not KeyboardInterrupt:
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_importing_does_not_load_pillow() -> None:
    code = (
        "import sys, numpy, latentc.runtimes.images.image; "
        "latentc.runtimes.images.image.to_numpy(numpy.zeros((1, 3, 2, 2), numpy.float32)); "
        "sys.exit(int('PIL' in sys.modules or 'torch' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("rate", "unit", "shown"), [(16, 1, 62), (16, 10, 60), (24, 1, 42)])
def test_frames_are_shown_as_long_as_the_video_is(rate: float, unit: int, shown: int) -> None:
    """Times are whole milliseconds, of a GIF hundredths of a second; the rest is not lost."""
    times = animation.durations(81, rate, unit)
    assert times[0] == shown
    assert abs(sum(times) - 81_000 / rate) <= unit / 2
    assert max(times) - min(times) <= unit
