"""Operators that work element by element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.mil.operators import Array, Operator

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
# Eigen's rational approximation of erf on [-4, 4] (generic_fast_erf_float): odd numerator and
# even denominator, highest power first; its error is below one unit of float32's last place.
_ERF_ABOVE = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06),
    *(-5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03),
    -1.60960333262415e-02,
)
_ERF_BELOW = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
    *(-7.37332916720468e-03, -1.42647390514189e-02),
)


def erf(x: Array) -> Array:
    """The error function."""
    x = np.clip(x.astype(np.float64), -4.0, 4.0)
    square = x * x
    return np.asarray(x * np.polyval(_ERF_ABOVE, square) / np.polyval(_ERF_BELOW, square))


def sigmoid(x: Array) -> Array:
    # Through tanh, which does not overflow.
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "EXACT":
        return np.asarray(0.5 * x * (1 + erf(x * np.float32(np.sqrt(0.5)))))
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
