"""A ``torch`` build as a module: the graph of the archive, of operators that are listed here.

The module's own names are numbers, so that nothing from the file stands in the Python code that
torch.fx makes of a graph. Symbolic sizes are not evaluated: at run time they are the numbers that
`aten.sym_size` gives.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from latentc.runtimes.backends import torch_archive as archives
from latentc.runtimes.backends.torch_archive import Archive, Argument, TensorMeta
from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.storage.parsing import parser

# Operators beside those of PyTorch's core set (torch.Tag.core), which its exports are made of
# before they are decomposed. None of them reads or writes a file or calls anything.
_COMPOSITE = frozenset(
    (
        *("__and__", "__or__", "__xor__", "addcdiv", "addcmul", "all", "any", "aminmax"),
        *("baddbmm", "batch_norm", "bucketize", "chunk", "clamp_max", "clamp_min", "concat"),
        *("contiguous", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "cumsum", "detach"),
        *("detach_", "dropout", "einsum", "expand_as", "flatten", "floor_divide", "gather", "glu"),
        *("group_norm", "index_select", "instance_norm", "layer_norm", "linalg_vector_norm"),
        *("linear", "linspace", "log_softmax", "masked_fill", "matmul", "max", "max_pool2d", "min"),
        *("mish", "movedim", "narrow", "new_empty", "new_full", "new_ones", "new_zeros", "norm"),
        *("one_hot", "ones", "ones_like", "outer", "pad", "pixel_shuffle", "pixel_unshuffle"),
        *("reflection_pad1d", "reflection_pad2d", "repeat_interleave", "reshape", "reshape_as"),
        *("rms_norm", "roll", "rsub", "scaled_dot_product_attention", "silu", "softmax"),
        *("softplus", "split", "split_with_sizes", "square", "squeeze", "stack", "std", "swapaxes"),
        *("t", "tensor_split", "tile", "to", "transpose", "tril", "triu", "true_divide"),
        *("type_as", "unbind", "unflatten", "unfold", "upsample_bicubic2d", "upsample_bilinear2d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "var", "view_as"),
        *("where", "zeros", "zeros_like", "arange", "_to_copy", "_softmax"),
    )
)
# Those that change their first argument, by overload as well.
_IN_PLACE = frozenset(
    (
        *("add_.Tensor", "add_.Scalar", "clamp_.default", "copy_.default", "div_.Tensor"),
        *("fill_.Scalar", "index_put_.default", "masked_fill_.Scalar", "mul_.Tensor"),
        *("relu_.default", "silu_.default", "sub_.Tensor", "zero_.default", "detach_.default"),
    )
)
# Operators of the core set that no inference needs, and whose kernels trust indices and sizes: they
# write and read beyond the end of a tensor where those do not fit.
_TRUSTING = re.compile(r".*_backward|_native_batch_norm_legit.*")
# Of symbolic sizes: the numbers are Python's own at run time.
_OF_NUMBERS: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le"),
            *("gt", "ge", "and_", "or_", "not_"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}
_OF_SIZES = tuple(f"torch.sym_{name}" for name in ("max", "min", "not", "int", "float"))
_OPERATOR = re.compile(r"torch\.ops\.aten\.([a-z_][a-z0-9_]{0,63})\.([A-Za-z][A-Za-z0-9_]{0,63})")
# PyTorch's numbers for dtypes and memory formats (torch._export.serde.schema), and its names.
DTYPES: Mapping[int, str] = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
}
FORMATS: Mapping[int, str] = {
    1: "contiguous_format",
    2: "channels_last",
    3: "channels_last_3d",
    4: "preserve_format",
}
_STRIDED = 7
_NOT_FINITE: Mapping[str, float] = {
    "Infinity": math.inf,
    "-Infinity": -math.inf,
    "NaN": math.nan,
}
_WORD = re.compile(r"[a-z_]{0,32}")  # a way of rounding, padding, approximating
_KEYWORD = 2
_LARGEST = 1 << 62
_MOST_DIMENSIONS = 64
# A size as the exporter's symbols make it: a symbol, or a multiple of one.
_SYMBOL = r"Symbol\('(s\d{1,6})', positive=True, integer=True\)"
_SIZE = re.compile(rf"{_SYMBOL}|Mul\(Integer\((\d{{1,6}})\), {_SYMBOL}\)")


@dataclass(frozen=True)
class Bound:
    """A bound says which sizes a dimension may have: `factor` times `low` to `high`."""

    factor: int
    low: int
    high: int | None

    def allows(self, size: int) -> bool:
        """Return whether a dimension may have this size."""
        times, rest = divmod(size, self.factor)
        return rest == 0 and self.low <= times and (self.high is None or times <= self.high)


@dataclass(frozen=True)
class LoadedProgram:
    """A module that takes `inputs` in this order and returns a tuple; `bounds` has a value for each
    dimension of each input, None where any size will do."""

    module: Any
    inputs: tuple[str, ...]
    bounds: Mapping[str, tuple[Bound | None, ...]]

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse sizes that the program was not captured for.

        Raises:
            InputError: names the input, the dimension, and what it may be.
        """
        for name, bounds in self.bounds.items():
            for axis, (size, bound) in enumerate(zip(shapes[name], bounds, strict=False)):
                if bound is not None and not bound.allows(size):
                    high = "" if bound.high is None else f" to {bound.high * bound.factor}"
                    raise InputError(
                        f"input {name!r}: this build was made for multiples of {bound.factor} from "
                        f"{bound.low * bound.factor}{high} in dimension {axis}, not {size}"
                    )


