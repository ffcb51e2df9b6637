"""TensorRT 10 and 11: loads ``tensorrt`` builds, from engines that were built on this machine.

The calls are those of NVIDIA's Python API, which are the same in both versions for what is used
here (its stubs for 10.13, the bindings' source of 11.1): set_input_shape, set_tensor_address,
infer_shapes, execute_async_v3.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import msgspec
import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, BuildRequest, Built, SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.backends.tensorrt import engine_store as store
from latentc.runtimes.backends.tensorrt.cuda import Buffer, Cuda, Gpu, nbytes
from latentc.runtimes.bundle.recipe import RECIPE, Recipe, check_profile
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import BackendError, DeviceUnavailable
from latentc.runtimes.storage.files import read_regular

_OLDEST = 10


class TensorRtBackend(Backend):
    """Devices are the NVIDIA GPUs: ``cuda`` is the first, ``cuda:1`` the second."""

    name: ClassVar[str] = "tensorrt"
    package: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = "pip install 'latentc[tensorrt]'"  # from NVIDIA's package index
    targets: ClassVar[tuple[str, ...]] = ("tensorrt",)
    entries: ClassVar[tuple[str, ...]] = (".onnx",)
    builds: ClassVar[bool] = True
    places: ClassVar[Mapping[str, int]] = {"w8a8": 0, "fp16": 1, "bf16": 2, "int8": 3, "fp32": 4}
    # The device is a setting of each thread, and engines are read into one GPU's memory.
    loads_in_parallel: ClassVar[bool] = False

    def __init__(self) -> None:
        try:
            import tensorrt
        except OSError as error:  # the bindings are here, and their libraries are not
            raise ImportError(str(error)) from error
        if int(str(tensorrt.__version__).split(".")[0]) < _OLDEST:
            raise ImportError(f"TensorRT {tensorrt.__version__} is too old, 10 or 11 is needed")
        self._trt = tensorrt
        self._cuda = Cuda()

    @classmethod
    def references(cls, entry: Path) -> Iterable[Path]:
        return [*super().references(entry), entry.with_name(RECIPE)]

    def version(self) -> str:
        return str(self._trt.__version__)

    def devices(self) -> list[str]:
        found = [f"cuda:{gpu.index}" for gpu in self._cuda.gpus()]
        return ["cuda", *found] if found else []

    def build(
        self,
        entry: Path,
        component: Component,
        device: str | None = None,
        options: SessionOptions | None = None,
        request: BuildRequest | None = None,
    ) -> Built:
        from latentc.runtimes.backends.tensorrt import builder as tensorrt_builder

        options, request = options or SessionOptions(), request or BuildRequest()
        gpu = self._gpu(self.device(device))
        recipe = _changed(Recipe.load(entry.with_name(RECIPE)), request)
        folder, facts = store.engines_folder(options.cache), self._facts(gpu, entry, options)
        there = store.exact(folder, component.name, facts, recipe)
        if there and not request.force:
            return Built(there.path, 0.0)
        reason = "" if there else store.why_not(folder, component.name, facts, entry)
        self._cuda.use(gpu.index)
        start = perf_counter()
        timing = store.timing_file(folder, facts)
        plan = tensorrt_builder.build(self._trt, entry, recipe, recipe.shapes(component), timing)
        spent = perf_counter() - start
        made = store.save(folder, component.name, facts, recipe, entry, plan, spent)
        return Built(made.path, spent, "asked to" if there else reason)

    def option_names(self, device: str) -> Collection[str] | None:
        return ()

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        gpu = self._gpu(device)
        folder, facts = store.engines_folder(options.cache), self._facts(gpu, entry, options)
        engine = store.usable(folder, component.name, facts)
        if engine is None:
            raise BackendError(self._missing(folder, component.name, facts, entry))
        self._cuda.use(gpu.index)
        runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        loaded = runtime.deserialize_cuda_engine(read_regular(engine.path, engine.record.size))
        if loaded is None:
            raise BackendError(
                f"TensorRT {self.version()} does not take the engine {engine.path}; build it "
                f"again: {_command(entry)} --force"
            )
        return TensorRtSession(self._trt, self._cuda, gpu, loaded, component)

    def _gpu(self, device: str) -> Gpu:
        index = int(device.partition(":")[2] or 0)
        for gpu in self._cuda.gpus():
            if gpu.index == index:
                return gpu
        raise DeviceUnavailable(self.name, device, self.devices())

    def _facts(self, gpu: Gpu, entry: Path, options: SessionOptions) -> dict[str, str]:
        """Return all that an engine depends on besides its recipe."""
        return {
            "TensorRT": self.version(),
            "GPU": gpu.name,
            "compute capability": gpu.capability,
            "driver": self._cuda.driver(),
            "graph": options.key or sha256(entry),
        }

    def _missing(self, folder: Path, component: str, facts: store.Facts, entry: Path) -> str:
        here = f"{facts['GPU']} with TensorRT {facts['TensorRT']}"
        reason = store.why_not(folder, component, facts, entry)
        found = f"the one in {folder} does not fit: {reason}" if reason else f"none in {folder}"
        return f"no engine of {component!r} for {here}, {found}; build it: {_command(entry)}"


class TensorRtSession(Session):
    """One execution context, one stream, and device buffers that stay.

    From the second call with the same shapes and addresses on, a CUDA graph is replayed. Calls
    from several threads take turns: a context runs one at a time.
    """

    def __init__(self, trt: Any, cuda: Cuda, gpu: Gpu, engine: Any, component: Component) -> None:
        super().__init__(component.inputs, component.outputs)
        self._cuda, self._gpu, self._engine = cuda, gpu, engine
        self._component = component.name
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if set(names) != {*component.inputs, *component.outputs}:
            raise BackendError(f"the engine of {component.name!r} has other tensors: {names}")
        self._types = {name: trt.nptype(engine.get_tensor_dtype(name)) for name in names}
        self._profile = {name: _bounds(engine, name) for name in component.inputs}
        self._context = engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"no memory on {gpu.name} to run {component.name!r}")
        self._stream = cuda.stream()
        self._buffers = {name: Buffer(cuda) for name in names}
        self._lock = threading.Lock()
        self._state: Any = None  # the shapes and addresses that the context is set to
        self._graph: Any = None
        self._recordable = True

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._run_placed(feeds, {})

    def _place(self, constants: Feeds) -> Any:
        with self._lock:
            self._cuda.use(self._gpu.index)
            placed: dict[str, tuple[Buffer, tuple[int, ...]]] = {}
            for name, value in constants.items():
                placed[name] = Buffer(self._cuda), value.shape
                placed[name][0].reserve(value.nbytes)
                self._cuda.upload(placed[name][0].address, value, self._stream)
            self._cuda.wait(self._stream)
        return placed

    def _release(self, placed: Any) -> None:
        with self._lock:
            self._forget()
            for buffer, _ in placed.values():
                buffer.free()

    def _run_placed(self, feeds: Feeds, placed: Any) -> dict[str, Array]:
        shapes = {name: value.shape for name, value in feeds.items()}
        shapes |= {name: shape for name, (_, shape) in placed.items()}
        check_profile(self._component, shapes, self._profile)
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        with self._lock:
            self._cuda.use(self._gpu.index)
            for name, value in arrays.items():
                self._buffers[name].reserve(value.nbytes)
                self._cuda.upload(self._buffers[name].address, value, self._stream)
            addresses = {name: self._buffers[name].address for name in arrays}
            addresses |= {name: buffer.address for name, (buffer, _) in placed.items()}
            self._execute(shapes, addresses)
            made = {name: self._download(name) for name in self.outputs}
            self._cuda.wait(self._stream)
        return made

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        state = (sorted(shapes.items()), sorted(addresses.items()))
        if state != self._state:
            self._forget()
            self._set(shapes, addresses)
            self._enqueue()  # TensorRT wants one call after a change before one is recorded
            self._state = state
            return
        if self._graph is None and self._recordable:
            self._graph = self._cuda.capture(
                self._stream, lambda: bool(self._context.execute_async_v3(int(self._stream)))
            )
            self._recordable = self._graph is not None
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.call("cudaGraphLaunch", self._graph, self._stream)

    def _set(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"TensorRT refuses the shape {list(shape)} of input {name!r}")
        unknown = self._context.infer_shapes()
        if unknown:
            raise BackendError(f"TensorRT cannot tell the shapes of {', '.join(unknown)}")
        for name in self.outputs:
            buffer = self._buffers[name]
            buffer.reserve(nbytes(self._shape(name), self._types[name]))
            addresses = addresses | {name: buffer.address}
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise BackendError(f"TensorRT refuses the memory of {name!r}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError(f"TensorRT failed to run {self._component!r}")

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(dim) for dim in self._context.get_tensor_shape(name))

    def _download(self, name: str) -> Array:
        address = self._buffers[name].address
        return self._cuda.download(address, self._shape(name), self._types[name], self._stream)

    def _forget(self) -> None:
        """Drop the graph and the state that it was recorded in."""
        self._cuda.wait(self._stream)
        if self._graph is not None:
            self._cuda.call("cudaGraphExecDestroy", self._graph)
        self._graph = self._state = None

    def _close(self) -> None:
        with self._lock:
            self._cuda.use(self._gpu.index)
            self._forget()
            self._context = self._engine = None
            for buffer in self._buffers.values():
                buffer.free()
            self._cuda.call("cudaStreamDestroy", self._stream)


def _bounds(engine: Any, name: str) -> Any:
    """Return the smallest, usual and largest shape of an input, from the engine itself."""
    fixed = tuple(int(dim) for dim in engine.get_tensor_shape(name))
    if -1 not in fixed:
        return fixed, fixed, fixed
    return tuple(tuple(int(d) for d in dims) for dims in engine.get_tensor_profile_shape(name, 0))


def _changed(recipe: Recipe, request: BuildRequest) -> Recipe:
    """Return the recipe with what the request says of open dimensions, memory and precision."""
    ranges = {s: r for s, r in request.profile.items() if s in recipe.profile}
    changes: dict[str, Any] = {"profile": {**recipe.profile, **ranges}}
    if request.workspace is not None:
        changes["workspace"] = request.workspace
    if request.tf32 is not None:
        changes["tf32"] = request.tf32
    return msgspec.structs.replace(recipe, **changes)


def _command(entry: Path) -> str:
    """Return the command that builds the engines of a bundle, given a graph at
    BUNDLE/BUILD/COMPONENT/FILE.
    """
    build = entry.parent.parent
    return f"latentc build {build.parent} --build {build.name}"
