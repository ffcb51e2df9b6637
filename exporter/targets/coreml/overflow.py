"""Normalisations in float16 that do not hide overflow from who looks at the result.

A variance of values beyond 256 may be more than float16 holds. It is then infinite, the values are
divided by infinity, and what remains of them is 0: a layer's offset, a plain grey image. Where a
divisor was made of many values, it becomes NaN instead of infinity: 0 times itself is added to it,
which is 0 for every other number. That works on one number for each group, not on the image.

`layer_norm`, `softmax` and the RMS normalisation that coremltools itself writes are operations that
an engine has as a whole, or scale values first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

NAME = "latentc::keep_overflow"
# Operation → its input that it divides by.
_DIVISOR = {"real_div": "y", "rsqrt": "x", "inverse": "x"}
# What stands between a reduction and the division, each value of one becoming one of the other.
_PASSED = {"add", "cast", "clip", "expand_dims", "maximum", "mul", "reshape", "sqrt", "square"}


@cache
def register() -> None:
    """Have coremltools know the pass as `NAME`: after all others, which look for patterns."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.helper import block_context_manager
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    guarded = block_context_manager(_guard)
    namespace, _, name = NAME.partition("::")

    class KeepOverflow(AbstractGraphPass):  # type: ignore[misc]
        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                guarded(function)

    KeepOverflow.__name__ = name
    register_pass(namespace=namespace)(KeepOverflow)


def _guard(block: Any) -> None:
    """Rewrite the divisions of a block of operations."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    for operation in list(block.operations):
        divisor = _divisor(operation)
        if divisor is None or divisor.dtype != types.fp16 or not _is_reduced(divisor):
            continue
        nothing = Builder.mul(x=divisor, y=np.float16(0), before_op=operation)
        kept = Builder.add(x=divisor, y=nothing, before_op=operation)
        block.replace_uses_of_var_after_op(
            anchor_op=kept.op, old_var=divisor, new_var=kept, end_op=operation
        )


def _divisor(operation: Any) -> Any:
    """Return what an operation divides by, or None."""
    if operation.op_type == "pow":
        power = operation.inputs["y"].val
        return operation.inputs["x"] if power is not None and np.all(power < 0) else None
    return operation.inputs.get(_DIVISOR.get(operation.op_type, ""))


def _is_reduced(value: Any) -> bool:
    """Return whether a value comes of an operation that makes many values one."""
    waiting = [value]
    while waiting:
        operation = waiting.pop().op
        if operation is None:
            continue
        if operation.op_type.startswith("reduce_"):
            return True
        if operation.op_type in _PASSED:
            waiting += [operation.inputs[name] for name in ("x", "y") if name in operation.inputs]
    return False
