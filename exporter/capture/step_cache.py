"""The denoiser in two graphs, for step caching: the whole one, which also gives its deep features,
and its shallow part, which takes them from an earlier step (see
`latentc.runtimes.sampling.step_cache`).

In the UNets of diffusers the last layer of the last up block takes the results of all deeper
layers and, by the outermost skip connection, that of the first convolution. The cut is there,
branch 0 of DeepCache (https://arxiv.org/abs/2312.00858): what stays shallow is a few percent of
the UNet and of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from latentc.exporter.capture.graphs import example_inputs, symbol_values
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.components.signatures import named
from latentc.exporter.programs.changes import with_cache
from latentc.runtimes.bundle.precision import DENOISER, SHALLOW
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.dimensions import symbolic
from latentc.runtimes.programs.statements import loop_of

FEATURES = "deep_features"
# Blocks whose layers each join the outermost skip connection last.
_BLOCKS = (
    *("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"),
    *("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
)


def split(description: Description) -> Description:
    """Return the description with the denoiser's graph in two.

    Raises:
        UnsupportedPipeline: it is no UNet that can be cut like this.
    """
    if any(loop_of(program).views is not None for program in description.programs):
        raise UnsupportedPipeline(
            "step-cache: a denoiser that looks at views of an image has no features of the whole"
        )
    cut = _Cut(description.denoiser)
    symbols = symbol_values(description, traced=True)
    programs = tuple(with_cache(each, SHALLOW, [FEATURES]) for each in description.programs)
    graphs: list[Graph] = []
    for graph in description.graphs:
        if graph.component.name == DENOISER:
            graphs += _halves(graph, cut, symbols)
        else:
            graphs.append(graph)
    return replace(description, graphs=tuple(graphs), programs=programs)


def with_features(graph: Graph, inputs: Mapping[str, Any], made_from: Mapping[str, Any]) -> Any:
    """Return the inputs of a shallow graph.

    They are its own ones among `inputs`, and the features that the whole one makes of `made_from`.
    Inputs of other graphs are returned as they are.
    """
    whole = graph.fed_by
    if whole is None:
        return inputs
    with torch.no_grad():
        features = dict(zip(whole.component.outputs, whole.module(**made_from), strict=True))
    return {name: {**inputs, **features}[name] for name in graph.component.inputs}


class _Cut:
    """Where a UNet is cut: before the layer `last`, which takes [features, result of `first`]
    joined along the channels."""

    def __init__(self, unet: Any) -> None:
        blocks = getattr(unet, "up_blocks", None)
        if not blocks or type(blocks[-1]).__name__ not in _BLOCKS:
            found = type(blocks[-1]).__name__ if blocks else "none"
            raise UnsupportedPipeline(
                f"step-cache: {type(unet).__name__} cannot be cut; expected a UNet whose last up "
                f"block is one of {', '.join(_BLOCKS)}, found {found}"
            )
        self.first, self.last = unet.conv_in, blocks[-1].resnets[-1]
        self.channels = self.last.in_channels - self.first.out_channels

    @contextmanager
    def read(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list that gets the features of the calls inside."""
        seen: list[torch.Tensor] = []

        def look(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0][:, : self.channels])

        handle = self.last.register_forward_pre_hook(look)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def write(self, features: torch.Tensor) -> Iterator[None]:
        """Let calls inside go on with `features` instead of what the deeper layers made."""
        skipped: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, inputs: tuple[Any, ...], made: torch.Tensor) -> None:
            skipped.append(made)

        def exchange(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.cat([features, skipped.pop()], dim=1), *inputs[1:])

        handles = [
            self.first.register_forward_hook(keep),
            self.last.register_forward_pre_hook(exchange),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Whole(torch.nn.Module):
    """The denoiser; returns what it gives and the features at the cut."""

    def __init__(self, denoiser: torch.nn.Module, cut: _Cut, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._cut = cut
        self.forward = named(self._call, names)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with self._cut.read() as seen:
            made: tuple[torch.Tensor, ...] = self.denoiser(**inputs)
        return (*made, seen[0].contiguous())


class _Shallow(torch.nn.Module):
    """The denoiser with given features: all that is deeper runs for nothing, and falls away when
    the module is captured. So do its inputs that are not among `names`."""

    def __init__(self, denoiser: Graph, cut: _Cut, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = denoiser.module
        self._inputs = denoiser.component.inputs
        self._cut = cut
        self.forward = named(self._call, names)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        sample = inputs["sample"]
        own = {
            name: inputs[name] if name in inputs else _zeros(spec, sample)
            for name, spec in self._inputs.items()
        }
        with self._cut.write(inputs[FEATURES]):
            made: tuple[torch.Tensor, ...] = self.denoiser(**own)
        return made


def _zeros(spec: TensorSpec, sample: torch.Tensor) -> torch.Tensor:
    """Return zeros of as many rows as the sample, and of its height and width; other open
    dimensions are 1.
    """
    rows, _, height, width = sample.shape
    value_by_symbol = {"batch": rows, "height": height, "width": width}
    sizes = [
        each
        if isinstance(each, int)
        else symbolic(each).value(value_by_symbol.get(symbolic(each).symbol, 1))
        for each in spec.shape
    ]
    return sample.new_zeros(sizes)


def _halves(graph: Graph, cut: _Cut, symbols: Mapping[str, int]) -> tuple[Graph, Graph]:
    component = graph.component
    sides = component.inputs["sample"].shape[2:]
    features = {FEATURES: TensorSpec("float32", ("batch", cut.channels, *sides))}
    outputs = {**component.outputs, **features}
    whole = replace(
        graph,
        component=Component(DENOISER, "denoiser", component.inputs, outputs),
        module=_Whole(graph.module, cut, list(component.inputs)),
    )

    def shallow(inputs: dict[str, TensorSpec]) -> Graph:
        made = Component(SHALLOW, "shallow", inputs, component.outputs)
        module = _Shallow(graph, cut, list(inputs))
        return replace(graph, component=made, module=module, fed_by=whole)

    every = {**component.inputs, **features}
    used = _used(shallow(every), symbols)
    return whole, shallow({name: spec for name, spec in every.items() if name in used})


def _used(graph: Graph, symbols: Mapping[str, int]) -> set[str]:
    """Return the inputs that the outputs depend on.

    They are those that it has a gradient by, and those that change it when they change, as a class
    does, which is rounded before it is looked up.
    """
    inputs = {n: v.requires_grad_() for n, v in example_inputs(graph, symbols).items()}
    with torch.enable_grad():
        outputs = graph.module.eval()(**inputs)
        total = torch.stack([output.sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    pairs: Iterable[tuple[str, Any]] = zip(inputs, gradients, strict=True)  # stubs deny None
    used = {name for name, gradient in pairs if gradient is not None}
    others = example_inputs(graph, symbols, seed=1)
    for name in inputs.keys() - used:
        with torch.no_grad():
            changed = graph.module(**{**inputs, name: others[name]})
        if not all(torch.equal(*pair) for pair in zip(changed, outputs, strict=True)):
            used.add(name)
    return used
