"""ONNX Runtime: loads ``onnx`` builds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from runtimes.backend import Backend, SessionOptions
from runtimes.manifest import Component
from runtimes.session import Array, Feeds, Session

_PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
_QUIET = 3  # ORT_LOGGING_LEVEL_ERROR: its warnings are about its own graph rewrites


class OnnxRuntimeBackend(Backend):
    """Devices are the execution providers of the installed onnxruntime build."""

    name: ClassVar[str] = "onnxruntime"
    package: ClassVar[str] = "onnxruntime"
    install: ClassVar[str] = "pip install 'latentc[onnxruntime]'"
    targets: ClassVar[tuple[str, ...]] = ("onnx",)

    def __init__(self) -> None:
        import onnxruntime

        self._ort = onnxruntime

    def version(self) -> str:
        return str(self._ort.__version__)

    def devices(self) -> list[str]:
        available = self._ort.get_available_providers()
        return [device for device, provider in _PROVIDERS.items() if provider in available]

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        settings = self._ort.SessionOptions()
        settings.log_severity_level = _QUIET
        settings.intra_op_num_threads = options.threads
        for key, value in options.extra.items():
            settings.add_session_config_entry(key, value)
        engine = self._ort.InferenceSession(
            str(entry), sess_options=settings, providers=[_PROVIDERS[device]]
        )
        return OnnxRuntimeSession(engine, component)


class OnnxRuntimeSession(Session):
    """An `onnxruntime.InferenceSession` behind the common interface."""

    def __init__(self, engine: Any, component: Component) -> None:
        super().__init__(component.inputs, component.outputs)
        self._engine = engine
        self._output_names = list(component.outputs)

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        values = self._engine.run(self._output_names, dict(feeds))
        return dict(zip(self._output_names, values, strict=True))

    def _close(self) -> None:
        self._engine = None
