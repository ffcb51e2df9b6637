"""Attention in ONNX: what is fused, that it computes the same everywhere, and in little memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from latentc.exporter.targets.onnx import lowering as target
from latentc.exporter.targets.onnx.attention import DOMAIN, NAME
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.verification.verify import relative_l2

HEADS, WIDTH = 4, 6
TOKENS = TensorSpec("float32", ("batch", "tokens", HEADS * WIDTH))
TEXT = TensorSpec("float32", ("batch", "sequence", HEADS * WIDTH))
COMPONENT = Component("denoiser", "denoiser", {"x": TOKENS, "text": TEXT}, {"y": TOKENS})


class Block(torch.nn.Module):
    """Self-attention, cross-attention with a scale, a causal one, and one whose output is not
    transposed back at once."""

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        q, k = self.split(x), self.split(text)
        made = x + self.join(scaled_dot_product_attention(q, q, q))
        made = made + self.join(scaled_dot_product_attention(self.split(made), k, k, scale=0.5))
        made = made + self.join(scaled_dot_product_attention(q, q, q, is_causal=True))
        last = scaled_dot_product_attention(self.split(made), k * 2, k + 1)
        return (made + self.join(last + last.flip(1)),)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, HEADS, WIDTH).transpose(1, 2)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    batch, tokens, sequence = (torch.export.Dim(n) for n in ("batch", "tokens", "sequence"))
    program = torch.export.export(
        Block().eval(),
        (),
        kwargs=arrays(2, 10, 7),
        dynamic_shapes={"x": {0: batch, 1: tokens}, "text": {0: batch, 1: sequence}},
    )
    return folder / target.lower(program, COMPONENT, folder)


def arrays(batch: int, tokens: int, sequence: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"x": (batch, tokens), "text": (batch, sequence)}
    return {
        name: torch.randn(*size, HEADS * WIDTH, generator=generator) for name, size in sizes.items()
    }


def by_onnxruntime(entry: Path, feeds: dict[str, np.ndarray]) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(entry)).run(None, feeds)[0]


def by_openvino(entry: Path, feeds: dict[str, np.ndarray]) -> Any:
    import openvino

    compiled = openvino.Core().compile_model(entry, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(feeds)[0]


def by_the_function(entry: Path, feeds: dict[str, np.ndarray]) -> Any:
    """ONNX's own evaluator has no MultiHeadAttention: it takes the one in the file."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(str(entry)).run(None, feeds)[0]


def test_what_is_fused(entry: Path) -> None:
    model = onnx.load(entry)
    found = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert found[DOMAIN, NAME] == 3
    assert found["", "Attention"] == 1  # the causal one
    (function,) = model.functions
    assert {node.domain for node in function.node} == {""}
    scales = [a.f for n in model.graph.node if n.op_type == NAME for a in n.attribute if a.f]
    assert sorted(scales) == pytest.approx([WIDTH**-0.5, WIDTH**-0.5, 0.5])


@pytest.mark.parametrize("run", [by_onnxruntime, by_openvino, by_the_function])
def test_the_same_numbers(entry: Path, run: Any) -> None:
    inputs = arrays(3, 21, 5)  # not the sizes that were traced
    with torch.no_grad():
        (expected,) = Block()(**inputs)
    found = run(entry, {name: value.numpy() for name, value in inputs.items()})
    assert relative_l2(np.asarray(found), expected.numpy()) <= 2e-6


PEAK = """
import resource, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
tokens = int(sys.argv[2])
before = peak()
session.run(None, {name: np.ones((1, tokens, 24), np.float32) for name in ("x", "text")})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_no_matrix_of_scores(tmp_path: Path) -> None:
    class Large(Block):
        def forward(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.join(scaled_dot_product_attention(*map(self.split, (x, text, text)))),)

    tokens = torch.export.Dim("tokens")
    sequence = torch.export.Dim("sequence")
    program = torch.export.export(
        Large().eval(),
        (),
        kwargs=arrays(1, 10, 7),
        dynamic_shapes={"x": {1: tokens}, "text": {1: sequence}},
    )
    spec = {name: TensorSpec("float32", (1, size, HEADS * WIDTH))
            for name, size in (("x", "tokens"), ("text", "sequence"))}  # fmt: skip
    component = Component("denoiser", "denoiser", spec, {"y": spec["x"]})
    entry = tmp_path / target.lower(program, component, tmp_path)
    count = 3072
    command = [sys.executable, "-c", PEAK, str(entry), str(count)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert taken < HEADS * count**2 * 4 / 3  # 151 MB: a third of all scores