@parser(BundleError, "entry", "a program of PyTorch")
def load_program(torch: Any, entry: Path, device: str) -> LoadedProgram:
    """Read a program and put its tensors on a device. `torch` is the package.

    Raises:
        BundleError: the archive is damaged, or holds anything but a graph of known operators and
            the tensors that it uses.
    """
    with archives.opened(entry) as archive:
        return _Builder(torch, archive, device).program()


def find_operator(torch: Any, target: str) -> Any:
    """Return the operator of that name, None where a program may not call it."""
    if target in _OF_NUMBERS:
        return _OF_NUMBERS[target]
    if target in _OF_SIZES:
        return getattr(torch, target.removeprefix("torch."))
    parts = _OPERATOR.fullmatch(target)
    if parts is None:
        return None
    name, overload = parts.groups()
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or overload not in packet.overloads():
        return None
    found = getattr(packet, overload)
    if found._schema.is_mutable:
        return found if f"{name}.{overload}" in _IN_PLACE else None
    if _TRUSTING.fullmatch(name):
        return None
    return found if name in _COMPOSITE or torch.Tag.core in found.tags else None


def _check_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> None:
    """Check that three tensors belong together, which PyTorch's kernel for CPUs does not."""
    if key.shape[:-1] != value.shape[:-1] or query.shape[:-3] != key.shape[:-3]:
        shapes = [list(each.shape) for each in (query, key, value)]
        raise BundleError(f"a program with attention of tensors that do not fit: {shapes}")


# What is called before an operator, with its arguments.
_CHECKS: Mapping[str, Callable[..., None]] = {
    "torch.ops.aten.scaled_dot_product_attention.default": _check_attention,
}


