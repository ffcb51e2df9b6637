"""Casts for operators on mixed types, which ONNX does not have: torch's own pass for them, but only
the operators that it changes run again.

`torch.onnx` runs the whole program with symbolic shapes to find the results' types, a quarter of
the time that a large UNet takes. They are known: the captured graph says them, and the pass leaves
the type of every result as it was.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock


def known_results() -> AbstractContextManager[Any]:
    """Inside, torch's pass takes the results of operators from the graph where it can."""
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter: Any = type_promotion._TypePromotionInterpreter
    usual = interpreter.run_node

    def run_node(self: Any, node: Any) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return usual(self, node)
        rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
        before = node.target, node.args, node.kwargs
        if rule is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        if (node.target, node.args, node.kwargs) == before:
            return node.meta["val"]
        return usual(self, node)  # what was promoted is not promoted again

    return mock.patch.object(interpreter, "run_node", run_node)
