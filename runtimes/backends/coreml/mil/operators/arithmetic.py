"""Operators that work element by element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.coreml.mil.operators.operator import Operator

_CASTS: Mapping[str, type[Any]] = {
    "fp16": np.float16,
    "fp32": np.float32,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "bool": np.bool_,
}
# Cephes' rational approximations of erf (ndtr.c, S. L. Moshier), exact to float64: below 1 and
# above, numerator and denominator, the highest power first.
_SMALL = (
    *(9.60497373987051638749e0, 9.00260197203842689217e1, 2.23200534594684319226e3),
    *(7.00332514112805075473e3, 5.55923013010394962768e4),
)
_SMALL_BELOW = (
    *(1.0, 3.35617141647503099647e1, 5.21357949780152679795e2, 4.59432382970980127987e3),
    *(2.26290000613890934246e4, 4.92673942608635921086e4),
)
_LARGE = (
    *(2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687e0),
    *(4.86371970985681366614e1, 1.96520832956077098242e2, 5.26445194995477358631e2),
    *(9.34528527171957607540e2, 1.02755188689515710272e3, 5.57535335369399327526e2),
)
_LARGE_BELOW = (
    *(1.0, 1.32281951154744992508e1, 8.67072140885989742329e1, 3.54937778887819891062e2),
    *(9.75708501743205489753e2, 1.82390916687909736289e3, 2.24633760818710981792e3),
    *(1.65666309194161350182e3, 5.57535340817727675546e2),
)


def erf(x: Array) -> Array:
    """Return the error function of `x`, in float64."""
    x = np.clip(x.astype(np.float64), -6.0, 6.0)
    size, square = np.abs(x), x * x
    small = x * np.polyval(_SMALL, square) / np.polyval(_SMALL_BELOW, square)
    rest = np.exp(-square) * np.polyval(_LARGE, size) / np.polyval(_LARGE_BELOW, size)
    return np.where(size < 1, small, np.sign(x) * (1 - rest))


def sigmoid(x: Array) -> Array:
    # Through tanh, which does not overflow.
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "EXACT":
        return np.asarray(0.5 * x * (1 + erf(x * np.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)
        return np.asarray(0.5 * x * (1 + np.tanh(inner)))
    return x * sigmoid(1.702 * x)  # SIGMOID_APPROXIMATION


def cast(x: Array, dtype: str) -> Array:
    return np.asarray(x).astype(_CASTS[dtype])


def clip(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(x, alpha, beta)


def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    return 1 / (x + np.float32(epsilon))


def log(x: Array, epsilon: float = 1e-45) -> Array:
    return np.log(x + np.float32(epsilon))


def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    return np.asarray(1 / np.sqrt(x + np.float32(epsilon)))


def real_div(x: Array, y: Array) -> Array:
    # Two integers are divided like C's.
    if np.result_type(x, y).kind in "iu":
        return np.asarray(np.trunc(np.true_divide(x, y)))
    return np.asarray(np.true_divide(x, y))


def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


def _by_keyword(function: Any, *names: str) -> Operator:
    def operator(**inputs: Any) -> Any:
        return function(*(inputs[name] for name in names))

    return operator


_ONE: Mapping[str, Any] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "cos": np.cos,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "identity": np.asarray,
    "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, 0),
    "round": np.rint,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "tanh": np.tanh,
}
_TWO: Mapping[str, Any] = {
    "add": np.add,
    "equal": np.equal,
    "floor_div": np.floor_divide,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,
    "mul": np.multiply,
    "not_equal": np.not_equal,
    "pow": np.power,
    "sub": np.subtract,
}
_WRITTEN_OUT = (cast, clip, erf, gelu, inverse, log, real_div, rsqrt, select, sigmoid, silu)

OPERATORS: Mapping[str, Operator] = {
    **{name: _by_keyword(function, "x") for name, function in _ONE.items()},
    **{name: _by_keyword(function, "x", "y") for name, function in _TWO.items()},
    **{function.__name__: function for function in _WRITTEN_OUT},
}
