"""Denoisers whose UNet is given more than its own pipeline gives it: what ControlNets, IP-Adapters
and T2I-Adapters have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from latentc.exporter.components.description import Graph
from latentc.exporter.components.signatures import named
from latentc.runtimes.bundle.structures import TensorSpec


class Extended(torch.nn.Module):
    """A denoiser with inputs besides its own, of which arguments for its UNet are made."""

    def __init__(self, graph: Graph, unet: Any, inputs: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = graph.module
        self._unet = [unet]  # a part of the denoiser, not another one
        self._own = tuple(graph.component.inputs)
        self.forward: Callable[..., Any] = named(self._call, inputs)

    @abstractmethod
    def _more(
        self,
        inputs: Mapping[str, torch.Tensor],
        args: tuple[Any, ...],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the UNet's further keyword arguments, of all inputs and of what the UNet is called
        with.
        """

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        def extend(
            _: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**given, **self._more(inputs, args, given)}

        handle = self._unet[0].register_forward_pre_hook(extend, with_kwargs=True)
        try:
            made: tuple[torch.Tensor, ...] = self.denoiser(**{n: inputs[n] for n in self._own})
            return made
        finally:
            handle.remove()


def extended(
    graph: Graph,
    inputs: Mapping[str, TensorSpec],
    make: Callable[[Graph, list[str]], torch.nn.Module],
) -> Graph:
    """Return the denoiser's graph with these inputs besides.

    `make` gets it and the names of all.
    """
    every = {**graph.component.inputs, **inputs}
    component = structs.replace(graph.component, inputs=every)
    return replace(graph, component=component, module=make(graph, list(every)))
