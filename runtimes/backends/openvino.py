"""OpenVINO: loads ``openvino`` builds (IR), and ``onnx`` builds through its own reader."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import numpy as np

from runtimes.backend import Backend, SessionOptions
from runtimes.manifest import Component
from runtimes.mapped import MappedFile
from runtimes.session import Array, Feeds, Session

_LARGE = 64 << 20  # bytes of weights from which on it pays to give memory back


class OpenVinoBackend(Backend):
    """Devices are OpenVINO's (CPU, GPU, NPU). Computes in float32 unless told otherwise.

    OpenVINO's CPU plugin computes in bfloat16 by itself where the processor has it; the
    picture then differs visibly from PyTorch's, so the precision is set here, always.
    """

    name: ClassVar[str] = "openvino"
    package: ClassVar[str] = "openvino"
    install: ClassVar[str] = "pip install 'latentc[openvino]'"
    targets: ClassVar[tuple[str, ...]] = ("openvino", "onnx")

    def __init__(self) -> None:
        import openvino

        self._ov = openvino
        self._core = openvino.Core()

    def version(self) -> str:
        return str(self._ov.__version__).split("-")[0]

    def devices(self) -> list[str]:
        return [str(device) for device in self._core.available_devices]

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if options.threads:
            config["INFERENCE_NUM_THREADS"] = str(options.threads)
        if options.cache is not None:
            config["CACHE_DIR"] = str(options.cache)
        config.update(options.extra)
        weights = entry.with_suffix(".bin")
        large = entry.suffix == ".xml" and weights.is_file() and weights.stat().st_size >= _LARGE
        # A cache of compiled models finds its entries by the file's name: it needs the path.
        if not large or "CACHE_DIR" in config:
            return OpenVinoSession(self._core.compile_model(str(entry), device, config), component)
        mapped = MappedFile(weights)
        tensor = self._ov.Tensor(mapped.array, shared_memory=True)
        with mapped.releasing():
            read = self._core.read_model(entry.read_bytes(), tensor)
            model = self._core.compile_model(read, device, config)
        return OpenVinoSession(model, component, mapped)


class OpenVinoSession(Session):
    """A compiled model and a pool of its inference requests, one per calling thread.

    `mapped` are the model's weights where this session gives their memory back: OpenVINO
    copies them into its own layout, part of them when it first sees a shape, and keeps the
    originals mapped. A UNet of 860 M float32 parameters then takes 3.5 GiB instead of 6.7.
    """

    def __init__(self, model: Any, component: Component, mapped: MappedFile | None = None) -> None:
        super().__init__(component.inputs, component.outputs)
        self._model = model
        # A port carries several names after a reshape: look each up in the port's set of names.
        self._ports = {
            name: next(i for i, port in enumerate(model.outputs) if name in port.get_names())
            for name in component.outputs
        }
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._mapped = mapped  # last: freed after all that may look at it

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        try:
            request = self._requests.get_nowait()
        except Empty:
            request = self._model.create_infer_request()
        with self._sparing(feeds):
            request.infer(dict(feeds), share_inputs=True)
        # The request owns its output memory and reuses it at the next call: copy.
        outputs = {
            name: np.array(request.get_output_tensor(index).data)
            for name, index in self._ports.items()
        }
        self._requests.put(request)
        return outputs

    def _sparing(self, feeds: Feeds) -> AbstractContextManager[None]:
        """Give the originals' memory back while weights are copied for a new shape."""
        shapes = tuple(feeds[name].shape for name in self.inputs)
        if self._mapped is None or shapes in self._seen:
            return nullcontext()
        self._seen.add(shapes)
        return self._mapped.releasing()

    def _close(self) -> None:
        self._requests = SimpleQueue()
        self._model = None
        self._mapped = None
