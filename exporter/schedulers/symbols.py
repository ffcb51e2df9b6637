"""Symbols: tensors that record which linear combination of inputs they are.

A symbol has the shape (1, WIDTH, 1, 1), one number per basis vector, in float64. Linear
operations work on it as on any tensor, so a scheduler can be run on symbols instead of images
and what comes out are its coefficients. Every other operation is refused by name: what is not
linear cannot be written into a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

# Basis: the state's slots, then the model's output, the clipped clean sample and the noise.
MAX_SLOTS = 20
OUTPUT, CLEAN, NOISE = MAX_SLOTS, MAX_SLOTS + 1, MAX_SLOTS + 2
WIDTH = MAX_SLOTS + 3
SHAPE = (1, WIDTH, 1, 1)

_METADATA = frozenset({"__get__", "dim", "size", "numel", "is_floating_point", "is_complex"})
_METADATA_FIELDS = frozenset({"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda"})
_SUMS = frozenset({"add", "sub", "rsub"})
_PRODUCTS = frozenset({"mul", "multiply"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide"})
_UNARY = frozenset({"neg", "clone", "stack", "contiguous", "detach", "zeros_like"})
_CASTS = frozenset({"to", "float", "double", "type_as"})


class NotLinear(Exception):
    """The scheduler did something to a symbol that a plan cannot express."""


class Symbol(torch.Tensor):
    """A linear combination of the basis; see the module's docstring."""

    clamp_hook: Callable[[Symbol, Any, Any], Symbol] | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        operation = name.strip("_")  # add_ is add, __rsub__ is rsub
        if name in _METADATA:
            return _metadata(func, name, args, options)
        if operation in _CASTS:
            return args[0]  # symbols stay in float64: a plan is more exact than its scheduler
        if operation in {"clamp", "clip"} and cls.clamp_hook is not None:
            low, high = _clamp_bounds(args, options)
            return cls.clamp_hook(args[0], low, high)
        _require_linear(operation, name, args, options)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **options)
        return result if isinstance(result, Symbol) else result.as_subclass(Symbol)


def unit(index: int) -> Symbol:
    """Return the basis vector `index`, float64 of shape `SHAPE`."""
    vector = torch.zeros(SHAPE, dtype=torch.float64)
    vector[0, index] = 1.0
    return vector.as_subclass(Symbol)


def poison() -> Symbol:
    """Return a symbol beyond the basis: whoever reads it gets NaN, which is found later."""
    return torch.full(SHAPE, float("nan"), dtype=torch.float64).as_subclass(Symbol)


def coefficients(symbol: Any) -> torch.Tensor:
    """Return the plain vector float64 [WIDTH] of a symbol; raise `NotLinear` for anything else."""
    if not isinstance(symbol, Symbol):
        raise NotLinear(f"a {type(symbol).__name__} in place of a tensor of the sampler's state")
    with torch._C.DisableTorchFunctionSubclass():
        plain = symbol.as_subclass(torch.Tensor)
    if plain.shape != SHAPE:
        raise NotLinear(f"a tensor reshaped to {tuple(plain.shape)}")
    return plain.reshape(WIDTH)


def _metadata(
    func: Callable[..., Any], name: str, args: Sequence[Any], options: dict[str, Any]
) -> Any:
    if name == "__get__":
        field = getattr(getattr(func, "__self__", None), "__name__", "")
        if field not in _METADATA_FIELDS:
            raise NotLinear(f"Tensor.{field}")
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **options)


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _require_linear(
    operation: str, name: str, args: Sequence[Any], options: Mapping[str, Any]
) -> None:
    operands = list(_flat((*args, *options.values())))
    symbols = [isinstance(operand, Symbol) for operand in operands]
    if operation in _SUMS:
        for operand in operands:
            if not isinstance(operand, Symbol) and not _is_zero(operand, options):
                if isinstance(operand, torch.Tensor) and not operand.isfinite().all():
                    raise NotLinear("has coefficients that are not finite")
                raise NotLinear(f"{name} with a constant")
    elif operation in _PRODUCTS or operation in _QUOTIENTS:
        if sum(symbols) != 1 or (operation in _QUOTIENTS and not symbols[0]):
            raise NotLinear(f"{name} of two tensors that depend on the sample")
        if not all(_is_scalar(operand) for operand in operands if not isinstance(operand, Symbol)):
            raise NotLinear(f"{name} with a factor that is not one number")
    elif operation == "einsum":
        if sum(symbols) != 1:
            raise NotLinear("einsum of two tensors that depend on the sample")
    elif operation not in _UNARY:
        raise NotLinear(name)


def _is_zero(operand: Any, options: Mapping[str, Any]) -> bool:
    if isinstance(operand, torch.Tensor):
        return bool((operand == 0).all())
    # `alpha` of add and sub is a factor, not a summand
    return operand == 0 or any(operand is value for value in options.values())


def _is_scalar(operand: Any) -> bool:
    if isinstance(operand, torch.Tensor):
        return operand.numel() == 1
    return operand is None or isinstance(operand, (int, float)) or getattr(operand, "ndim", 1) == 0


def _clamp_bounds(args: Sequence[Any], options: Mapping[str, Any]) -> tuple[Any, Any]:
    low = args[1] if len(args) > 1 else options.get("min")
    high = args[2] if len(args) > 2 else options.get("max")
    return low, high
