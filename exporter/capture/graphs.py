"""A component's module → one ExportedProgram, with named dynamic axes.

Every target lowers the same program, so whatever is done to it (see `latentc.exporter.passes`)
reaches every backend.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.config
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._sympy.value_ranges import ValueRanges

from latentc.exporter import stored_weights as weights
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.passes import Choices
from latentc.exporter.passes import load as load_pass
from latentc.runtimes.bundle import sizes
from latentc.runtimes.errors import ExportError, first_line
from latentc.runtimes.programs.dimensions import symbolic
from latentc.runtimes.programs.latents import other_sizes
from latentc.runtimes.programs.statements import Program

# diffusers' Upsample2D takes another (equivalent) path from 64 images on, so a program
# with a dynamic batch is captured for fewer. Only the torch target enforces the bound.
MAX_BATCH = 63
MAX_LATENT = 4096
MAX_SEQUENCE = 4096
# torch.__trace is torch's own tracing log: any handler on the root logger makes it slow.
_NOISY = ("torch", "torch.__trace", "torch.onnx", "onnxscript", "onnx_ir")


def example_inputs(
    graph: Graph, symbols: Mapping[str, int], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return random inputs of the shapes that `symbols` gives.

    They are normal floats, timesteps, ids, and images of numbers from 0 to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, spec in graph.component.inputs.items():
        shape = [resolve(dim, symbols) for dim in spec.shape]
        if name == "timestep":
            inputs[name] = torch.full(shape, 601.0)
        elif name == "image":
            inputs[name] = torch.rand(shape, generator=generator)
        elif name in graph.bounds:
            low, high = graph.bounds[name]
            inputs[name] = low + (high - low) * torch.rand(shape, generator=generator)
        elif spec.dtype == "int64":
            inputs[name] = torch.randint(0, graph.vocabulary, shape, generator=generator)
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    return inputs


def resolve(dimension: int | str, symbols: Mapping[str, int]) -> int:
    """Return the number that a manifest dimension stands for."""
    value = sizes.dimension(dimension, symbols)
    if isinstance(value, str):
        raise ExportError(f"no value for the dimension {value!r}")
    return value


def capture(
    graph: Graph,
    multiple: int,
    symbols: Mapping[str, int],
    maximum: int | None = None,
    others: Mapping[str, int | None] | None = None,
) -> ExportedProgram:
    """Capture with `torch.export`, traced at the shapes of `symbols`.

    Args:
        graph: its component's symbolic dimensions become dynamic axes.
        multiple: what latent height and width are multiples of.
        symbols: values to trace with; none may be 0 or 1.
        maximum: what latent height and width are at most, None for no limit of the model's own.
        others: the same for other sizes, such as the number of frames, by symbol.

    Raises:
        ExportError: the module cannot be captured.
    """
    least = -(-graph.least // multiple)
    lengths = sizes.least_lengths(graph.component)
    most = min(maximum or MAX_LATENT, MAX_LATENT)
    dims = _Dims(multiple, least, most, lengths, others or {})
    examples = example_inputs(graph, symbols)
    shapes = {
        name: {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for name, spec in graph.component.inputs.items()
    }
    try:
        with torch.no_grad(), quiet(), _without_stack_traces():
            with weights.stood_in(graph.module) as stored:
                program = torch.export.export(
                    graph.module.eval(),
                    (),
                    kwargs=examples,
                    dynamic_shapes=shapes,
                    strict=False,
                )
            program.state_dict.update(
                {name: value for name, value in stored.items() if name in program.state_dict}
            )
            _drop_unused(program)
            _take_small_sides(program)
            return program if graph.fed_by is None else _pruned(program)
    except Exception as error:
        raise ExportError(f"{graph.component.name}: capture failed: {first_line(error)}") from error


def _take_small_sides(program: ExportedProgram) -> None:
    """Let the program take sides below those that it was captured for, whose tensors have sides
    of 1.

    PyTorch promises nothing about those, because they may broadcast and their strides mean
    nothing, and notes that sides are not 1. Images never meet others than of their own size here,
    so the operations are the same. What it notes of equal sizes stays.
    """
    for symbol, span in program.range_constraints.items():
        program.range_constraints[symbol] = ValueRanges(1, span.upper)
    noted = program._guards_code
    program._guards_code = [code for code in noted if "==" in code and "%" not in code]


def _drop_unused(program: ExportedProgram) -> None:
    """Drop operations whose results nobody takes: a module may run more than it uses."""
    program.graph.eliminate_dead_code(_has_effects)
    program.graph_module.recompile()


def _pruned(program: ExportedProgram) -> ExportedProgram:
    """Return the program without what its outputs do not depend on, weights included."""
    graph, signature = program.graph, program.graph_signature
    for node in list(graph.nodes):
        # They hold on to what they look at; what they assert was true when it was captured.
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code(_has_effects)
    unused = {n.name for n in graph.nodes if n.op == "placeholder" and not n.users}
    kept = [
        spec
        for spec in signature.input_specs
        if spec.kind is InputKind.USER_INPUT or spec.arg.name not in unused
    ]
    for node in list(graph.nodes):
        if node.name in unused and node.name not in {spec.arg.name for spec in kept}:
            graph.erase_node(node)
    signature.input_specs = kept
    names = {spec.target for spec in kept}
    for held in (program.state_dict, program.constants):
        for name in [name for name in held if name not in names]:
            del held[name]
    program.graph_module.recompile()
    return program


def _has_effects(node: torch.fx.Node) -> bool:
    """Return whether an operation must stay though nobody takes its result.

    Torch itself also counts what may draw random numbers: dropout, which does nothing here.
    """
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema and schema.is_mutable)


def variant(
    program: ExportedProgram, passes: Sequence[str], choices: Choices | None = None
) -> ExportedProgram:
    """Return a copy of the program with the named passes run on it; the weights are shared."""
    if not passes:
        return program
    shared = {id(tensor): tensor for tensor in program.state_dict.values()}
    shared |= {id(tensor): tensor for tensor in program.constants.values()}
    with quiet():
        copied = copy.deepcopy(program, shared)
    for name in passes:
        load_pass(name).run(copied, choices or Choices())
    return copied


def symbol_values(description: Description, traced: bool) -> dict[str, int]:
    """Return sizes to capture at, or (other ones) to verify at.

    Every axis differs between the two, and height from width, so that a size that was baked
    in or an exchange of axes cannot pass. Sides are multiples of what the model needs, and of as
    little else as possible: what a graph must do at a side that it cannot halve is then done.
    """
    multiple = description.latents.multiple
    least = max((graph.least for graph in description.graphs), default=1)
    unit = multiple * max(1, 8 // multiple, -(-least // (2 * multiple)))
    components = [graph.component for graph in description.graphs]
    lengths = sizes.text_lengths(description.programs, components)
    texts = {name: most for own in lengths.values() for name, most in own.items()}
    own = sizes.conditioning_symbols(components, lengths).get("sequence", 1)
    length = max(own, *(_sequence(graph) for graph in description.graphs))
    if traced:
        sides = 2 * unit + multiple, 3 * unit + multiple
        return _values(2, sides, length) | texts | other_values(description.program, 3)
    texts = {name: most - most // 4 for name, most in texts.items()}
    others = other_values(description.program, 2)
    sides = 3 * unit - multiple, 2 * unit + 2 * multiple
    return _values(3, sides, 2 * length) | texts | others


def _values(batch: int, sides: tuple[int, int], sequence: int) -> dict[str, int]:
    height, width = sides
    return {"batch": batch, "height": height, "width": width, "sequence": sequence}


def other_values(program: Program, times: int) -> dict[str, int]:
    """Return values of the symbols that are no sides, such as the number of latent frames: `times`
    what they are multiples of, within their limits."""
    return {
        name: max(symbol.least, min(symbol.most or MAX_LATENT, times * symbol.multiple))
        for name, symbol in other_sizes(program).items()
    }


class _Dims:
    """`torch.export` dimensions by manifest dimension, such as ``batch`` or ``8*height``; spatial
    ones are multiples of a base."""

    def __init__(
        self,
        multiple: int,
        least: int,
        maximum: int,
        lengths: Mapping[str, int],
        others: Mapping[str, int | None],
    ) -> None:
        self._multiple = multiple
        self._lengths = lengths
        self._others = others
        self._least = least
        self._maximum = maximum
        self._known: dict[str, Any] = {}

    def __getitem__(self, symbol: str) -> Any:
        times, name, _ = symbolic(symbol)  # of inputs, which have no offset
        if name not in self._known:
            self._known[name] = self._base(name)
        factor = times * (self._multiple if name in ("height", "width") else 1)
        return self._known[name] if factor == 1 else factor * self._known[name]

    def _base(self, name: str) -> Any:
        if name == "batch":
            return Dim("batch", min=1, max=MAX_BATCH)
        if name == "sequence":
            return Dim("sequence", min=1, max=MAX_SEQUENCE)
        if name in self._lengths:
            return Dim(name, min=self._lengths[name], max=MAX_SEQUENCE)
        if name in self._others:
            return Dim(name, min=1, max=min(self._others[name] or MAX_LATENT, MAX_LATENT))
        # A base of its own name: a dimension may not be called like a multiple of it.
        label = name if self._multiple == 1 else f"_{name}"
        return Dim(label, min=self._least, max=self._maximum // self._multiple)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch, ONNX and OpenVINO log about themselves during an export."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Let nodes not keep which lines of Python they come from: nothing reads it, it takes a tenth
    of the time of a capture, and it names folders of this machine."""
    usual = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = usual


def _sequence(graph: Graph) -> int:
    lengths = [
        spec.shape[1]
        for spec in graph.component.inputs.values()
        if spec.dtype == "int64" and len(spec.shape) == 2
    ]
    return max((length for length in lengths if isinstance(length, int)), default=1)
