"""Makes tests/exporter/components/watermark.npz: what the package invisible-watermark itself puts
into images.

    pip install --no-deps invisible-watermark
    pip install numpy opencv-python-headless PyWavelets torch
    python tests/exporter/components/watermark_record.py

The record keeps the packages out of the tests. The images are made by arithmetic, and are not in
it. invisible-watermark 0.2.0, OpenCV 5.0.0, PyWavelets 1.9.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).with_name("watermark.npz")
# Height and width: whole blocks of eight pixels, some beside them, and those of four beside them.
SIZES = ((256, 256), (264, 320), (260, 300), (258, 262))


def image_of(height: int, width: int) -> np.ndarray[Any, Any]:
    """Return an image float32 [height, width, 3] with waves, an edge, one colour, and numbers
    somewhat beyond 0 and 1."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    image = np.stack([np.sin(9 * x + (4 + k) * y + k) for k in range(3)], axis=-1) * 0.55 + 0.5
    image[height // 2 :, : width // 3] = (0.25, 0.5, 0.875)
    image[: height // 4, width // 2 :] *= 0.125
    return image.astype(np.float32)


def parts_of(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rows of an image [height, width, 3] that the record has: the last ones, and some
    of all others."""
    return np.concatenate([image[::9], image[-9:]])


def main() -> None:
    """Write the record."""
    from imwatermark import WatermarkEncoder

    message = 0b101100111110110010010000011110111011000110011110
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", [int(bit) for bit in bin(message)[2:]])
    parts = {}
    for height, width in SIZES:
        blue_first = image_of(height, width)[:, :, ::-1] * np.float32(255)
        marked = encoder.encode(blue_first, "dwtDct")[:, :, ::-1]
        parts[f"{height}x{width}"] = parts_of(np.rint(marked.clip(0, 255)).astype(np.uint8))
    np.savez_compressed(RECORD, **parts)


if __name__ == "__main__":
    main()
