"""Arrays and images whose headers declare what is not there: each is refused at once."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from latentc.runtimes.calls.given_images import read
from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.version_1.plans import read_plans
from tests.runtimes.version_1.test_plans import save_plans
from tests.support.fakes import plan_table


def _npy(header: str, data: bytes = b"x" * 64) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def _array(descr: str, shape: str) -> bytes:
    return _npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


ARRAYS = {
    "objects": _array("'|O'", "(1,)"),
    "code": _array("__import__('os').getpid()", "(1,)"),
    "an expression": _array("'<i4'", "(1<<40,)"),
    "a terabyte": _array("'<i4'", f"({1 << 40},)"),
    "negative": _array("'<i4'", "(-1,-8)"),
    "elements without bytes": _array("'|V0'", f"({1 << 40},)"),
    "one huge element": _array("'|V1000000000'", "(1,)"),
    "fields": _array("[('a', '<f8', (1000000, 1000000))]", "(1,)"),
    "many dimensions": _array("'<i4'", f"({'1,' * 20})"),
    "a truth value": _array("'<i4'", "(True,)"),
    "a long header": b"\x93NUMPY\x03\x00" + struct.pack("<I", 4_000_000_000),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(tmp_path: Path, name: str) -> None:
    good = save_plans(tmp_path / "good.npz", plan_table(noisy=False))
    with zipfile.ZipFile(good) as table, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for member in table.namelist():
            bad.writestr(member, ARRAYS[name] if member == "steps.npy" else table.read(member))
    read_plans(good)
    with pytest.raises(BundleError, match=r"steps\.npy|unusual \.npy header"):
        read_plans(tmp_path / "bad.npz")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def _png(width: int, height: int, more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(b"\0" * 4))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + more + pixels + _chunk(b"IEND", b"")


_ZEROS = zlib.compress(b"\0" * (64 << 20))
IMAGES = {
    "many pixels": _png(50_000, 50_000),
    "more pixels than a number": _png(2**31 - 1, 2**31 - 1),
    "a text that unpacks": _png(1, 1, _chunk(b"zTXt", b"a\0\0" + _ZEROS)),
    "a profile that unpacks": _png(1, 1, _chunk(b"iCCP", b"a\0\0" + _ZEROS)),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n%%EOF\n",
    "numbers": b"P6\n100000 100000\n255\n\0",
    "a web image": b"RIFF\x24\0\0\0WEBPVP8L\x18\0\0\0\x2f\xff\xff\xff\xff" + b"\0" * 40,
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "image").write_bytes(IMAGES[name])
    with pytest.raises(InputError, match="not an image that can be read"):
        read(tmp_path / "image")
