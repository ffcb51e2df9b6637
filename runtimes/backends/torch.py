"""PyTorch: loads ``torch`` builds (ExportedProgram). The one file here that imports torch."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtimes.backend import Backend, SessionOptions
from runtimes.errors import BundleError
from runtimes.manifest import Component
from runtimes.session import Array, Feeds, Session


class TorchBackend(Backend):
    """Devices are cpu and what accelerators this build of PyTorch finds."""

    name: ClassVar[str] = "torch"
    package: ClassVar[str] = "torch"
    install: ClassVar[str] = "pip install 'latentc[torch]'"
    targets: ClassVar[tuple[str, ...]] = ("torch",)

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def version(self) -> str:
        return str(self._torch.__version__)

    def devices(self) -> list[str]:
        found = ["cpu"]
        if self._torch.cuda.is_available():
            found += [f"cuda:{index}" for index in range(self._torch.cuda.device_count())]
            found.insert(1, "cuda")
        if self._torch.backends.mps.is_available():
            found.append("mps")
        if hasattr(self._torch, "xpu") and self._torch.xpu.is_available():
            found.append("xpu")
        return found

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        if options.threads:
            self._torch.set_num_threads(options.threads)
        refuse_pickles(entry, self._torch)
        program = self._torch.export.load(entry)
        module = program.module().to(device)
        return TorchSession(self._torch, module, device, component)


class TorchSession(Session):
    """An ExportedProgram's module behind the common interface."""

    def __init__(self, torch: Any, module: Any, device: str, component: Component) -> None:
        super().__init__(component.inputs, component.outputs)
        self._torch = torch
        self._module = module
        self._device = device

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        torch = self._torch
        with torch.inference_mode():
            tensors = {
                name: torch.from_numpy(np.ascontiguousarray(feeds[name])).to(self._device)
                for name in self.inputs
            }
            values = self._module(**tensors)
        arrays = (value.cpu().numpy() for value in values)
        return dict(zip(self.outputs, arrays, strict=True))

    def _close(self) -> None:
        self._module = None


def refuse_pickles(entry: Path, torch: Any) -> None:
    """Check that a .pt2 archive holds tensors and a program only.

    `torch.export.load` would unpickle whatever an archive marks so; here nothing is.

    Raises:
        BundleError: the archive is damaged, or holds pickled objects.
    """
    try:
        with zipfile.ZipFile(entry) as archive:
            for name in archive.namelist():
                if name.endswith(("weights_config.json", "constants_config.json")):
                    _refuse_marked(entry, json.loads(archive.read(name)))
                elif "/data/sample_inputs/" in name:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                elif "/data/aotinductor/" in name or "custom_obj" in name:
                    raise BundleError(f"{entry.name}: holds compiled or custom objects: {name}")
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(f"{entry.name}: not a program archive: {error}") from error


def _refuse_marked(entry: Path, config: Any) -> None:
    for name, payload in config.get("config", {}).items():
        if payload.get("use_pickle"):
            raise BundleError(f"{entry.name}: {name} is a pickle; refusing to load it")
