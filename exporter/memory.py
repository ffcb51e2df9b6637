"""Giving memory back between the stages of an export."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WEIGHTS = (".safetensors", ".bin")
_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20  # bytes


def keep_nothing() -> None:
    """Have the C library give every large block back as soon as it is freed. By itself it learns
    from use that blocks of up to 32 MiB had better be kept: gigabytes of holes, in the end."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGE)


@contextmanager
def looking_at_what_is_new() -> Iterator[None]:
    """Inside, Python's collector of cycles leaves alone what was there before: the libraries are
    millions of objects, which take half a second at each look, a quarter of a small export. What
    is left over in the end is collected before they are looked at again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def free_memory() -> None:
    """Give freed memory back to the system: two copies of a large model do not fit."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def release_weights(modules: Iterable[torch.nn.Module], source: Path) -> None:
    """Free the weights of `modules`, which were loaded from the folder `source` and which
    nobody will use again, whoever still refers to them.

    onnxscript's rewrite rules remember what they matched last, and tensors with it, until the
    process ends. One tensor is enough to keep the whole mapped file that it is a part of.
    """
    import torch

    from latentc.exporter.stored_weights import Stored

    for module in modules:
        for parameter in module.parameters():
            if isinstance(parameter, Stored):
                parameter.stored = torch.empty(0)
            else:
                parameter.data = torch.empty(0)
    gc.collect()
    _forget_pages(path for path in source.rglob("*") if path.suffix in _WEIGHTS)


def _forget_pages(files: Iterable[Path]) -> None:
    """Drop what is in memory of mapped files. Who reads them again, reads from the disk."""
    if sys.platform != "linux":
        return
    names = {str(path.resolve()) for path in files}
    libc = ctypes.CDLL("libc.so.6")
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name in names:
            begin, end = (int(address, 16) for address in span.split("-"))
            size = ctypes.c_size_t(end - begin)
            libc.madvise(ctypes.c_void_p(begin), size, mmap.MADV_DONTNEED)
