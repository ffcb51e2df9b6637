"""OpenVINO: loads ``openvino`` builds (IR), and ``onnx`` builds through its own reader."""

from __future__ import annotations

from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import numpy as np

from runtimes.backend import Backend, SessionOptions
from runtimes.manifest import Component
from runtimes.session import Array, Feeds, Session


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
        model = self._core.compile_model(str(entry), device, config)
        return OpenVinoSession(model, component)


class OpenVinoSession(Session):
    """A compiled model and a pool of its inference requests, one per calling thread."""

    def __init__(self, model: Any, component: Component) -> None:
        super().__init__(component.inputs, component.outputs)
        self._model = model
        # A port carries several names after a reshape: look each up in the port's set of names.
        self._ports = {
            name: next(i for i, port in enumerate(model.outputs) if name in port.get_names())
            for name in component.outputs
        }
        self._requests: SimpleQueue[Any] = SimpleQueue()

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        try:
            request = self._requests.get_nowait()
        except Empty:
            request = self._model.create_infer_request()
        request.infer(dict(feeds), share_inputs=True)
        # The request owns its output memory and reuses it at the next call: copy.
        outputs = {
            name: np.array(request.get_output_tensor(index).data)
            for name, index in self._ports.items()
        }
        self._requests.put(request)
        return outputs

    def _close(self) -> None:
        self._requests = SimpleQueue()
        self._model = None
