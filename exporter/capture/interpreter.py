"""Runs a captured program in PyTorch and shows every value on its way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node

from latentc.exporter.capture.graphs import quiet

Inputs: TypeAlias = Mapping[str, torch.Tensor]
# Called with a node, its positional arguments and its result.
Look: TypeAlias = Callable[[Node, tuple[Any, ...], Any], None]
# Called with a node and its positional arguments; returns those that it gets.
Alter: TypeAlias = Callable[[Node, tuple[Any, ...]], tuple[Any, ...]]


class Watched:
    """`program` is a copy of the given one that shares its weights; it may be rewritten."""

    def __init__(self, program: ExportedProgram) -> None:
        shared = {id(tensor): tensor for tensor in program.state_dict.values()}
        shared |= {id(tensor): tensor for tensor in program.constants.values()}
        with quiet():
            self.program: ExportedProgram = copy.deepcopy(program, shared)

    def run(
        self, sample: Inputs, look: Look | None = None, alter: Alter | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the program's outputs for inputs by name.

        `look` sees every operation, `alter` may change what goes into it.
        """
        with torch.no_grad():
            return tuple(_Looking(self.program, look, alter).run(*self._arguments(sample)))

    def _arguments(self, sample: Inputs) -> Iterator[torch.Tensor]:
        """Yield the graph's arguments: weights, tables and inputs in its own order."""
        for spec in self.program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                yield sample[spec.arg.name]
            elif spec.target in self.program.state_dict:
                yield self.program.state_dict[spec.target]
            else:
                yield self.program.constants[str(spec.target)]


class _Looking(Interpreter):
    def __init__(self, program: ExportedProgram, look: Look | None, alter: Alter | None) -> None:
        super().__init__(program.graph_module)
        self._look = look
        self._alter = alter

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function" or (self._look is None and self._alter is None):
            return super().run_node(n)
        # Before the result: the interpreter forgets arguments after their last use.
        arguments, named = self.fetch_args_kwargs_from_env(n)
        if self._alter is not None:
            arguments = self._alter(n, arguments)
        result = self.call_function(n.target, arguments, named)
        if self._look is not None:
            self._look(n, arguments, result)
        return result
