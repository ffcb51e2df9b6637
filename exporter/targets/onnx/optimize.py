"""onnxscript's optimiser, less what takes a large model minutes.

One of its rules, for pairs of Slices that are the halves of a Split, looks through the whole graph
at every node: two thirds of the time that it takes to write a UNet. The graphs here have Splits to
begin with. Its constant folding would transpose each matrix of weights in memory, and keep it;
`latentc.exporter.targets.onnx.weights` does that as they are written.
"""

from __future__ import annotations

from typing import Any

_STEPS = 2  # what onnxscript.optimizer.optimize_ir has


def optimise(model: Any) -> None:
    """Simplify an `onnx_ir.Model` in place: what `torch.onnx.export(optimize=True)` does, less the
    above."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import rewriter
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import onnx_fusions
    from onnxscript.rewriter.rules.common import slice_split_rule

    rules: Any = [each for each in rewriter._DEFAULT_REWRITE_RULES if each is not slice_split_rule]

    class Fold(ir.passes.InPlacePass):  # type: ignore[misc]
        def call(self, model: Any) -> Any:
            made: Any = fold_constants_ir(
                model, onnx_shape_inference=True, should_fold=_is_worth_folding
            )
            return ir.passes.PassResult(model, made.modified)

    repeated = ir.passes.PassManager(
        [
            Fold(),
            rewriter.RewritePass(rules),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        ],
        steps=_STEPS,
        early_stop=True,
    )
    ir.passes.Sequential(
        common.InlinePass(),
        repeated,
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    onnx_fusions.fuse(model)


def _is_worth_folding(node: Any) -> bool | None:
    """None leaves it to onnxscript."""
    import onnx_ir as ir

    large = any(isinstance(v.const_value, ir.LazyTensor) for v in node.inputs if v is not None)
    return False if large else None
