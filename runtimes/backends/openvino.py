"""OpenVINO: loads ``openvino`` builds (IR), and through its own reader ONNX graphs: ``onnx``
and ``tensorrt`` builds."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.model_cache import Facts, ModelCache
from latentc.runtimes.backends.openvino_nan import VERSION, keep_nan
from latentc.runtimes.backends.session import Feeds, Session, first_line
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.mapped import MappedFile

_LARGE = 64 << 20  # bytes of weights from which on it pays to give memory back
_OWN_CACHE = "CACHE_DIR"
_IMPORTS = "CPU"  # where a compiled graph can be read from memory that we map
_HEADER = 4096  # bytes; more than the line at a blob's beginning takes
_HINTS: Mapping[str, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
# Where weights are of 8 or 4 bits, it would round the activations of linear layers to 8 bits
# besides, and the image would be another one than on the other backends.
_EXACT: Mapping[str, str] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_NOTHING: Mapping[str, str] = {}
_OF_ALL = ("CACHE_DIR", "CACHE_MODE", "ENABLE_MMAP")  # options of OpenVINO itself
_EVERY = ("AUTO",)  # chooses among the others by itself; OpenVINO does not list it
_FIXED_ONLY = "NPU"  # its compiler takes no open dimensions, and computes in fp16 or int8


@dataclass(frozen=True)
class _Graph:
    """A graph, where it is to run, and with which of OpenVINO's settings."""

    entry: Path
    component: Component
    device: str
    options: SessionOptions
    config: Mapping[str, str]

    @property
    def weights(self) -> Path:
        return self.entry.with_suffix(".bin")