class _Builder:
    """Makes a torch.fx graph of an archive's."""

    def __init__(self, torch: Any, archive: Archive, device: str) -> None:
        self.torch = torch
        self.device = torch.device(device)
        self._archive = archive
        self._program = archive.program()
        self._payloads = archive.payloads()
        self._records: dict[str, Any] = {}
        self._weights: dict[str, str] = {}  # of the graph's input: the weight that stands for it
        self._values: dict[str, Any] = {}
        self._graph = torch.fx.Graph()
        self._module = torch.nn.Module()

    def program(self) -> LoadedProgram:
        """Return the whole as a module."""
        document = self._program.graph_module
        inputs = self._place_inputs()
        for node in document.graph.nodes:
            self._add(node)
        for spec in document.signature.output_specs:
            if spec.user_output.arg.as_tensor is msgspec.UNSET:
                raise BundleError(f"{self._archive.name}: an output that is no tensor")
        outputs = [self.value(self._named(output)) for output in document.graph.outputs]
        self._graph.output(tuple(outputs))
        module = self.torch.fx.GraphModule(self._module, self._graph)
        metas = document.graph.tensor_values
        bounds = {name: self._bounds(metas[of]) for name, of in inputs.items()}
        return LoadedProgram(module, tuple(inputs), bounds)

    def _place_inputs(self) -> dict[str, str]:
        """Note which weight stands for which input, and return those of a call: their names, and
        the graph's."""
        taken: list[str] = []
        for spec in self._program.graph_module.signature.input_specs:
            if spec.user_input is not None:
                taken.append(self._named(spec.user_input.arg))
                self._values[taken[-1]] = self._graph.placeholder(f"input_{len(taken)}")
            elif spec.parameter is not None:
                self._weights[spec.parameter.arg.name] = spec.parameter.parameter_name
            elif spec.buffer is not None:
                self._weights[spec.buffer.arg.name] = spec.buffer.buffer_name
            elif spec.tensor_constant is not None:
                self._weights[spec.tensor_constant.arg.name] = (
                    spec.tensor_constant.tensor_constant_name
                )
        names = _keywords(self._program.graph_module.module_call_graph)
        if len({*names}) != len(taken) or len(names) != len(taken):
            raise BundleError(f"{self._archive.name}: {len(taken)} inputs, but {len(names)} names")
        return dict(zip(names, taken, strict=True))

    def _named(self, argument: Argument) -> str:
        if isinstance(argument.as_tensor, msgspec.UnsetType):
            raise BundleError(f"{self._archive.name}: an input or output that is no tensor")
        return argument.as_tensor.name

    def value(self, name: str) -> Any:
        """Return the graph's node for a name: a node's result, or a weight, which is read now."""
        if name not in self._values:
            attribute = f"weight_{len(self._values)}"
            self._module.register_buffer(attribute, self._tensor(self._weights[name]))
            self._values[name] = self._graph.get_attr(attribute)
        return self._values[name]

    def _add(self, node: archives.Node) -> None:
        """Add a call, and its results under their names."""
        target = find_operator(self.torch, node.target)
        if target is None:
            raise BundleError(
                f"{self._archive.name}: calls {node.target[:100]!r}, which no program of a bundle "
                "may; refusing to load it"
            )
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        schema = getattr(target, "_schema", None)
        known = {argument.name for argument in schema.arguments} if schema is not None else set()
        for passed in node.inputs:
            value = self._argument(passed.arg)
            if passed.kind != _KEYWORD:
                arguments.append(value)
            elif passed.name in known:
                keywords[passed.name] = value
            else:
                raise BundleError(
                    f"{self._archive.name}: {node.target} takes no {passed.name!r:.50}"
                )
        if node.target in _CHECKS:
            self._graph.call_function(_CHECKS[node.target], tuple(arguments), keywords)
        called = self._graph.call_function(target, tuple(arguments), keywords)
        names = [_results(output) for output in node.outputs]
        if len(names) == 1 and isinstance(names[0], str):
            self._name(names[0], called)
            return
        flat = names[0] if len(names) == 1 else names
        for index, name in enumerate(flat or ()):
            if isinstance(name, str):
                self._name(name, self._graph.call_function(operator.getitem, (called, index)))
            elif name is not None:
                raise BundleError(
                    f"{self._archive.name}: {node.target} has lists among its results"
                )

    def _name(self, name: str, node: Any) -> None:
        if name in self._values or name in self._weights:
            raise BundleError(f"{self._archive.name}: two values are named {name!r:.100}")
        self._values[name] = node

    def _argument(self, argument: Argument) -> Any:
        kind, value = argument.parted()
        return _READERS[kind](self, value)

    def symbolic(self, value: archives.Symbolic) -> Any:
        if value.as_name is not None:
            return self.value(value.as_name)
        return next(n for n in (value.as_int, value.as_bool, value.as_float) if n is not None)

    def optional(self, value: archives.Optional) -> Any:
        return None if value.as_tensor is None else self.value(value.as_tensor.name)

    def _tensor(self, name: str) -> Any:
        """Read a weight or a constant. Several may be views of one member of the archive."""
        folder, payload = self._payloads[name]
        member = f"{folder}{payload.path_name}"
        if member not in self._records:
            memory = self.torch.empty(self._archive.size(member), dtype=self.torch.uint8)
            self._archive.read_into(member, memoryview(memory.numpy()))
            self._records[member] = memory
        meta = payload.tensor_meta
        sizes, strides = _numbers(meta.sizes), _numbers(meta.strides)
        offset = _numbers([meta.storage_offset])[0]
        values = self._records[member].view(getattr(self.torch, DTYPES[meta.dtype]))
        last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        if 0 not in sizes and last >= len(values):
            raise BundleError(f"{self._archive.name}: {name!r:.100} is larger than its bytes")
        if self.device.type == "cpu":
            return values.as_strided(sizes, strides, offset)
        return values.as_strided(sizes, strides, offset).to(self.device)

    def _bounds(self, meta: TensorMeta) -> tuple[Bound | None, ...]:
        return tuple(self._bound(size) for size in meta.sizes)

    def _bound(self, size: archives.Size) -> Bound | None:
        if size.as_expr is None:
            return None  # a number: the manifest has it as well
        symbol = _SIZE.fullmatch(size.as_expr.expr_str)
        if symbol is None:
            return None
        name, factor = symbol[1] or symbol[3], int(symbol[2] or 1)
        limits = self._program.range_constraints.get(name)
        if limits is None or factor < 1:
            return None
        return Bound(factor, limits.min_val or 0, limits.max_val)


