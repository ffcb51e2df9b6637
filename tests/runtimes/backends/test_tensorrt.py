"""TensorRT builds: recipes, engines and their staleness, sessions. The engine is a stand-in: see
`tests.support.fake_tensorrt` for what that shows and what it does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentc
from latentc import cli
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.recipe import Recipe, check_profile, parse_range
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    DeviceUnavailable,
    InputError,
)
from latentc.runtimes.verification.verify import relative_l2
from tests.support.fake_tensorrt import Machine, installed

CALL: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def bundle(tensorrt_bundle: Path) -> Path:
    return tensorrt_bundle


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    with installed(Machine()) as made:
        yield made


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# --- recipes ----------------------------------------------------------------------------


def test_the_recipes_in_a_bundle(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    for build, precision in (("tensorrt-fp32", "float32"), ("tensorrt-fp16", "float16")):
        recipe = Recipe.load(bundle / build / "denoiser" / "recipe.json")
        assert (recipe.precision, recipe.note, recipe.tf32) == (precision, "", False)
        # Images of 32 × 32 pixels, 16 × 16 latents; the probes reach 24 and 16 and batch 3.
        assert recipe.profile == {
            "batch": (1, 2, 8),
            "height": (1, 16, 24),
            "width": (1, 16, 24),
            "sequence": (77, 77, 154),
        }
        assert recipe.shapes(manifest.component("denoiser")) == {
            "sample": ((1, 4, 1, 1), (2, 4, 16, 16), (8, 4, 24, 24)),
            "timestep": ((1,), (2,), (8,)),
            "encoder_hidden_states": ((1, 77, 32), (2, 77, 32), (8, 154, 32)),
        }
    decoder = Recipe.load(bundle / "tensorrt-fp32" / "vae_decoder" / "recipe.json")
    assert decoder.profile["batch"] == (1, 1, 4)
    files = {f.path for f in manifest.builds[0].artifacts["denoiser"].files}
    assert any(path.endswith("/recipe.json") for path in files)


def test_the_graphs_are_typed(bundle: Path) -> None:
    import onnx

    for build, half in (("tensorrt-fp32", False), ("tensorrt-fp16", True)):
        model = onnx.load(bundle / build / "denoiser" / "model.onnx", load_external_data=False)
        assert model.opset_import[0].version == 18
        weights = {initializer.data_type for initializer in model.graph.initializer}
        assert (onnx.TensorProto.FLOAT16 in weights) is half
        for value in [*model.graph.input, *model.graph.output]:
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert not [node for node in model.graph.node if node.op_type == "Attention"]


# Of docs/operators.md in onnx/onnx-tensorrt at its 10.1 release, those that these graphs need; an
# operator that is new here must be looked up there first.
READABLE = (
    "Add Cast Clip Concat Conv Cos Div Erf Expand Gather Gemm InstanceNormalization IsNaN "
    "LayerNormalization MatMul Mul Reshape Resize Shape Sigmoid Sin Slice Softmax Split Squeeze "
    "Transpose Unsqueeze Where"
)


def test_operators_that_tensorrt_reads(bundle: Path) -> None:
    import onnx

    for path in bundle.rglob("model.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert {node.op_type for node in model.graph.node} <= set(READABLE.split()), path
        assert {node.domain for node in model.graph.node} == {""}
        for node in model.graph.node:
            if node.op_type == "Resize":
                modes = {a.name: a.s.decode() for a in node.attribute if a.s}
                assert modes["coordinate_transformation_mode"] in ("asymmetric", "half_pixel")
                assert modes["nearest_mode"] in ("floor", "ceil", "round_prefer_floor")


def test_verified_by_what_it_says(bundle: Path) -> None:
    for build in Manifest.load(bundle).builds:
        assert build.verification is not None
        assert build.verification.passed
        assert (build.verification.backend, build.verification.device) == ("onnxruntime", "cpu")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{}", "missing required field"),
        ('{"format": 2, "precision": "float32", "profile": {}}', "format 2, .* reads 1"),
        ('{"format": 1, "precision": "x", "profile": {"batch": [1, 2]}}', "batch|length"),
        ('{"format": 1, "precision": "x", "profile": {}, "more": 1}', "unknown field `more`"),
    ],
)
def test_damaged_recipes(tmp_path: Path, document: str, message: str) -> None:
    (tmp_path / "recipe.json").write_text(document)
    with pytest.raises(BundleError, match=message):
        Recipe.load(tmp_path / "recipe.json")


def test_ranges() -> None:
    assert parse_range("--images", "1:2:8") == (1, 2, 8)
    assert parse_range("--height", "512") == (512, 512, 512)
    for text in ("1:2", "a", "", "0:1:2", "4:2:8", "-1"):
        with pytest.raises(InputError, match="--images"):
            parse_range("--images", text)


def test_outside_of_a_profile() -> None:
    profile = {"sample": ((1, 4, 2, 2), (2, 4, 8, 8), (4, 4, 16, 16))}
    check_profile("denoiser", {"sample": (4, 4, 2, 16)}, profile)
    with pytest.raises(InputError, match=r"'sample' of shape \[5, 4, 8, 8\] .*\[4, 4, 16, 16\]"):
        check_profile("denoiser", {"sample": (5, 4, 8, 8)}, profile)


# --- building ---------------------------------------------------------------------------


def test_build_and_generate(bundle: Path, machine: Machine, run: Run, tmp_path: Path) -> None:
    code, out, err = run("build", bundle, "--target", "tensorrt", "--build", "tensorrt-fp32")
    assert (code, out.count("built in")) == (0, 3), err
    assert len(machine.built) == 3
    assert not [plan for plan in machine.built if plan["settings"]["tf32"]]
    with latentc.load(bundle, "tensorrt", build="tensorrt-fp32") as pipe:
        found = pipe("a red circle", **CALL)
    with latentc.load(bundle, "onnxruntime", build="tensorrt-fp32") as pipe:
        expected = pipe("a red circle", **CALL)
    assert relative_l2(found.latents, expected.latents) <= 1e-6
    assert not machine.memory  # everything was given back
    code, out, _ = run("build", bundle, "--target", "tensorrt", "--build", "tensorrt-fp32")
    assert (code, out.count("is there and fits")) == (0, 3)
    assert len(machine.built) == 3
    assert not list(bundle.rglob("*.engine"))
    code, out, _ = run("build", bundle, "--build", "tensorrt-fp32", "--force", "--json")
    assert code == 0
    assert [each["component"] for each in json.loads(out)] == [
        "text_encoder", "denoiser", "vae_decoder",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "version", "11.1.0"), "TensorRT was 10.13.0, is 11.1.0"),
        (lambda m: m.gpus.__setitem__(0, ("NVIDIA A100", 8, 0)), "GPU was NVIDIA L4, is NVIDIA A"),
        (lambda m: setattr(m, "driver", 12080), "driver was CUDA 13.0, is CUDA 12.8"),
    ],
    ids=["version", "gpu", "driver"],
)
def test_stale_engines(
    bundle: Path, machine: Machine, run: Run, change: Callable[[Machine], Any], reason: str
) -> None:
    assert run("build", bundle, "--build", "tensorrt-fp32")[0] == 0
    change(machine)
    with installed(machine):
        with pytest.raises(BackendError) as caught:
            latentc.load(bundle, "tensorrt", build="tensorrt-fp32")
        message = str(caught.value)
        assert reason in message
        assert f"latentc build {bundle} --build tensorrt-fp32" in message
        code, out, _ = run("build", bundle, "--build", "tensorrt-fp32")
        assert (code, out.count(f"the old one did not fit: {reason}")) == (0, 3)
        latentc.load(bundle, "tensorrt", build="tensorrt-fp32").close()


def test_another_graph_at_the_same_place(bundle: Path, machine: Machine) -> None:
    backend, component = engines.get("tensorrt"), Manifest.load(bundle).component("denoiser")
    entry = bundle / "tensorrt-fp32" / "denoiser" / "model.onnx"
    backend.build(entry, component, options=SessionOptions(key="a" * 64))
    with pytest.raises(BackendError, match="graph was aaaaaaaaaaaa, is bbbbbbbbbbbb"):
        backend.open(entry, component, options=SessionOptions(key="b" * 64))


def test_other_shapes_and_settings(bundle: Path, machine: Machine, run: Run) -> None:
    build = ("build", bundle, "--build", "tensorrt-fp32")
    assert run(*build, "--images", 2, "--height", 32, "--workspace", 2, "--tf32")[0] == 0
    plan = machine.built[1]
    assert plan["shapes"]["sample"] == [[2, 4, 16, 1], [4, 4, 16, 16], [4, 4, 16, 24]]
    assert plan["settings"] == {"tf32": True, "workspace": 2 << 30}
    with latentc.load(bundle, "tensorrt", build="tensorrt-fp32") as pipe:
        pipe("a red circle", num_images_per_prompt=2, **CALL)
        with pytest.raises(InputError, match=r"text_encoder|denoiser: input .*--images"):
            pipe("a red circle", num_images_per_prompt=3, **CALL)
    code, _, err = run(*build, "--height", 33)
    assert (code, "is not a multiple of 2" in err) == (2, True)
    code, _, err = run(*build, "--images", "1:2")
    assert (code, "expected MIN:OPT:MAX" in err) == (2, True)


def test_tensorrt_11(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path))
    with installed(Machine(version="11.4.0.106")) as machine:
        assert cli.run(["build", str(bundle), "--build", "tensorrt-fp16"]) == 0
        assert len(machine.built) == 3


def test_a_graph_that_tensorrt_refuses(machine: Machine, tmp_path: Path) -> None:
    spec = TensorSpec("float32", ("batch", 4))
    component = Component("decoder", "decoder", {"latents": spec}, {"image": spec})
    (tmp_path / "model.onnx").write_bytes(b"broken")
    recipe = Recipe(format=1, precision="float32", profile={"batch": (1, 1, 2)})
    (tmp_path / "recipe.json").write_bytes(recipe.encode())
    with pytest.raises(BackendError, match=r"10.13.0 cannot read .*Frobnicate"):
        engines.get("tensorrt").build(tmp_path / "model.onnx", component)


def test_a_timing_cache_of_another_machine(bundle: Path, machine: Machine, tmp_path: Path) -> None:
    backend, component = engines.get("tensorrt"), Manifest.load(bundle).component("decoder")
    entry = bundle / "tensorrt-fp32" / "vae_decoder" / "model.onnx"
    options = SessionOptions(cache=tmp_path, key="a")
    backend.build(entry, component, options=options)
    (timing,) = tmp_path.rglob("timing-*.cache")
    assert timing.read_bytes() == b"+"
    timing.write_bytes(b"other")
    backend.build(entry, component, options=SessionOptions(cache=tmp_path, key="b"))
    assert timing.read_bytes() == b"+"


# --- sessions ---------------------------------------------------------------------------


@pytest.fixture
def session(bundle: Path, machine: Machine) -> Any:
    backend, component = engines.get("tensorrt"), Manifest.load(bundle).component("denoiser")
    entry = bundle / "tensorrt-fp32" / "denoiser" / "model.onnx"
    options = SessionOptions(key="k")
    backend.build(entry, component, options=options)
    return backend.open(entry, component, options=options)


def feeds(batch: int = 2, side: int = 8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "sample": draw.standard_normal((batch, 4, side, side)).astype(np.float32),
        "timestep": np.full(batch, 500.0, np.float32),
    }


def states(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 77, 32)).astype(np.float32)


def test_a_graph_is_recorded_once_and_replayed(session: Any, machine: Machine) -> None:
    bound = session.bind({"encoder_hidden_states": states()})
    machine.calls.clear()
    results = []
    for step in range(4):
        inputs = feeds() | {"timestep": np.full(2, 900.0 - step, np.float32)}
        results.append(bound.run(inputs)["prediction"])
    assert machine.count("enqueue") == 1
    assert machine.count("cudaStreamBeginCapture") == 1
    assert machine.count("cudaGraphLaunch") == 3
    assert machine.count("shape") == 3  # each input once: nothing changes between the steps
    assert machine.count("cudaMemcpyAsync") == 4 * 3  # two inputs there, one output back
    assert relative_l2(results[3], results[0]) > 1e-6  # the new timestep was seen
    bound.close()
    session.close()
    assert not machine.memory


def test_another_shape_drops_the_graph(session: Any, machine: Machine) -> None:
    first = session.bind({"encoder_hidden_states": states()})
    one = [first.run(feeds())["prediction"] for _ in range(3)]
    other = session.bind({"encoder_hidden_states": states(3)})
    assert other.run(feeds(3, 16))["prediction"].shape == (3, 4, 16, 16)
    again = first.run(feeds())["prediction"]
    np.testing.assert_array_equal(again, one[0])
    assert machine.count("cudaGraphExecDestroy") == 1


def test_what_cannot_be_recorded_runs_anyway(session: Any, machine: Machine) -> None:
    machine.recordable = False
    bound = session.bind({"encoder_hidden_states": states()})
    for _ in range(3):
        bound.run(feeds())
    assert (machine.count("enqueue"), machine.count("cudaStreamBeginCapture")) == (3, 1)


def test_a_shape_outside_of_the_profile(session: Any, machine: Machine) -> None:
    machine.calls.clear()
    with pytest.raises(InputError, match=r"denoiser: input 'sample' .*\[9, 4, 8, 8\].*latentc bui"):
        session.run(feeds(9) | {"encoder_hidden_states": states(9)})
    assert not machine.calls  # refused before anything reached the GPU


# --- what is missing --------------------------------------------------------------------


def test_no_engines_yet(bundle: Path, machine: Machine) -> None:
    with pytest.raises(BackendError) as caught:
        latentc.load(bundle, "tensorrt", build="tensorrt-fp32")
    assert "no engine of 'text_encoder' for NVIDIA L4 with TensorRT 10.13.0" in str(caught.value)
    assert f"build it: latentc build {bundle} --build tensorrt-fp32" in str(caught.value)


def test_no_tensorrt(bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    line = "pip install 'latentc[tensorrt]'"
    with pytest.raises(BackendUnavailable, match="install it with") as caught:
        latentc.load(bundle, "tensorrt")
    assert line in str(caught.value)
    code, _, err = run("build", bundle, "--target", "tensorrt")
    assert (code, line in err, err.count("\n")) == (5, True, 1)


def test_no_gpu(bundle: Path, machine: Machine) -> None:
    machine.gpus = []
    with pytest.raises(DeviceUnavailable, match="it has: none"):
        latentc.load(bundle, "tensorrt")


def test_no_build_for_it(run: Run, tmp_path: Path) -> None:
    from tests.support.fakes import make_bundle

    code, _, err = run("build", make_bundle(tmp_path / "bundle"))
    assert code == 2
    assert "engines are built for the targets tensorrt; the bundle has: fake-fp32" in err


def test_an_old_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(Machine(version="8.6.1")), pytest.raises(BackendUnavailable, match="too old"):
        engines.get("tensorrt")
