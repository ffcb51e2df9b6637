# ruff: noqa: N802, N815 (the names are those of NVIDIA's modules)
"""Stand-ins for `tensorrt` and `cuda.bindings.runtime` that check what they are given.

They keep the rules that NVIDIA documents: device memory is addressed by number and must be
allocated; shapes lie within the optimisation profile; every tensor has an address before a run; no
work goes into stream 0; recorded work runs when its graph is launched, not before; and each CUDA
call returns a tuple that begins with an error code. A "built engine" names its ONNX file, and
running it runs that file in ONNX Runtime. So the tests that use this show that our calls are the
intended ones in an order that the documentation allows. They say nothing about TensorRT itself.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorNoDevice = 100


@dataclass
class Machine:
    """A machine holds what there is, what has been allocated and everything that was called."""

    version: str = "10.13.0"
    gpus: list[tuple[str, int, int]] = field(default_factory=lambda: [("NVIDIA L4", 8, 9)])
    driver: int = 13000
    memory: dict[int, bytearray] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    built: list[dict[str, Any]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None
    recordable: bool = True
    device: int = 0
    next_address: int = 0x1000

    def count(self, name: str) -> int:
        return sum(call.split()[0] == name for call in self.calls)


def cuda_runtime(machine: Machine) -> Any:
    """The functions of cuda.bindings.runtime that we use."""
    runtime: Any = ModuleType("cuda.bindings.runtime")
    kinds = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    runtime.cudaMemcpyKind = kinds
    runtime.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    ok = Error.cudaSuccess

    def function(body: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            machine.calls.append(body.__name__)
            return body(*arguments)

        setattr(runtime, body.__name__, call)
        return call

    @function
    def cudaGetDeviceCount() -> Any:
        return (ok, len(machine.gpus)) if machine.gpus else (Error.cudaErrorNoDevice, 0)

    @function
    def cudaGetDeviceProperties(index: int) -> Any:
        name, major, minor = machine.gpus[index]
        padded = name.encode() + b"\0" * 8
        return ok, SimpleNamespace(name=padded, major=major, minor=minor)

    @function
    def cudaDriverGetVersion() -> Any:
        return ok, machine.driver

    @function
    def cudaSetDevice(index: int) -> Any:
        machine.device = index
        return (ok,)

    @function
    def cudaMalloc(size: int) -> Any:
        assert size > 0
        address = machine.next_address
        machine.next_address += size + 0x1000
        machine.memory[address] = bytearray(size)
        return ok, address

    @function
    def cudaFree(address: int) -> Any:
        if machine.memory.pop(address, None) is None:
            return (Error.cudaErrorInvalidValue,)
        return (ok,)

    @function
    def cudaStreamCreate() -> Any:
        return ok, 7

    @function
    def cudaStreamDestroy(stream: int) -> Any:
        return (ok,)

    @function
    def cudaStreamSynchronize(stream: int) -> Any:
        assert machine.recording is None, "no waiting while recording"
        return (ok,)

    @function
    def cudaMemcpyAsync(to: int, source: int, size: int, kind: int, stream: int) -> Any:
        assert stream == 7
        assert machine.recording is None
        if kind == kinds.cudaMemcpyHostToDevice:
            machine.memory[to][:size] = ctypes.string_at(source, size)
        else:
            held = bytes(machine.memory[source][:size])
            assert len(held) == size
            ctypes.memmove(to, held, size)
        return (ok,)

    @function
    def cudaStreamBeginCapture(stream: int, mode: int) -> Any:
        machine.recording = []
        return (ok,)

    @function
    def cudaStreamEndCapture(stream: int) -> Any:
        recorded, machine.recording = machine.recording, None
        return (ok, recorded) if machine.recordable else (Error.cudaErrorInvalidValue, None)

    @function
    def cudaGraphInstantiate(graph: Any, flags: int) -> Any:
        return ok, list(graph)

    @function
    def cudaGraphDestroy(graph: Any) -> Any:
        return (ok,)

    @function
    def cudaGraphExecDestroy(graph: Any) -> Any:
        graph.clear()
        return (ok,)

    @function
    def cudaGraphLaunch(graph: Any, stream: int) -> Any:
        assert graph, "a destroyed graph"
        for work in graph:
            work()
        return (ok,)

    return runtime


def tensorrt(machine: Machine) -> Any:
    """The part of TensorRT's Python module that we use."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = machine.version
    trt.NetworkDefinitionCreationFlag = IntEnum(
        "NetworkDefinitionCreationFlag", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    )
    trt.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    trt.BuilderFlag = SimpleNamespace(TF32="tf32")
    trt.nptype = lambda dtype: np.dtype(dtype).type

    class ILogger:
        Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})

        def __init__(self) -> None:
            self.ready = True

    class Logger(ILogger):
        ERROR = ILogger.Severity.ERROR

        def __init__(self, least: Any) -> None:
            super().__init__()

    trt.ILogger, trt.Logger = ILogger, Logger

    class Builder:
        def __init__(self, log: Any) -> None:
            assert log.ready, "ILogger.__init__ was not called"
            self.log = log

        def create_network(self, flags: int) -> Any:
            major = int(trt.__version__.split(".")[0])
            assert flags == (0 if major >= 11 else 1 << 1), "strongly typed in 10, always in 11"
            return SimpleNamespace(path=None, inputs={})

        def create_builder_config(self) -> Any:
            return Config()

        def create_optimization_profile(self) -> Any:
            return Profile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            dynamic = {n for n, shape in network.inputs.items() if -1 in shape}
            if dynamic - set(config.shapes):
                self.log.log(ILogger.Severity.ERROR, f"no profile for {sorted(dynamic)}")
                return None
            plan = {
                "path": network.path,
                "shapes": config.shapes,
                "version": trt.__version__,
                "gpu": machine.gpus[machine.device][0],
            }
            machine.built.append(plan | {"settings": config.settings})
            config.cache.blob += b"+"
            return memoryview(json.dumps(plan).encode())

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
            assert len(low) == len(usual) == len(high)
            assert all(0 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True))
            self.shapes[name] = [list(low), list(usual), list(high)]

    class Config:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}
            self.settings: dict[str, Any] = {"tf32": True}
            self.cache: Any = None

        def set_memory_pool_limit(self, pool: str, size: int) -> None:
            self.settings[pool] = size

        def set_flag(self, flag: str) -> None:
            self.settings[flag] = True

        def clear_flag(self, flag: str) -> None:
            self.settings[flag] = False

        def add_optimization_profile(self, profile: Profile) -> int:
            self.shapes = profile.shapes
            return 0

        def create_timing_cache(self, blob: bytes) -> Any:
            made = SimpleNamespace(blob=blob)
            made.serialize = lambda: made.blob
            return made

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            if b"other" in cache.blob:
                return False
            self.cache = cache
            return True

    class OnnxParser:
        def __init__(self, network: Any, log: Any) -> None:
            self.network, self.problems = network, [""]

        def parse_from_file(self, path: str) -> bool:
            assert isinstance(path, str)
            if "broken" in Path(path).read_bytes()[:6].decode("latin1"):
                self.problems = ["no importer for the operator Frobnicate"]
                return False
            self.network.path = path
            self.network.inputs = {n: shape for n, (_, shape) in _tensors(path)[0].items()}
            return True

        @property
        def num_errors(self) -> int:
            return len(self.problems)

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(desc=lambda: self.problems[index])

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            made = json.loads(plan)
            same = made["version"] == trt.__version__
            return Engine(machine, made) if same else None

    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    return trt


