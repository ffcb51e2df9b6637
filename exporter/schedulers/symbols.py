"""Symbols: stand-ins for tensors that record which linear combination of inputs they are.

A symbol has the shape (1, WIDTH, 1, 1), one number per basis vector, in float64. Linear
operations work on it as on any tensor, so a scheduler can be run on symbols instead of images
and what comes out are its coefficients. Every other operation is refused by name: what is not
linear cannot be written into a plan.

A symbol is no tensor but holds an array of NumPy: tracing runs millions of sums and products of
few numbers, each of which takes PyTorch several times as long.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from latentc.runtimes.sampling.plan import Floats

# Basis: the state's slots, then the model's output, the clipped clean sample and the noise.
MAX_SLOTS = 20
OUTPUT, CLEAN, NOISE = MAX_SLOTS, MAX_SLOTS + 1, MAX_SLOTS + 2
WIDTH = MAX_SLOTS + 3
SHAPE = (1, WIDTH, 1, 1)

_SUMS: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda one, other: other - one,
}
_PRODUCTS = frozenset({"mul", "multiply"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "truediv"})
_SHAPING = frozenset({"stack", "einsum"})
_COPIES = frozenset({"clone", "contiguous", "detach"})
_CASTS = frozenset({"to", "float", "double", "type_as"})
_METADATA: Mapping[str, Callable[[Floats], Any]] = {
    "dim": lambda array: array.ndim,
    "size": lambda array: torch.Size(array.shape),
    "numel": lambda array: array.size,
    "is_floating_point": lambda _: True,
    "is_complex": lambda _: False,
}
_METHODS = frozenset(
    {*_SUMS, *_PRODUCTS, *_QUOTIENTS, *_COPIES, *_CASTS, *_METADATA, "neg", "clamp", "clip"}
)
_DOUBLE, _CPU = torch.float64, torch.device("cpu")


class NotLinear(Exception):
    """The scheduler did something to a symbol that a plan cannot express."""


class Symbol:
    """A linear combination of the basis; see the module's docstring."""

    __slots__ = ("array",)
    __array_ufunc__ = None  # NumPy's numbers leave their operators to the symbol
    __hash__ = object.__hash__
    clamp_hook: Callable[[Symbol, Any, Any], Symbol] | None = None

    dtype, device, requires_grad, is_cuda = _DOUBLE, _CPU, False, False

    def __init__(self, array: Floats) -> None:
        self.array = array  # is never changed, so that several symbols may share it

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the tensor that the symbol stands for."""
        return torch.Size(self.array.shape)

    @property
    def ndim(self) -> int:
        """Return the number of its axes."""
        return self.array.ndim

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name.strip("_") in _SHAPING:
            return _reshaped(func, name, args, kwargs or {})
        return _computed(name, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.rstrip("_") not in _METHODS:
            raise NotLinear(f"Tensor.{name}")
        return partial(self._called, name)

    def _called(self, name: str, *others: Any, **options: Any) -> Any:
        return _computed(name, (self, *others), options)

    def __neg__(self) -> Symbol:
        return Symbol(-self.array)

    def __add__(self, other: Any) -> Symbol:
        return _sum("add", self, other)

    def __sub__(self, other: Any) -> Symbol:
        return _sum("sub", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return _sum("rsub", self, other)

    def __mul__(self, other: Any) -> Symbol:
        return Symbol(self.array * _factor("mul", other))

    def __truediv__(self, other: Any) -> Symbol:
        return Symbol(self.array / _factor("div", other))

    def __rtruediv__(self, other: Any) -> Symbol:
        raise NotLinear("div of two tensors that depend on the sample")

    def __iadd__(self, other: Any) -> Symbol:
        return self._becomes(self + other)

    def __isub__(self, other: Any) -> Symbol:
        return self._becomes(self - other)

    def __imul__(self, other: Any) -> Symbol:
        return self._becomes(self * other)

    def __itruediv__(self, other: Any) -> Symbol:
        return self._becomes(self / other)

    def _becomes(self, other: Symbol) -> Symbol:
        """Take another's place, as a tensor does that is changed in place."""
        self.array = other.array
        return self

    __radd__, __rmul__ = __add__, __mul__