class OpenVinoBackend(Backend):
    """Devices are OpenVINO's (CPU, GPU, GPU.1, NPU …, AUTO). Computes in float32 unless told
    otherwise, on an NPU in what it has.

    OpenVINO's CPU plugin computes in bfloat16 by itself where the processor has it; the
    image then differs visibly from PyTorch's, so the precision is set here, always.
    """

    name: ClassVar[str] = "openvino"
    package: ClassVar[str] = "openvino"
    install: ClassVar[str] = "pip install 'latentc[openvino]'"
    targets: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "tensorrt")
    memory_per_weight: ClassVar[float] = 4.6
    entries: ClassVar[tuple[str, ...]] = (".xml", ".onnx")  # others are other frameworks'
    computes: ClassVar[tuple[str, ...]] = (*_HINTS, "auto")
    places: ClassVar[Mapping[str, int]] = {
        **{"w8a8": 20, "bf16": 21},
        **{"fp32": 30, "int8": 31, "fp16": 32, "int4": 33},
    }

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

    def option_names(self, device: str) -> Collection[str] | None:
        if device in _EVERY:
            return None  # of the devices that it chooses among
        access = self._core.get_property(device, "SUPPORTED_PROPERTIES")
        return {*_OF_ALL, *(name for name, allowed in access.items() if allowed != "RO")}

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        _refuse_open(component, device)
        graph = _Graph(entry, component, device, options, self._config(device, options))
        if options.cache is None or not options.key or _OWN_CACHE in graph.config:
            return self._compiled(graph)
        cache = ModelCache(options.cache / self.name)
        if device != _IMPORTS:
            return self._cached_by_itself(graph, cache)
        facts = self._facts(graph)
        blob = cache.find(facts)
        if blob is not None:
            try:
                return self._imported(graph, blob)
            except Exception as error:
                cache.discard(facts, first_line(error))
        return self._compiled_and_kept(graph, cache, facts)

    def _compiled(self, graph: _Graph, more: Mapping[str, str] = _NOTHING) -> Session:
        """Compile the graph, its weights mapped by us where they are large."""
        config, mapped = {**graph.config, **more}, None
        if graph.entry.suffix == ".xml" and _large(graph.weights):
            mapped = MappedFile(graph.weights)
        with mapped.releasing() if mapped else nullcontext():
            model, _ = self._read(graph, mapped)
            compiled = self._core.compile_model(model, graph.device, config)
        return OpenVinoSession(compiled, graph.component, mapped)

    def _read(self, graph: _Graph, mapped: MappedFile | None = None) -> tuple[Any, bool]:
        """Return the model, and whether it is another than the file's."""
        if mapped is None:
            model = self._core.read_model(graph.entry)
        else:
            weights = self._ov.Tensor(mapped.array, shared_memory=True)
            model = self._core.read_model(graph.entry.read_bytes(), weights)
        changed = keep_nan(self._ov, model) > 0
        if not graph.options.sizes:
            return model, changed
        return self._fixed(model, graph.component), True

    def _compiled_and_kept(self, graph: _Graph, cache: ModelCache, facts: Facts) -> Session:
        """Compile the graph, and let OpenVINO write it as it does so: its other way, to export a
        compiled model, holds two copies of the blob in memory."""
        size = sum(each.stat().st_size for each in graph.entry.parent.iterdir())
        with cache.scratch(size) as folder:
            if folder is not None:
                writing = {_OWN_CACHE: str(folder), "CACHE_MODE": "OPTIMIZE_SPEED"}
                with suppress(Exception):  # a graph that it refuses, it refuses below as well
                    session = self._compiled(graph, writing)
                    for made in folder.glob("*.blob"):
                        cache.keep(facts, made)
                    return session
        return self._compiled(graph)

    def _imported(self, graph: _Graph, blob: Path) -> Session:
        """Return the session of a compiled graph that `_compiled_and_kept` has written."""
        mapped, large = MappedFile(blob), _large(blob)
        # OpenVINO's cache puts one line of XML before what it exports.
        start = bytes(mapped.array[:_HEADER]).index(b"\n") + 1
        tensor = self._ov.Tensor(mapped.array[start:], shared_memory=True)
        with mapped.releasing() if large else nullcontext():
            model = self._core.import_model(tensor, graph.device, graph.config)
        return OpenVinoSession(model, graph.component, mapped, large)

    def _cached_by_itself(self, graph: _Graph, cache: ModelCache) -> Session:
        """Return the session of a device with a format of its own.

        Such devices keep graphs as they like: one folder for each graph.
        """
        with cache.scratch(0) as probe:
            if probe is None:
                return self._compiled(graph)
        cache.trim()
        config = {**graph.config, _OWN_CACHE: str(cache.folder / graph.options.key[:32])}
        model, changed = self._read(graph)
        # It finds its entries by the file's name, where nothing was done to the graph.
        compiled = self._core.compile_model(
            model if changed else str(graph.entry), graph.device, config
        )
        return OpenVinoSession(compiled, graph.component)

    def _facts(self, graph: _Graph) -> Facts:
        """Return all that a compiled graph depends on."""
        device, inputs = graph.device, graph.component.inputs
        return {
            "graph": graph.options.key,
            "rewrites": VERSION,
            "inputs": json.dumps({name: spec.shape for name, spec in inputs.items()}),
            "config": json.dumps(dict(sorted(graph.config.items()))),
            "OpenVINO": str(self._ov.__version__),
            "device": f"{device} {self._core.get_property(device, 'FULL_DEVICE_NAME')}",
            "abilities": str(self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")),
        }

    def _config(self, device: str, options: SessionOptions) -> dict[str, str]:
        config = {"PERFORMANCE_HINT": "LATENCY", **_EXACT}
        usual = "auto" if device.startswith(_FIXED_ONLY) else "fp32"
        compute = options.compute or usual
        if compute != "auto":
            config["INFERENCE_PRECISION_HINT"] = _HINTS[compute]
        if options.threads:
            config["INFERENCE_NUM_THREADS"] = str(options.threads)
        return config | dict(options.extra)

    def _fixed(self, model: Any, component: Component) -> Any:
        """Return the model with the shapes of `component`, whose open dimensions stay open."""
        shapes = {
            port: self._ov.PartialShape([dim if isinstance(dim, int) else -1 for dim in spec.shape])
            for name, spec in component.inputs.items()
            for port in model.inputs
            if name in port.get_names()
        }
        model.reshape(shapes)
        return model


def _large(weights: Path) -> bool:
    return weights.is_file() and weights.stat().st_size >= _LARGE


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

    `mapped` are the model's weights where they lie in memory that we map. `spare`: give that
    memory back. OpenVINO copies weights into its own layout, part of them when it first sees a
    shape, and keeps the originals mapped: a UNet of 860 M float32 parameters then takes 3.5 GiB
    instead of 6.7.
    """

    def __init__(
        self,
        model: Any,
        component: Component,
        mapped: MappedFile | None = None,
        spare: bool = True,
    ) -> None:
        super().__init__(component.inputs, component.outputs)
        self._model = model
        # A port carries several names after a reshape: look each up in the port's set of names.
        self._ports = {
            name: index
            for index, port in enumerate(model.outputs)
            for name in component.outputs
            if name in port.get_names()
        }
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._spare = spare
        self._mapped = mapped  # last: freed after all that may look at it

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        try:
            request = self._requests.get_nowait()
        except Empty:
            request = self._model.create_infer_request()
        with self._sparing(feeds):
            self._infer(request, feeds)
        # The request owns its output memory and reuses it at the next call: copy.
        outputs = {
            name: np.array(request.get_output_tensor(index).data)
            for name, index in self._ports.items()
        }
        self._requests.put(request)
        return outputs

    def _infer(self, request: Any, feeds: Feeds) -> None:
        """Run a request. It is begun, and then waited for, because `cancel` does nothing to a
        request that has not begun."""
        try:
            request.start_async(dict(feeds), share_inputs=True)
            with self._abortable(request.cancel):
                request.wait()
        except BaseException:
            request.cancel()  # Ctrl-C may have come in between: nothing may be freed beneath it
            with suppress(Exception):
                request.wait()
            raise

    def _sparing(self, feeds: Feeds) -> AbstractContextManager[None]:
        """Give the originals' memory back while weights are copied for a new shape."""
        shapes = tuple(feeds[name].shape for name in self.inputs)
        if self._mapped is None or not self._spare or shapes in self._seen:
            return nullcontext()
        self._seen.add(shapes)
        return self._mapped.releasing()

    def _close(self) -> None:
        self._requests = SimpleQueue()
        self._model = None
        self._mapped = None