class Engine:
    def __init__(self, machine: Machine, plan: dict[str, Any]) -> None:
        self.machine, self.plan = machine, plan
        self.inputs, self.outputs = _tensors(plan["path"])
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return (self.inputs | self.outputs)[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.inputs | self.outputs)[name][1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        assert name in self.inputs
        assert profile == 0
        return self.plan["shapes"][name]

    def create_execution_context(self) -> Any:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        import onnxruntime

        self.engine, self.machine = engine, engine.machine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.known: dict[str, dict[str, tuple[int, ...]]] = {}
        self.run = onnxruntime.InferenceSession(
            engine.plan["path"], providers=["CPUExecutionProvider"]
        ).run

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        self.machine.calls.append(f"shape {name}")
        low, _, high = self.engine.plan["shapes"].get(name, [self.engine.inputs[name][1]] * 3)
        fits = all(a <= x <= b for a, x, b in zip(low, shape, high, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return an input's shape, or that of an output: whatever the graph makes of zeros of these
        shapes.
        """
        if name in self.shapes:
            return self.shapes[name]
        state = str(sorted(self.shapes.items()))
        if state not in self.known:
            zeros = {n: np.zeros(self.shapes[n], dtype) for n, (dtype, _) in self.inputs()}
            self.known[state] = {n: value.shape for n, value in self._result(zeros).items()}
        return self.known[state][name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address in self.machine.memory

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int)
        assert stream_handle != 0
        if self.infer_shapes() or set(self.addresses) != set(self.engine.names):
            return False
        if self.machine.recording is not None:
            self.machine.recording.append(self._work)
        else:
            self.machine.calls.append("enqueue")
            self._work()
        return True

    def _work(self) -> None:
        feeds = {name: self._read(name, dtype) for name, (dtype, _) in self.inputs()}
        for name, value in self._result(feeds).items():
            held = self.machine.memory[self.addresses[name]]
            assert len(held) >= value.nbytes
            held[: value.nbytes] = value.tobytes()

    def inputs(self) -> Any:
        return self.engine.inputs.items()

    def _read(self, name: str, dtype: Any) -> np.ndarray:
        held = self.machine.memory[self.addresses[name]]
        size = int(np.prod(self.shapes[name])) * np.dtype(dtype).itemsize
        return np.frombuffer(held[:size], dtype).reshape(self.shapes[name])

    def _result(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = list(self.engine.outputs)
        return dict(zip(names, self.run(names, feeds), strict=True))


def _tensors(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name → dtype and shape of a graph's inputs and of its outputs; -1 is open."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph

    def described(values: Any) -> dict[str, Any]:
        return {
            value.name: (
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
                tuple(
                    -1 if dim.dim_param else dim.dim_value
                    for dim in value.type.tensor_type.shape.dim
                ),
            )
            for value in values
        }

    return described(graph.input), described(graph.output)


@contextmanager
def installed(machine: Machine) -> Iterator[Machine]:
    """While this lasts, `import tensorrt` and `cuda.bindings.runtime` give the stand-ins."""
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = cuda_runtime(machine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", tensorrt(machine))
        patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        patch.setitem(sys.modules, "cuda.bindings", bindings)
        patch.setattr("latentc.runtimes.backends.tensorrt.cuda._DRIVER", Path("/nowhere"))
        yield machine
