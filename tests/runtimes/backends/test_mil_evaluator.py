"""Packages read back from disk: rounding, compressed weights, shapes, batches, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.coreml.mil.evaluator import Evaluator
from latentc.runtimes.backends.coreml.mil.package import Limits, limits_of, read_spec
from latentc.runtimes.backends.coreml.mil.session import PackageSession, Stage, packages_of
from latentc.runtimes.backends.coreml.mil.toolkit import load_toolkit
from latentc.runtimes.bundle.sizes import fix
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import BackendError, BackendUnavailable, InputError

ROOT = Path(__file__).resolve().parents[3]
ct = load_toolkit()
mb = __import__("coremltools.converters.mil", fromlist=["Builder"]).Builder

Program = Callable[..., Any]


def saved(folder: Path, body: Program, shapes: Mapping[str, Any], half: bool = False) -> Path:
    """A package of one function of float32 tensors, computed in float16 if `half`."""
    specs = [mb.TensorSpec(shape=shape) for shape in shapes.values()]
    names = list(shapes)
    scope: dict[str, Any] = {"body": body}
    exec(f"def program({', '.join(names)}): return body({', '.join(names)})", scope)
    program = mb.program(input_specs=specs, opset_version=ct.target.iOS16)(scope["program"])
    model = ct.convert(
        program,
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    )
    model.save(str(folder / "model.mlpackage"))
    return folder / "model.mlpackage"


def evaluated(package: Path, **feeds: Any) -> list[np.ndarray]:
    found = Evaluator.load(package, read_spec(package)).predict(feeds)
    return list(found.values())


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_half_precision_is_rounded_after_each_operation(tmp_path: Path) -> None:
    weight = rand(6, 5, seed=1)

    def body(x: Any) -> Any:
        return mb.exp(x=mb.linear(x=x, weight=weight))

    package = saved(tmp_path, body, {"x": (4, 5)}, half=True)
    x = rand(4, 5)
    half = x.astype(np.float16).astype(np.float32)
    product = half @ weight.astype(np.float16).astype(np.float32).T
    expected = np.exp(product.astype(np.float16).astype(np.float32)).astype(np.float16)
    (found,) = evaluated(package, x=x)
    assert found.dtype == np.float32  # the package's output is float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_half_precision_overflows_to_infinity(tmp_path: Path) -> None:
    package = saved(tmp_path, lambda x: mb.square(x=x), {"x": (2,)}, half=True)
    (found,) = evaluated(package, x=np.array([300.0, 200.0], np.float32))
    assert found.tolist() == [np.inf, 40000.0]


def test_lists_and_several_outputs(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        first, second = mb.split(x=x, num_splits=2, axis=1)
        return mb.concat(values=[second, first], axis=1), mb.reduce_mean(x=first, axes=[1])

    package = saved(tmp_path, body, {"x": (2, 6)})
    x = rand(2, 6)
    joined, mean = evaluated(package, x=x)
    np.testing.assert_array_equal(joined, np.concatenate([x[:, 3:], x[:, :3]], axis=1))
    np.testing.assert_allclose(mean, x[:, :3].mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("precision", "kind", "most"),
    [
        ("int8", "constexpr_affine_dequantize", 0.02),
        ("palette8", "constexpr_lut_to_dense", 0.02),
        ("palette6", "constexpr_lut_to_dense", 0.05),
        ("palette4", "constexpr_lut_to_dense", 0.2),
    ],
)
def test_compressed_weights_are_read_back(
    precision: str, kind: str, most: float, tmp_path: Path
) -> None:
    from latentc.exporter.targets.coreml.weights import compress

    weight = rand(64, 64, seed=1)
    package = saved(tmp_path, lambda x: mb.linear(x=x, weight=weight), {"x": (3, 64)}, half=True)
    compress(ct.models.MLModel(str(package), skip_model_load=True), precision).save(str(package))
    x = rand(3, 64)
    (found,) = evaluated(package, x=x)
    error = np.linalg.norm(found - x @ weight.T) / np.linalg.norm(x @ weight.T)
    assert 1e-3 < error < most
    assert kind in _kinds(package)


def _kinds(package: Path) -> set[str]:
    function = read_spec(package).mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    return {operation.type for operation in block.operations}


def test_an_operator_that_is_not_there(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return mb.add(x=mb.tan(x=x), y=mb.atan(x=x))

    package = saved(tmp_path, body, {"x": (2,)})
    with pytest.raises(BackendError, match="has no operator atan, tan"):
        evaluated(package, x=rand(2))


def test_a_failing_operation_is_named(tmp_path: Path) -> None:
    package = saved(tmp_path, lambda x: mb.matmul(x=x, y=rand(3, 2)), {"x": (2, 3)})
    with pytest.raises(BackendError, match=r"\(matmul\)"):
        evaluated(package, x=rand(2, 4))


@pytest.mark.parametrize("what", ["empty", "missing", "cut"])
def test_a_damaged_package(what: str, tmp_path: Path) -> None:
    package = saved(tmp_path, lambda x: mb.square(x=x), {"x": (2,)})
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    if what == "missing":
        model.unlink()
    else:
        model.write_bytes(b"" if what == "empty" else model.read_bytes()[:40])
    with pytest.raises(BackendError, match=r"model\.mlpackage: not a"):
        read_spec(package)


COMPONENT = Component(
    name="denoiser",
    role="denoiser",
    inputs={
        "sample": TensorSpec("float32", ("batch", 2, "height")),
        "ids": TensorSpec("int64", ("batch", 3)),
        "timestep": TensorSpec("float32", (1,)),
    },
    outputs={"prediction": TensorSpec("float32", ("batch", 2, "height"))},
)


def limits(dtype: str, *ranges: tuple[int, int]) -> Limits:
    return Limits(np.dtype(dtype), (tuple(low for low, _ in ranges),), ranges)


def fake_session(batch: int, seen: list[Any], component: Component = COMPONENT) -> PackageSession:
    """Two stages: doubling, then adding what the first stage got besides."""

    def first(feeds: Any) -> Any:
        seen.append({name: (value.shape, str(value.dtype)) for name, value in feeds.items()})
        return {"doubled": 2 * feeds["sample"]}

    def second(feeds: Any) -> Any:
        return {"prediction": feeds["doubled"] + feeds["ids"][:, :1, None] + feeds["timestep"]}

    rows, ids = ((batch, batch), (2, 2), (4, 8)), ((batch, batch), (3, 3))
    stages = [
        Stage({"sample": limits("float32", *rows)}, first),
        Stage(
            {
                "doubled": limits("float32", *rows),
                "ids": limits("int32", *ids),
                "timestep": limits("float32", (1, 1)),
            },
            second,
        ),
    ]
    return PackageSession(component, stages)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("one_size", [False, True])
def test_a_batch_is_split_into_calls(batch: int, rows: int, one_size: bool) -> None:
    seen: list[Any] = []
    component = fix(COMPONENT, {"batch": rows, "height": 5}) if one_size else COMPONENT
    session = fake_session(batch, seen, component)
    feeds = {
        "sample": rand(rows, 2, 5),
        "ids": np.arange(3 * rows).reshape(rows, 3),
        "timestep": np.array([0.5], np.float32),
    }
    found = session.run(feeds)["prediction"]
    expected = 2 * feeds["sample"] + feeds["ids"][:, :1, None] + 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    assert len(seen) == -(-rows // batch)
    assert all(each == {"sample": ((batch, 2, 5), "float32")} for each in seen)


def test_sizes_outside_the_range() -> None:
    session = fake_session(2, [])
    feeds = {
        "sample": rand(3, 2, 9),
        "ids": np.zeros((3, 3), np.int64),
        "timestep": np.zeros(1, np.float32),
    }
    assert not session.accepts(feeds)
    with pytest.raises(InputError, match=r"'sample'.*\[3, 2, 9\].*it takes \[2, 2, 4 to 8\]"):
        session.run(feeds)


def test_enumerated_and_fixed_shapes(tmp_path: Path) -> None:
    import torch

    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 2 * x + y.sum()

    example = (torch.ones(1, 4, 6), torch.ones(3))
    program = torch.export.export(
        Double(), example, dynamic_shapes=({1: torch.export.Dim.AUTO}, {})
    )
    shapes = ct.EnumeratedShapes([(1, 4, 6), (1, 8, 6)], default=(1, 4, 6))
    ct.convert(
        program.run_decompositions({}),
        inputs=[ct.TensorType(name="x", shape=shapes), ct.TensorType(name="y", shape=(3,))],
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    ).save(str(tmp_path / "model.mlpackage"))
    found = limits_of(read_spec(tmp_path / "model.mlpackage"))
    assert str(found["x"]) == "[1, 4, 6] or [1, 8, 6]"
    assert found["x"].allows((1, 8, 6))
    assert not found["x"].allows((1, 6, 6))
    assert str(found["y"]) == "[3]"
    assert found["x"].batch == 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"packages": []}', '{"packages": ["../other.mlpackage"]}',
     '{"packages": ["model.onnx"]}', '{"packages": [1]}'],
)  # fmt: skip
def test_a_bad_list_of_packages(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(BackendError, match="not a list of packages"):
        packages_of(tmp_path / "model.json")


def test_a_list_of_packages(tmp_path: Path) -> None:
    entry = tmp_path / "model.json"
    entry.write_text(json.dumps({"packages": ["a.mlpackage", "b.mlpackage"]}))
    assert packages_of(entry) == [tmp_path / "a.mlpackage", tmp_path / "b.mlpackage"]


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
def test_core_ml_itself_is_elsewhere() -> None:
    with pytest.raises(BackendUnavailable, match=r"macOS only.*'coreml-reference'"):
        engines.get("coreml")


class FakeModel:
    """coremltools' MLModel as the backend uses it, computed by the evaluator."""

    units: ClassVar[list[str]] = []

    def __init__(self, path: str, compute_units: str) -> None:
        self.units.append(compute_units)
        self._package = Path(path)

    def get_spec(self) -> Any:
        return read_spec(self._package)

    def predict(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return Evaluator.load(self._package, self.get_spec()).predict(feeds)


def test_the_backend_for_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wiring, with Core ML itself replaced."""
    units = {name: name for name in ("ALL", "CPU_AND_GPU", "CPU_AND_NE", "CPU_ONLY")}
    models = SimpleNamespace(MLModel=FakeModel)
    fake = SimpleNamespace(__version__="9.0", ComputeUnit=units, models=models)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("latentc.runtimes.backends.coreml.device.load_toolkit", lambda: fake)
    package = saved(tmp_path, lambda x: mb.square(x=x, name="y"), {"x": (1, 2)})
    (tmp_path / "model.json").write_text(json.dumps({"packages": [package.name]}))
    spec = TensorSpec("float32", ("batch", 2))
    component = Component("denoiser", "denoiser", {"x": spec}, {"y": spec})
    backend = engines.get("coreml")
    assert backend.devices() == list(units)
    session = backend.open(tmp_path / "model.json", component, "cpu_and_ne")
    assert FakeModel.units == ["CPU_AND_NE"]
    x = rand(3, 2)
    np.testing.assert_allclose(session.run({"x": x})["y"], x * x, rtol=1e-6)


TORCH_FREE = """
import sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None  # as where it is not installed
from pathlib import Path
import numpy as np
from latentc.runtimes.backends.coreml.mil.evaluator import Evaluator
from latentc.runtimes.backends.coreml.mil.package import read_spec
package = Path(sys.argv[1])
found = Evaluator.load(package, read_spec(package)).predict({"x": np.ones(2, np.float32)})
assert [value.tolist() for value in found.values()] == [[1.0, 1.0]], found
"""


def test_without_torch(tmp_path: Path) -> None:
    package = saved(tmp_path, lambda x: mb.square(x=x), {"x": (2,)})
    subprocess.run([sys.executable, "-c", TORCH_FREE, package], cwd=ROOT, check=True, timeout=120)
