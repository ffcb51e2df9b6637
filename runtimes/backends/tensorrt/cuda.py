"""The few calls of the CUDA runtime that an adapter with raw device memory needs.

Signatures: NVIDIA's cuda-python, module cuda.bindings.runtime (12.6 and newer): every function
returns a tuple that begins with an error code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.errors import BackendError

_DRIVER = Path("/proc/driver/nvidia/version")  # Linux: the release, besides the CUDA version


@dataclass(frozen=True)
class Gpu:
    """One GPU: its number, name and compute capability such as ``"8.9"``."""

    index: int
    name: str
    capability: str


class Buffer:
    """Device memory that grows and never shrinks. `address` is 0 while it is empty."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 0
        self.address = 0

    def reserve(self, size: int) -> bool:
        """Make room for `size` bytes; True if the address has changed."""
        if size <= self._size:
            return False
        self.free()
        self.address = int(self._cuda.call("cudaMalloc", max(size, 1)))
        self._size = size
        return True

    def free(self) -> None:
        """Give the memory back. Twice is harmless."""
        if self.address:
            self._cuda.call("cudaFree", self.address)
        self.address = self._size = 0


class Cuda:
    """The CUDA runtime. Making one imports cuda.bindings (ImportError if it is missing)."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime: Any = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; returns its one value, or None.

        Raises:
            BackendError: CUDA's own name for what went wrong.
        """
        code, *values = getattr(self._runtime, name)(*arguments)
        if int(code) != 0:
            raise BackendError(f"{name} failed: {getattr(code, 'name', code)}")
        return values[0] if values else None

    def gpus(self) -> list[Gpu]:
        """Return the GPUs here; none where there is no driver."""
        try:
            count = int(self.call("cudaGetDeviceCount"))
        except BackendError:
            return []
        return [self._gpu(index) for index in range(count)]

    def driver(self) -> str:
        """Return the driver's release, where the system tells it, and the CUDA version it has."""
        number = int(self.call("cudaDriverGetVersion"))
        version = f"CUDA {number // 1000}.{number % 1000 // 10}"
        try:
            words = _DRIVER.read_text("utf-8").splitlines()[0].split()
        except (OSError, IndexError):
            return version
        release = next((word for word in words if word[:1].isdigit() and "." in word), "")
        return f"{release} ({version})" if release else version

    def use(self, index: int) -> None:
        """Make a GPU the calling thread's current one."""
        self.call("cudaSetDevice", index)

    def stream(self) -> Any:
        """Return a stream of its own (0 would wait for everything else)."""
        return self.call("cudaStreamCreate")

    def upload(self, address: int, array: Array, stream: Any) -> None:
        """Copy a contiguous array to the device, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, address: int, shape: tuple[int, ...], dtype: Any, stream: Any) -> Array:
        """Return a new array that holds the device's values once the stream has been waited for."""
        array = np.empty(shape, dtype)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)
        return array

    def wait(self, stream: Any) -> None:
        """Wait until everything in the stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def capture(self, stream: Any, work: Callable[[], bool]) -> Any | None:
        """Record what `work` puts into the stream as an executable graph.

        Returns None where it cannot be recorded; nothing has run then.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)
        graph = None
        try:
            recorded = work()
        except Exception:
            recorded = False
        try:
            graph = self.call("cudaStreamEndCapture", stream)
            return self.call("cudaGraphInstantiate", graph, 0) if recorded else None
        except BackendError:
            return None
        finally:
            if graph is not None:
                self.call("cudaGraphDestroy", graph)

    def _gpu(self, index: int) -> Gpu:
        found = self.call("cudaGetDeviceProperties", index)
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        return Gpu(index, name.strip("\0 "), f"{found.major}.{found.minor}")


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Return the bytes of an array of this shape and dtype."""
    return math.prod(shape) * int(np.dtype(dtype).itemsize)