def _refuse_operators() -> None:
    """Refuse by name what Python would do to a symbol by itself, or without a word of what."""

    def refusal(name: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> Any:
            raise NotLinear(name.strip("_"))

        return refuse

    for name in (
        *("__pow__", "__rpow__", "__matmul__", "__rmatmul__", "__mod__", "__floordiv__"),
        *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__abs__", "__invert__"),
        *("__bool__", "__float__", "__int__", "__index__", "__len__", "__iter__"),
        *("__getitem__", "__setitem__", "__array__"),
    ):
        setattr(Symbol, name, refusal(name))


_refuse_operators()


def unit(index: int) -> Symbol:
    """Return the basis vector `index`."""
    return Symbol(_UNITS[index])


def poison() -> Symbol:
    """Return a symbol beyond the basis: whoever reads it gets NaN, which is found later."""
    return Symbol(np.full(SHAPE, np.nan))


_UNITS = np.eye(WIDTH).reshape(WIDTH, *SHAPE)
_UNITS.setflags(write=False)


def coefficients(symbol: Any) -> Floats:
    """Return the numbers f8[WIDTH] of a symbol; raise `NotLinear` for anything else."""
    if not isinstance(symbol, Symbol):
        raise NotLinear(f"a {type(symbol).__name__} in place of a tensor of the sampler's state")
    if symbol.array.shape != SHAPE:
        raise NotLinear(f"a tensor reshaped to {tuple(symbol.array.shape)}")
    return symbol.array.reshape(WIDTH)


def _computed(name: str, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Return what the function or method of PyTorch of this name makes of symbols."""
    operation = name.strip("_")  # add_ is add, __rsub__ is rsub
    if operation in _CASTS:
        return args[0]  # symbols stay in float64: a plan is more exact than its scheduler
    if operation in _METADATA:
        return _METADATA[operation](args[0].array)
    if operation in {"clamp", "clip"} and Symbol.clamp_hook is not None:
        return Symbol.clamp_hook(args[0], *_clamp_bounds(args, options))
    symbol = _linear(operation, name, args, options)
    changed_in_place = name.endswith("_") and not name.endswith("__")
    return args[0]._becomes(symbol) if changed_in_place else symbol


def _linear(operation: str, name: str, args: Sequence[Any], options: Mapping[str, Any]) -> Symbol:
    """Return the linear combination that an operation makes, or refuse it by name."""
    if operation in _COPIES:
        return Symbol(args[0].array)
    if operation == "neg":
        return Symbol(-args[0].array)
    if operation == "zeros_like":
        return Symbol(np.zeros_like(args[0].array))
    if operation in _SUMS:
        one, other = args[:2] if len(args) > 1 else (args[0], options["other"])
        alpha = options.get("alpha", 1)
        return _sum(operation, one, other if alpha == 1 else other * alpha)
    if operation in _PRODUCTS:
        one, other = args[:2]
        return Symbol.__mul__(one, other) if isinstance(one, Symbol) else Symbol.__mul__(other, one)
    if operation in _QUOTIENTS and isinstance(args[0], Symbol) and not options:
        return Symbol.__truediv__(args[0], args[1])
    if operation in _QUOTIENTS:
        raise NotLinear(f"{operation} of two tensors that depend on the sample")
    raise NotLinear(operation)


def _sum(name: str, one: Any, other: Any) -> Symbol:
    """Return the sum or difference of two symbols, or of one and zero."""
    for operand in (one, other):
        if not isinstance(operand, Symbol) and not _is_zero(operand):
            if isinstance(operand, torch.Tensor) and not operand.isfinite().all():
                raise NotLinear("has coefficients that are not finite")
            raise NotLinear(f"{name} with a constant")
    arrays = (each.array if isinstance(each, Symbol) else 0.0 for each in (one, other))
    return Symbol(_SUMS[name](*arrays))


def _is_zero(operand: Any) -> bool:
    return bool((operand == 0).all()) if isinstance(operand, torch.Tensor) else operand == 0


def _factor(name: str, value: Any) -> float:
    """Return a factor as a number; `NotLinear` where it is none."""
    kind = type(value)
    if kind is float or kind is int:
        return value  # type: ignore[no-any-return]
    if isinstance(value, Symbol):
        raise NotLinear(f"{name} of two tensors that depend on the sample")
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return value.item()
    elif isinstance(value, (int, float)) or getattr(value, "ndim", 1) == 0:
        return float(value)
    raise NotLinear(f"{name} with a factor that is not one number")


def _reshaped(
    func: Callable[..., Any], name: str, args: Sequence[Any], options: Mapping[str, Any]
) -> Symbol:
    """Return what PyTorch itself makes of symbols that are stacked, or summed with weights."""
    symbols = sum(isinstance(operand, Symbol) for operand in _flat((*args, *options.values())))
    if name.strip("_") == "einsum" and symbols != 1:
        raise NotLinear("einsum of two tensors that depend on the sample")
    result = func(*_as_tensors(args), **{key: _as_tensors(v) for key, v in options.items()})
    return Symbol(result.numpy())


def _as_tensors(value: Any) -> Any:
    """Return a value with tensors in the place of its symbols, and of numbers beside them."""
    if isinstance(value, Symbol):
        return torch.from_numpy(value.array.copy())
    if isinstance(value, (list, tuple)):
        return type(value)(_as_tensors(each) for each in value)
    if isinstance(value, torch.Tensor):
        return value.double()
    return value


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _clamp_bounds(args: Sequence[Any], options: Mapping[str, Any]) -> tuple[Any, Any]:
    low = args[1] if len(args) > 1 else options.get("min")
    high = args[2] if len(args) > 2 else options.get("max")
    return low, high
