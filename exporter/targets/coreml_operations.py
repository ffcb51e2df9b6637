"""Operations of PyTorch that coremltools does not translate, or not as PyTorch means them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch

_aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """For `exporter.decompose.decomposed`."""
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