def _layout(builder: _Builder, value: int) -> Any:
    if value != _STRIDED:
        raise BundleError(f"a tensor that is not strided ({value})")
    return builder.torch.strided


def _word(_: _Builder, value: str) -> str:
    if not _WORD.fullmatch(value):
        raise BundleError(f"an argument that is no word of an operator: {value[:50]!r}")
    return value


def _float(_: Any, value: float | str) -> float:
    return _NOT_FINITE[value] if isinstance(value, str) else float(value)


# By the field of an argument, how its value is read.
_READERS: Mapping[str, Callable[[_Builder, Any], Any]] = {
    "as_none": lambda _, value: None,
    "as_tensor": lambda builder, value: builder.value(value.name),
    "as_tensors": lambda builder, value: [builder.value(each.name) for each in value],
    "as_optional_tensors": lambda builder, value: [builder.optional(each) for each in value],
    "as_int": lambda _, value: value,
    "as_ints": lambda _, value: value,
    "as_float": _float,
    "as_floats": lambda _, value: [_float(_, each) for each in value],
    "as_bool": lambda _, value: value,
    "as_bools": lambda _, value: value,
    "as_string": _word,
    "as_sym_int": lambda builder, value: builder.symbolic(value),
    "as_sym_ints": lambda builder, value: [builder.symbolic(each) for each in value],
    "as_sym_float": lambda builder, value: builder.symbolic(value),
    "as_sym_bool": lambda builder, value: builder.symbolic(value),
    "as_scalar_type": lambda builder, value: getattr(builder.torch, DTYPES[value]),
    "as_memory_format": lambda builder, value: getattr(builder.torch, FORMATS[value]),
    "as_layout": _layout,
    "as_device": lambda builder, _: builder.device,  # whichever it was captured on
}


def _results(argument: Argument) -> str | list[str] | None:
    """Return the names of a node's result: one, a list's, or None where it is not used."""
    kind, value = argument.parted()
    if kind == "as_tensor":
        return str(value.name)
    if kind == "as_tensors":
        return [each.name for each in value]
    if kind == "as_none":
        return None
    if kind.startswith("as_sym_") and getattr(value, "as_name", None) is not None:
        return str(value.as_name)
    raise BundleError(f"a result of the kind {kind}")


def _keywords(calls: Sequence[archives.Call]) -> list[str]:
    """Return the names that the program's inputs are passed by, in the order of the graph's."""
    whole = next((call.signature for call in calls if call.fqn == ""), None)
    if whole is None:
        raise BundleError("a program that does not say how it is called")
    _, tree = msgspec.json.decode(whole.in_spec, type=tuple[int, archives.Tree])
    positional, named = tree.children_spec
    leaves = [child for child in named.children_spec if child.type is None]
    if positional.children_spec or named.type != "builtins.dict" or named.context is None:
        raise BundleError("a program that is not called by names alone")
    names = msgspec.json.decode(named.context, type=list[str])
    if len(leaves) != len(names) or len(leaves) != len(named.children_spec):
        raise BundleError("a program whose inputs are not tensors alone")
    return names


def _numbers(sizes: Sequence[archives.Size]) -> list[int]:
    """Return sizes, strides or offsets of a tensor in the archive; raise BundleError for other than
    numbers.
    """
    numbers = [size.as_int for size in sizes if size.as_int is not None]
    if len(numbers) != len(sizes) or len(sizes) > _MOST_DIMENSIONS:
        raise BundleError("a weight of symbolic size")
    if any(not 0 <= number <= _LARGEST for number in numbers):
        raise BundleError("a weight of negative or impossible size")
    return numbers
