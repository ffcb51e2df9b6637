"""Bundles whose graphs are PyTorch's own modules: nothing is captured, lowered or verified.

What a family says of a pipeline and what the runtime does with it can so be compared with diffusers
in seconds, for every class and every set of arguments; that engines give what the modules give is
for other tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch

from latentc.exporter.artifacts.store import Store
from latentc.exporter.compiler.run import Compilation
from latentc.exporter.components.description import Description
from latentc.exporter.options import export_options
from latentc.exporter.progress import Progress
from latentc.exporter.source.resolving import resolve
from latentc.exporter.verification.eager import EagerSession
from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.sizes import dimension
from latentc.runtimes.bundle.structures import Artifact, Build, Component
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from tests.support import fakes

# Called with the pipeline, its description, the draft of the manifest and where its files stand.
Examine = Callable[[Any, Description, Manifest, Path], None]


@dataclass(frozen=True)
class _Uncaptured(Compilation):
    """The compiler's run up to its draft, with files that only name the graphs."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    examine: Examine | None = None

    def _builds(self, pipe: Any, description: Description, manifest: Manifest) -> tuple[Build, ...]:
        if self.examine is not None:
            self.examine(pipe, description, manifest, self.store.staging)
        artifacts = {}
        for graph in description.graphs:
            name = graph.component.name
            self.modules[name] = graph.module.eval()

            def write(folder: Path, name: str = name) -> Mapping[str, Any]:
                (folder / "graph.json").write_text(json.dumps({"graph": name}))
                return {}

            item = self.store.item(f"graph-{name}", f"fake-fp32/{name}", write)
            artifacts[name] = Artifact("key", item.files[0].path, item.files, "fp32")
        return (Build("fake-fp32", "fake", "fp32", artifacts),)


class Mixing(Session):
    """In the place of a graph: outputs of its shapes, to which every number given matters.

    Attributes:
        spoilt: the component and the output of which one number is another one, and that number.
    """

    spoilt: ClassVar[tuple[str, str, float] | None] = None

    def __init__(self, component: Component) -> None:
        super().__init__(component.inputs, component.outputs)
        self._component = component.name

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        symbols: dict[str, int] = {}
        for name, value in feeds.items():
            self.inputs[name].check_shape(name, value.shape, symbols)
        rows = symbols["batch"]
        made = self._made(feeds, rows, symbols)
        if self.spoilt is not None and self.spoilt[0] == self._component:
            made[self.spoilt[1]].reshape(-1)[-1] = self.spoilt[2]
        return made

    def _made(self, feeds: Feeds, rows: int, symbols: Mapping[str, int]) -> dict[str, Array]:
        mixed = sum(
            self._mixed(feeds[name].reshape(len(feeds[name]), -1)) * (1 + 0.1 * place)
            for place, name in enumerate(name for name in self.inputs if name in feeds)
        )
        return {
            name: self._spread(np.broadcast_to(mixed, rows), spec.shape, symbols).astype(spec.dtype)
            for name, spec in self.outputs.items()
        }

    @staticmethod
    def _mixed(rows: Array) -> Array:
        """A number for each row."""
        weights = np.cos(np.arange(rows.shape[1]) * 0.37)
        return np.sin(rows.astype(np.float64) @ weights / np.sqrt(rows.shape[1]))

    @staticmethod
    def _spread(rows: Array, shape: Sequence[int | str], symbols: Mapping[str, int]) -> Array:
        sizes = [int(dimension(each, symbols)) for each in shape]
        places = np.arange(np.prod(sizes[1:])).reshape(sizes[1:])
        return 0.5 + 0.4 * np.sin(rows.reshape(-1, *[1] * len(places.shape)) + places * 0.11)


class _Backend(fakes.FakeBackend):
    """Runs the modules of one bundle; without any what mixes their inputs."""

    name: ClassVar[str] = "uncaptured"

    def __init__(self, modules: Mapping[str, torch.nn.Module] | None) -> None:
        self._modules = modules

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        if self._modules is None:
            return Mixing(component)
        return EagerSession(self._modules[component.name], component)


def uncaptured(
    source: Path,
    folder: Path,
    tasks: Sequence[str] = (),
    steps: Sequence[int] | None = (1, 2, 3),
    schedulers: Sequence[str] | None = (),
    asked: Mapping[str, Sequence[str]] | None = None,
    without: Sequence[str] = (),
    mixing: bool = False,
    examine: Examine | None = None,
) -> Pipeline:
    """Return a pipeline that is `source`, by way of a bundle in `folder`.

    Args:
        tasks: what the bundle is for besides.
        steps: step counts that it has plans for; None is the usual ones.
        schedulers: besides the source's own; None is the usual set.
        asked: ingredients, by kind.
        without: parts that are left out.
        mixing: run no modules, but something quicker to which all inputs matter.
        examine: called before the pipeline of diffusers is gone.
    """
    found = resolve(source, asked=asked, without=without)
    options = export_options(
        targets="onnx", schedulers=schedulers, steps=steps, verify=False, tasks=tasks
    )
    store = Store(folder, None)
    run = _Uncaptured(found, options, {}, store, Progress(None), examine=examine)
    with mock.patch("latentc.exporter.compiler.run.release_weights"):  # they are what is run here
        store.publish(run._draft(None))
    backend: Backend = _Backend(None if mixing else run.modules)
    return load(folder, backend)
