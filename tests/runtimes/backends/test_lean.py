"""Large components in little memory: ONNX Runtime leaves weights in their files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentc.benchmarks.measure import run_child
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.backends.session import Session
from latentc.runtimes.pipeline import pipeline
from tests.support.fakes import FakeBackend, make_bundle

WIDTH, LAYERS = 2048, 8  # 64 MiB in float16

RUN = """
import sys
from pathlib import Path
import numpy as np
from latentc.benchmarks.measure import anonymous_memory, report
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.backends.onnxruntime import OnnxRuntimeBackend
from latentc.runtimes.bundle.structures import Component, TensorSpec
spec = TensorSpec("float32", ("batch", int(sys.argv[2])))
component = Component("denoiser", "denoiser", {"sample": spec}, {"prediction": spec})
before = anonymous_memory()
options = SessionOptions(lean=sys.argv[3] == "lean", threads=1)
session = OnnxRuntimeBackend()._open(Path(sys.argv[1]), component, "cpu", options)
sample = np.linspace(-1, 1, 3 * int(sys.argv[2]), dtype=np.float32).reshape(3, -1)
made = session.run({"sample": sample})["prediction"]
report([anonymous_memory() - before, made.tolist()])
"""


def write_model(path: Path) -> None:
    """Products with weights that are stored in float16 and widened in the graph."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "sample"
    for index in range(LAYERS):
        values = random.standard_normal((WIDTH, WIDTH)).astype(np.float16) / 64
        weights.append(numpy_helper.from_array(values.astype(np.float16), f"w{index}"))
        out = "prediction" if index == LAYERS - 1 else f"x{index}"
        nodes.append(helper.make_node("Cast", [f"w{index}"], [f"f{index}"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("MatMul", [last, f"f{index}"], [out]))
        last = out
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH])
        for name in ("sample", "prediction")
    ]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="model.data")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    write_model(tmp_path / "model.onnx")
    size = 2 * WIDTH * WIDTH * LAYERS
    arguments = ["-c", RUN, str(tmp_path / "model.onnx"), str(WIDTH)]
    (lean, made), (usual, expected) = (
        run_child([*arguments, how]).result for how in ("lean", "usual")
    )
    assert usual > 1.5 * size
    assert lean < 0.5 * size
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("low_memory", "limit", "lean"),
    [
        (True, 1, True),
        (True, 1 << 40, False),
        (False, 1, False),
    ],
)
def test_large_components_are_lean_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_memory: bool, limit: int, lean: bool
) -> None:
    asked: list[SessionOptions] = []
    opened = FakeBackend._open

    def open_(self: FakeBackend, entry: Path, component: Any, device: str, options: Any) -> Session:
        asked.append(options)
        return opened(self, entry, component, device, options)

    monkeypatch.setattr(FakeBackend, "_open", open_)
    monkeypatch.setattr(pipeline, "LEAN", limit)
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    bundle = make_bundle(tmp_path / "bundle")
    with pipeline.load(bundle, FakeBackend(), low_memory=low_memory) as pipe:
        pipe("a", num_inference_steps=4, seed=0)
    assert {each.lean for each in asked} == {lean}
