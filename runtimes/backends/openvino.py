"""OpenVINO: loads ``openvino`` builds (IR), and through its own reader ONNX graphs: ``onnx``
and ``tensorrt`` builds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import numpy as np

from runtimes.backend import Backend, SessionOptions
from runtimes.errors import InputError
from runtimes.manifest import Component
from runtimes.mapped import MappedFile
from runtimes.session import Array, Feeds, Session

_LARGE = 64 << 20  # bytes of weights from which on it pays to give memory back
_HINTS: Mapping[str, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
# Where weights are of 8 or 4 bits, it would round the activations of linear layers to 8 bits
# besides, and the picture would be another one than on the other backends.
_EXACT: Mapping[str, str] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_EVERY = ("AUTO",)  # chooses among the others by itself; OpenVINO does not list it
_FIXED_ONLY = "NPU"  # its compiler takes no open dimensions, and computes in fp16 or int8


class OpenVinoBackend(Backend):
    """Devices are OpenVINO's (CPU, GPU, GPU.1, NPU …, AUTO). Computes in float32 unless told
    otherwise, on an NPU in what it has.

    OpenVINO's CPU plugin computes in bfloat16 by itself where the processor has it; the
    picture then differs visibly from PyTorch's, so the precision is set here, always.
    """

    name: ClassVar[str] = "openvino"
    package: ClassVar[str] = "openvino"
    install: ClassVar[str] = "pip install 'latentc[openvino]'"
    targets: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "tensorrt")
    computes: ClassVar[tuple[str, ...]] = (*_HINTS, "auto")

    def __init__(self) -> None:
        import openvino

        self._ov = openvino
        self._core = openvino.Core()

    def version(self) -> str:
        return str(self._ov.__version__).split("-")[0]

    def devices(self) -> list[str]:
        found = [str(device) for device in self._core.available_devices]
        # "GPU" is OpenVINO's other name for "GPU.0", which it lists where there are several.
        short = [each[:-2] for each in found if each.endswith(".0")]
        return [*found, *(each for each in short if each not in found), *_EVERY]

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        _refuse_open(component, device)
        config = self._config(device, options)
        weights = entry.with_suffix(".bin")
        large = entry.suffix == ".xml" and weights.is_file() and weights.stat().st_size >= _LARGE
        # A cache of compiled models finds its entries by the file's name: it needs the path.
        if not large or "CACHE_DIR" in config:
            model: Any = str(entry)
            if options.sizes:
                model = self._fixed(self._core.read_model(model), component)
            return OpenVinoSession(self._core.compile_model(model, device, config), component)
        mapped = MappedFile(weights)
        tensor = self._ov.Tensor(mapped.array, shared_memory=True)
        with mapped.releasing():
            read = self._core.read_model(entry.read_bytes(), tensor)
            if options.sizes:
                read = self._fixed(read, component)
            model = self._core.compile_model(read, device, config)
        return OpenVinoSession(model, component, mapped)

    def _config(self, device: str, options: SessionOptions) -> dict[str, str]:
        config = {"PERFORMANCE_HINT": "LATENCY", **_EXACT}
        usual = "auto" if device.startswith(_FIXED_ONLY) else "fp32"
        compute = options.compute or usual
        if compute != "auto":
            config["INFERENCE_PRECISION_HINT"] = _HINTS[compute]
        if options.threads:
            config["INFERENCE_NUM_THREADS"] = str(options.threads)
        if options.cache is not None:
            config["CACHE_DIR"] = str(options.cache)
        return config | dict(options.extra)

    def _fixed(self, model: Any, component: Component) -> Any:
        """The model with the shapes of `component`, whose open dimensions stay open."""
        shapes = {
            port: self._ov.PartialShape([dim if isinstance(dim, int) else -1 for dim in spec.shape])
            for name, spec in component.inputs.items()
            for port in model.inputs
            if name in port.get_names()
        }
        model.reshape(shapes)
        return model


def _refuse_open(component: Component, device: str) -> None:
    """Raises InputError where a device that needs fixed shapes gets an open one."""
    open_ones = {d for spec in component.inputs.values() for d in spec.shape if isinstance(d, str)}
    if device.startswith(_FIXED_ONLY) and open_ones:
        raise InputError(
            f"{device} runs fixed sizes only, and {component.name!r} has {', '.join(open_ones)} "
            "open: load it for one size (--static, with --height and --width)"
        )


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
