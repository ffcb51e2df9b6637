"""PyTorch: loads ``torch`` builds, the graphs of ExportedPrograms (see `torch_program`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import BackendError, BundleError

if TYPE_CHECKING:
    from latentc.runtimes.backends.torch_program import LoadedProgram

# Device type → the package that brings it, where torch itself does not (Gaudi).
_PLUGINS: Mapping[str, str] = {"hpu": "habana_frameworks.torch.core"}
_ACCELERATORS = ("cuda", "mps", "xpu", "hpu")
_NUMBERED = ("cuda", "xpu")


class TorchBackend(Backend):
    """Devices are cpu and what accelerators this build of PyTorch finds.

    `compile` runs `torch.compile` over the program and keeps images channels-last, which
    convolutions like; the first call of each shape then takes a minute or more.
    """

    name: ClassVar[str] = "torch"
    package: ClassVar[str] = "torch"
    install: ClassVar[str] = "pip install 'latentc[torch]'"
    targets: ClassVar[tuple[str, ...]] = ("torch",)
    memory_per_weight: ClassVar[float] = 4.0
    entries: ClassVar[tuple[str, ...]] = (".pt2",)
    computes: ClassVar[tuple[str, ...]] = ("fp32", "auto")
    compiles: ClassVar[bool] = True
    places: ClassVar[Mapping[str, int]] = {"bf16": 25, "fp32": 50, "fp16": 51}
    # Reading a program is Python under one lock, and torch.export promises nothing to threads.
    loads_in_parallel: ClassVar[bool] = False

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._usual_threads = torch.get_num_threads()
        self._threads_set = False

    def version(self) -> str:
        return str(self._torch.__version__)

    def devices(self) -> list[str]:
        found = ["cpu"]
        for kind in _ACCELERATORS:
            if kind in _PLUGINS:
                with suppress(ImportError):
                    import_module(_PLUGINS[kind])
            count = self._count(kind)
            found += [kind] if count else []
            found += [f"{kind}:{index}" for index in range(count) if kind in _NUMBERED]
        return found

    def _count(self, kind: str) -> int:
        """Return how many devices of a kind, such as ``cuda``, PyTorch sees; 0 where it has no
        support for it.
        """
        module = getattr(self._torch, kind, None)
        if module is None or not module.is_available():
            return 0
        return int(module.device_count())

    def option_names(self, device: str) -> Collection[str] | None:
        return ()

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        if options.threads:
            self._torch.set_num_threads(options.threads)
            self._threads_set = True
        elif self._threads_set:  # the number is the process's: an earlier session's must not stay
            self._torch.set_num_threads(self._usual_threads)
            self._threads_set = False
        from latentc.runtimes.backends.torch_program import load_program

        program = load_program(self._torch, entry, device)
        if {*program.inputs} != {*component.inputs}:
            raise BundleError(
                f"{entry.name}: takes {', '.join(program.inputs)}, but the manifest says "
                f"{', '.join(component.inputs)}"
            )
        if options.compile:
            module = self._compiled(program.module, bool(options.sizes))
            program = dataclasses.replace(program, module=module)
        settings = _Settings(device, options.compute or "fp32", options.compile)
        return TorchSession(self._torch, program, component, settings)

    def _compiled(self, module: Any, fixed: bool) -> Any:
        """Return the module with channels-last weights and torch.compile for dynamic or fixed
        shapes.

        What was a view of an image in its usual order may need a copy in the new one.
        """
        aten = self._torch.ops.aten
        for node in module.graph.nodes:
            if node.target is aten.view.default:
                node.target = aten.reshape.default
        module.recompile()
        module = module.to(memory_format=self._torch.channels_last)
        return self._torch.compile(module, dynamic=None if fixed else True)


@dataclass(frozen=True)
class _Settings:
    """Where and how a session runs."""

    device: str
    compute: str
    channels_last: bool


class TorchSession(Session):
    """A program's module behind the common interface."""

    def __init__(
        self, torch: Any, program: LoadedProgram, component: Component, settings: _Settings
    ) -> None:
        super().__init__(component.inputs, component.outputs)
        self._torch = torch
        self._program: LoadedProgram | None = program
        self._settings = settings

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._run_placed(feeds, {})

    def _place(self, constants: Feeds) -> Any:
        return {name: self._tensor(value) for name, value in constants.items()}

    def _run_placed(self, feeds: Feeds, placed: Any) -> dict[str, Array]:
        program = self._program
        if program is None:
            raise BackendError("this session is closed")
        tensors = placed | {name: self._tensor(value) for name, value in feeds.items()}
        program.check({name: tensor.shape for name, tensor in tensors.items()})
        with self._torch.inference_mode(), self._computing():
            values = program.module(*(tensors[name] for name in program.inputs))
        # Copies: an array that is PyTorch's memory would be freed by whoever gets it, whenever.
        return self._named(np.array(value.float().cpu().numpy(), order="C") for value in values)

    def _tensor(self, value: Array) -> Any:
        # PyTorch warns of memory that it may not write to.
        own = np.require(value, requirements=("C_CONTIGUOUS", "WRITEABLE"))
        tensor = self._torch.from_numpy(own).to(self._settings.device)
        if self._settings.channels_last and tensor.dim() == 4:
            return tensor.to(memory_format=self._torch.channels_last)
        return tensor

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute in float32 that is no TensorFloat-32, unless PyTorch's own choice was asked for.

        By itself it lets convolutions on NVIDIA GPUs use that.
        """
        if self._settings.compute != "fp32" or not self._settings.device.startswith("cuda"):
            yield
            return
        switches = (self._torch.backends.cudnn.conv, self._torch.backends.cuda.matmul)
        before = [switch.fp32_precision for switch in switches]
        try:
            for each in switches:
                each.fp32_precision = "ieee"
            yield
        finally:
            for each, value in zip(switches, before, strict=True):
                each.fp32_precision = value

    def _close(self) -> None:
        self._program = None
