"""ONNX Runtime: loads ``onnx`` builds, and the plain ONNX graphs of ``tensorrt`` builds."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import DeviceUnavailable

# Weights of 8 and 4 bits become float32 once, as a session is made, and products are exact. By
# default it would widen those of convolutions at every call, out of reach of its fast layouts,
# and round the activations of linear layers to 8 bits: slower, and another image.
_FOLDED: Mapping[str, str] = {"session.disable_quant_qdq": "1"}


@dataclass(frozen=True)
class _Device:
    """An execution provider, those that take over what it cannot run, and what they need:
    `memory` is the name of its own memory ("" is the host's), `hint` says what may be missing."""

    providers: tuple[str, ...]
    memory: str = ""
    hint: str = "see https://onnxruntime.ai/docs/execution-providers"


_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_GPU_HINT = (
    "check nvidia-smi, and install the GPU build with its libraries: "
    "pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
)
# TensorFloat-32 is on by default in the CUDA provider; its products have 10 bits. A graph that
# says float32 is computed in float32 here.
_EXACT = {"use_tf32": "0"}
# The best first, but for the CPU: what nobody asked for must not fail on a missing driver.
_DEVICES: Mapping[str, _Device] = {
    "cpu": _Device((_CPU,)),
    "cuda": _Device((_CUDA, _CPU), "cuda", _GPU_HINT),
    "tensorrt": _Device(("TensorrtExecutionProvider", _CUDA, _CPU), "cuda", _GPU_HINT),
    "rocm": _Device(("ROCMExecutionProvider", _CPU)),
    "migraphx": _Device(("MIGraphXExecutionProvider", _CPU)),
    "dml": _Device(("DmlExecutionProvider", _CPU)),
    "coreml": _Device(("CoreMLExecutionProvider", _CPU)),
}
# Weights stay in their mapped files, and are widened to float32 for one product at a time: folded
# and laid out for its kernels beforehand, they would all be in memory.
_LEAN: Mapping[str, str] = {"session.disable_prepacking": "1"}
_QUIET = 3  # ORT_LOGGING_LEVEL_ERROR: its warnings are about its own graph rewrites


class OnnxRuntimeBackend(Backend):
    """Devices are the execution providers of the installed onnxruntime build; ``cuda:1`` is the
    second GPU. A provider that does not start is an error: nothing falls back to the CPU."""

    name: ClassVar[str] = "onnxruntime"
    package: ClassVar[str] = "onnxruntime"
    install: ClassVar[str] = "pip install 'latentc[onnxruntime]'"
    targets: ClassVar[tuple[str, ...]] = ("onnx", "tensorrt")
    memory_per_weight: ClassVar[float] = 4.8
    entries: ClassVar[tuple[str, ...]] = (".onnx",)
    lacks: ClassVar[tuple[str, ...]] = ("bf16",)  # no kernels on the CPU
    computes: ClassVar[tuple[str, ...]] = ("fp32", "auto")
    places: ClassVar[Mapping[str, int]] = {
        "fp32": 40,
        "int8": 41,
        "int4": 42,
        "w8a8": 43,
        "fp16": 44,
    }
    lean: ClassVar[bool] = True

    def __init__(self) -> None:
        import onnxruntime

        self._ort = onnxruntime

    def version(self) -> str:
        return str(self._ort.__version__)

    def devices(self) -> list[str]:
        available = self._ort.get_available_providers()
        return [name for name, each in _DEVICES.items() if each.providers[0] in available]

    def option_names(self, device: str) -> Collection[str] | None:
        """Return the names of the session configuration's settings; None where they cannot be read.

        No function lists them, and ONNX Runtime takes any name without a word: they are read from
        its library, where they are texts.
        """
        libraries = list(Path(self._ort.__file__).parent.glob("capi/*pybind11_state*"))
        return _option_names(libraries[0]) if libraries else None

    def device(self, asked: str | None) -> str:
        name, colon, index = (asked or "").partition(":")
        if not colon:
            return super().device(asked)
        chosen = super().device(name)
        if not _DEVICES[chosen].memory or not index.isdecimal():
            raise DeviceUnavailable(self.name, str(asked), self.devices())
        return f"{chosen}:{int(index)}"

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        name, _, index = device.partition(":")
        place = _Place(_DEVICES[name], int(index or 0))
        if place.device.memory and hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()  # CUDA and cuDNN from their own packages
        engine = self._ort.InferenceSession(
            str(entry),
            sess_options=self._settings(options, place),
            providers=place.providers(options),
            enable_fallback=0,
        )
        started = engine.get_providers()
        if place.device.providers[0] not in started:
            reason = (
                f"onnxruntime could not start {place.device.providers[0]} for {component.name!r} "
                f"(it has {', '.join(started)}): {place.device.hint}"
            )
            raise DeviceUnavailable(self.name, device, ["cpu"], reason)
        return OnnxRuntimeSession(self._ort, engine, component, place)

    def _settings(self, options: SessionOptions, place: _Place) -> Any:
        settings = self._ort.SessionOptions()
        settings.log_severity_level = _QUIET
        settings.intra_op_num_threads = options.threads
        for symbol, size in options.sizes.items():
            settings.add_free_dimension_override_by_name(symbol, size)
        folded = _FOLDED if place.device.providers[0] == _CPU else {}
        if options.lean and place.device.providers[0] == _CPU:
            settings.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            settings.enable_cpu_mem_arena = False
            folded = {**folded, **_LEAN}
        for key, value in {**folded, **options.extra}.items():
            settings.add_session_config_entry(key, value)
        return settings


_OPTION = re.compile(rb"(?<=\0)(?:session|optimization|mlas|ep|memory)(?:\.[a-z0-9_]+)+(?=\0)")


@cache
def _option_names(library: Path) -> frozenset[str] | None:
    with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return frozenset(name.decode() for name in _OPTION.findall(content)) or None


@dataclass(frozen=True)
class _Place:
    """One device by number."""

    device: _Device
    index: int

    def providers(self, options: SessionOptions) -> list[Any]:
        """Return what `InferenceSession` takes as providers: names, or pairs of a name and
        settings.
        """
        return [
            (name, self._options(name, options)) if self.device.memory and name != _CPU else name
            for name in self.device.providers
        ]

    def _options(self, provider: str, options: SessionOptions) -> dict[str, str]:
        chosen = {"device_id": str(self.index)}
        if provider == _CUDA and options.compute != "auto":
            return chosen | dict(_EXACT)
        if provider != _CUDA and options.cache is not None and options.key:
            # The provider names its engines after the graph, not after the weights: a folder
            # for each set of files.
            folder = options.cache / "onnxruntime" / options.key[:32]
            folder.mkdir(parents=True, exist_ok=True)
            chosen |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder),
            }
        return chosen


