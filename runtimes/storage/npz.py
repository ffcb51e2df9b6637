"""Plain arrays in a .npz file: written the same way every time, read as if hostile.

A .npz is a zip of .npy members. `numpy.load` would do for files that we wrote, but a bundle
may come from anywhere: members are read one by one, their sizes are checked before anything
is unpacked, and object arrays (pickles) cannot be expressed at all.
"""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from latentc.runtimes.errors import BundleError
from latentc.runtimes.storage.files import open_regular, read_regular
from latentc.runtimes.storage.parsing import parser

# A zip member needs a date; a fixed one makes equal tables equal files.
_DATE = (1980, 1, 1, 0, 0, 0)
_MAX_BYTES = 64 << 20
LARGEST_GIVEN = 4 << 30  # bytes of arrays that a user gives, such as the latents of large images
_MAX_ZIP = 1 << 20  # more than the arrays' own bytes: headers and the directory
_MAX_HEADER = 512
_NUMBERS = "biuf"  # numpy's kinds
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([<>|=]\w{1,8})',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\(([0-9, ]*)\),?\s*\}\s*"
)
_MAGIC = b"\x93NUMPY\x01\x00"


def write_arrays(
    path: str | os.PathLike[str] | IO[bytes], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write `arrays` in the mapping's order. Equal content gives equal bytes.

    Arrays are stored little-endian and C-contiguous, in .npy version 1.0 members.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            data = io.BytesIO()
            np.save(data, little, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # the same bytes on Windows
            archive.writestr(info, data.getvalue(), compresslevel=9)


@parser(BundleError, "path", "a .npz file of plain arrays")
def read_arrays(
    path: str | os.PathLike[str],
    dtypes: Mapping[str, str] | None = None,
    *,
    max_bytes: int = _MAX_BYTES,
) -> dict[str, np.ndarray]:
    """Read exactly the members that `dtypes` names, each of exactly that dtype; without
    `dtypes`, every member, each an array of numbers.

    Returns read-only arrays. Raises `BundleError` for anything else: a missing file, no zip,
    a missing or additional member, another dtype or order, a member cut short, more than
    `max_bytes` unpacked.
    """
    label = Path(path).name
    with open_regular(path, max_bytes + _MAX_ZIP) as file, zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if dtypes is None:
            dtypes = dict.fromkeys((name.removesuffix(".npy") for name in members), "")
        expected = {f"{name}.npy" for name in dtypes}
        if set(members) != expected or len(archive.infolist()) != len(expected):
            missing = sorted(expected - set(members))
            extra = sorted(set(members) - expected)[:5]
            raise BundleError(f"{label}: missing arrays {missing}, unexpected {extra}")
        total = sum(info.file_size for info in members.values())
        if total > max_bytes:
            raise BundleError(f"{label}: unpacks to {total} bytes, the limit is {max_bytes}")
        return {
            name: _member(label, archive, members[f"{name}.npy"], dtype)
            for name, dtype in dtypes.items()
        }


def _member(
    label: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, dtype: str
) -> np.ndarray[Any, Any]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BundleError(f"{label}: {info.filename} is neither stored nor deflated")
    with archive.open(info) as member:
        # Bounded by the size that the directory declares; without it all is unpacked first.
        return _array(f"{label}: {info.filename}", member.read(info.file_size), dtype)


@parser(BundleError, "path", "a .npy file of a plain array")
def read_array(
    path: str | os.PathLike[str], *, max_bytes: int = _MAX_BYTES
) -> np.ndarray[Any, Any]:
    """Read a .npy file of version 1.0, an array of numbers in C order.

    Returns a read-only array. Raises `BundleError` for anything else: a missing file, another
    version or order, objects, a file that is cut short, or longer than `max_bytes`.
    """
    return _array(Path(path).name, read_regular(path, max_bytes), "")


def _array(label: str, content: bytes, dtype: str) -> np.ndarray[Any, Any]:
    """Return the array of a .npy file's content, of numbers where `dtype` is empty."""
    data = io.BytesIO(content)
    if data.read(8) != _MAGIC:
        raise BundleError(f"{label} is not a .npy of version 1.0")
    found, fortran, shape = _header(data)
    fits = found == np.dtype(dtype) if dtype else found.kind in _NUMBERS
    if not fits or found.hasobject or fortran:
        order = "Fortran" if fortran else "C"
        raise BundleError(
            f"{label} has dtype {found.str} in {order} order, "
            f"expected {dtype or 'numbers'} in C order: numpy.ascontiguousarray makes it"
        )
    payload = data.read()
    if len(payload) != math.prod(shape) * found.itemsize:
        raise BundleError(f"{label} has {len(payload)} bytes for the shape {shape}")
    return np.frombuffer(payload, dtype=found).reshape(shape)


def _header(data: io.BytesIO) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    length = int.from_bytes(data.read(2), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = _HEADER.fullmatch(data.read(length))
    if header is None:
        raise ValueError("an unusual .npy header")
    descr, fortran, shape = (group.decode("ascii") for group in header.groups())
    sizes = tuple(int(size) for size in shape.split(",") if size.strip())
    return np.dtype(descr), fortran == "True", sizes
