"""Operations of PyTorch that coremltools does not translate, or not as PyTorch means them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch.export import ExportedProgram

from latentc.runtimes.errors import ExportError

_aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """Return what `latentc.exporter.capture.decompose.decomposed` takes."""
    return {
        _aten.__and__.Tensor: torch.bitwise_and,
        _aten.split_with_sizes.default: _split_with_sizes,
        _aten.new_ones.default: _new_ones,
        _aten.where.ScalarOther: _where_scalar_other,
        _aten.where.ScalarSelf: _where_scalar_self,
        _aten.where.Scalar: _where_scalars,
    }


@cache
def register() -> None:
    """Have coremltools divide whole numbers as PyTorch does. Its own translation makes floats of
    them, which then are no shape."""
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, promote_input_dtypes

    def floor_divide(context: Any, node: Any) -> None:
        one, other = promote_input_dtypes(_get_inputs(context, node, expected=2))
        context.add(Builder.floor_div(x=one, y=other, name=node.name))

    register_torch_op(floor_divide, torch_alias=["floordiv"], override=True)


def crop_instead_of_sizing(program: ExportedProgram) -> None:
    """Rewrite upsampling to the nearest value that is told a size: by two, and without the last
    row or column if that is one too many. Core ML enlarges by constant factors only.

    Of n values enlarged to 2n - 1 by repeating the nearest, the one at i is that at i // 2, as of
    2n: the floor of i * n / (2n - 1), which is i / 2 and less than a half more.

    Raises:
        ExportError: an upsampling to another size than twice the old one, or one less.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not _aten.upsample_nearest2d.vec or node.args[1] is None:
            continue
        small, large = (_hints(each.meta["val"].shape[2:]) for each in (node.args[0], node))
        if any(2 * old - new not in (0, 1) for old, new in zip(small, large, strict=True)):
            raise ExportError(f"Core ML enlarges by two, and cannot make {large} of {small}")
        with graph.inserting_before(node):
            # Of what it looks like nobody reads more than that it is a tensor of this type.
            cut = graph.call_function(node.target, (node.args[0], None, [2.0, 2.0]))
            cut.meta["val"] = node.meta["val"]
            for axis, end in zip((2, 3), node.args[1], strict=True):
                if end == 2 * small[axis - 2]:
                    continue  # a number, of a graph for one size
                cut = graph.call_function(_aten.slice.Tensor, (cut, axis, 0, end))
                cut.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(cut)
        graph.erase_node(node)
    program.graph_module.recompile()


def _hints(sides: Iterable[Any]) -> list[int]:
    """Return sizes as they were when the program was captured."""
    return [int(getattr(getattr(each, "node", each), "hint", each)) for each in sides]


def _split_with_sizes(
    tensor: torch.Tensor, sizes: Sequence[int], dim: int = 0
) -> list[torch.Tensor]:
    ends = list(accumulate(sizes))
    starts = [0, *ends[:-1]]
    return [
        _aten.slice.Tensor(tensor, dim, start, end) for start, end in zip(starts, ends, strict=True)
    ]


def _new_ones(tensor: torch.Tensor, size: Sequence[int], **options: Any) -> torch.Tensor:
    return torch.full(tuple(size), 1, dtype=options.get("dtype") or tensor.dtype)


def _where_scalar_other(condition: torch.Tensor, one: torch.Tensor, other: float) -> torch.Tensor:
    return torch.where(condition, one, _constant(other, one.dtype))


def _where_scalar_self(condition: torch.Tensor, one: float, other: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, _constant(one, other.dtype), other)


def _where_scalars(condition: torch.Tensor, one: float, other: float) -> torch.Tensor:
    dtype = torch.result_type(torch.tensor(one), torch.tensor(other))
    return torch.where(condition, _constant(one, dtype), _constant(other, dtype))


def _constant(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((1,), value, dtype=dtype)