class OnnxRuntimeSession(Session):
    """An `onnxruntime.InferenceSession` behind the common interface.

    On a device with memory of its own, constants are copied there once, as OrtValues, and an
    IOBinding of each call's own brings the inputs there and the outputs back.
    """

    def __init__(self, ort: Any, engine: Any, component: Component, place: _Place) -> None:
        super().__init__(component.inputs, component.outputs)
        self._ort = ort
        self._engine = engine
        self._place_of = place
        self._output_names = list(component.outputs)

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        if self._place_of.device.memory:
            return self._run_placed(feeds, {})
        options = self._ort.RunOptions()
        with self._abortable(lambda: setattr(options, "terminate", True)):
            return self._named(self._engine.run(self._output_names, dict(feeds), options))

    def _place(self, constants: Feeds) -> Any:
        memory = self._place_of.device.memory
        if not memory:
            return constants
        make = self._ort.OrtValue.ortvalue_from_numpy
        return {
            name: make(value, memory, self._place_of.index) for name, value in constants.items()
        }

    def _run_placed(self, feeds: Feeds, placed: Any) -> dict[str, Array]:
        if not self._place_of.device.memory:
            return self._run({**placed, **feeds})
        binding = self._engine.io_binding()
        for name, value in placed.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in self._output_names:
            binding.bind_output(name, self._place_of.device.memory, self._place_of.index)
        options = self._ort.RunOptions()
        with self._abortable(lambda: setattr(options, "terminate", True)):
            self._engine.run_with_iobinding(binding, options)
        return self._named(binding.copy_outputs_to_cpu())

    def _close(self) -> None:
        self._engine = None
