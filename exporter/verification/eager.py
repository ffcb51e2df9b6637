"""A bundle's graphs as PyTorch's own modules: the runtime runs its programs over what nothing has
captured or lowered yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.backends.sessions import Sessions
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Build, Component
from latentc.runtimes.calls.choosing import Calls
from latentc.runtimes.pipeline.pipeline import Pipeline, tokenizers_of

# What components were given, in order, by their names and those of their inputs.
Inputs: TypeAlias = dict[str, list[Mapping[str, torch.Tensor]]]


class EagerSession(Session):
    """A module in the place of a graph.

    Attributes:
        met: takes what every call gives, where somebody wants to know.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        component: Component,
        met: list[Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        super().__init__(component.inputs, component.outputs)
        self._module = module
        self.met = met

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        inputs = {name: torch.from_numpy(feeds[name].copy()) for name in self.inputs}
        if self.met is not None:
            self.met.append(inputs)
        with torch.no_grad():
            values = self._module(*inputs.values())
        return {name: value.numpy() for name, value in zip(self.outputs, values, strict=True)}


class EagerBackend(Backend):
    """Runs modules, by the name of their component."""

    name: ClassVar[str] = "eager"
    package: ClassVar[str] = "torch"
    install: ClassVar[str] = "pip install latentc[torch]"
    targets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, modules: Mapping[str, torch.nn.Module], met: Inputs | None = None) -> None:
        self._modules = modules
        self._met = met or {}

    def version(self) -> str:
        """Return PyTorch's version."""
        return str(torch.__version__)

    def devices(self) -> list[str]:
        """Return the one device, on which the exporter runs models."""
        return ["cpu"]

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        return self.session(component)

    def session(self, component: Component) -> Session:
        """Return the module of a component as a session."""
        name = component.name
        return EagerSession(self._modules[name], component, self._met.get(name))


def pipeline_over(
    root: Path,
    manifest: Manifest,
    modules: Mapping[str, torch.nn.Module],
    met: Inputs | None = None,
) -> Pipeline:
    """Return a pipeline that runs the programs of a manifest over modules.

    Args:
        root: where the files stand that the manifest names; its builds are not looked at.
        modules: of each component, taking its inputs and giving its outputs in their order.
        met: lists by component that take what its calls give.

    Raises:
        BundleError: a file of the manifest is missing or damaged.
    """
    bundle = Bundle(root.resolve(), manifest, "never")
    components = {component.name: component for component in manifest.components}
    backend = EagerBackend(modules, met)
    sessions = Sessions(components, lambda name: backend.session(components[name]), keep=False)
    build = Build(backend.name, backend.name, "fp32", {})
    return Pipeline(
        *(bundle, build, backend, "cpu", sessions, tokenizers_of(bundle)), Calls.of(manifest)
    )
