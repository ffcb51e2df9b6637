"""Devices, precisions and fixed sizes of the engines that are installed here, and of those that
are not by stand-ins: these test what we ask of an engine, not what it does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

import latentc
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.sizes import fixed
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import BackendError, DeviceUnavailable, InputError
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.verification.verify import relative_l2
from tests.support import fakes
from tests.support.fakes import make_bundle

CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "output_type": "latent"}
LATENTS = TensorSpec("float32", ("batch", 4, "height", "width"))
COMPONENT = Component(
    "denoiser",
    "denoiser",
    {"sample": LATENTS, "states": TensorSpec("float32", ("batch", 2))},
    {"prediction": LATENTS},
)


@pytest.fixture(scope="module")
def bundle(sd_bundle: Path) -> Path:
    return sd_bundle


def latents(bundle: Path, **options: Any) -> np.ndarray:
    with latentc.load(bundle, **options) as pipe:
        result = pipe("a red circle", **CALL)
    return np.asarray(result.latents)


@pytest.fixture(scope="module")
def plain(bundle: Path) -> np.ndarray:
    return latents(bundle, backend="onnxruntime")


# --- engines that are here --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"backend": "onnxruntime", "static": {}}, 1e-5),
        ({"backend": "openvino", "static": {}}, 1e-5),
        ({"backend": "openvino", "device": "auto"}, 1e-5),
        ({"backend": "openvino", "compute": "bf16"}, 5e-2),
        ({"backend": "torch", "static": {}}, 1e-5),
    ],
    ids=str,
)
def test_the_same_latents(
    bundle: Path, plain: np.ndarray, options: dict[str, Any], allowed: float
) -> None:
    assert relative_l2(latents(bundle, **options), plain) <= allowed


def test_a_package_for_one_size(coreml_bundle: Path, plain: np.ndarray) -> None:
    """Its batch is one, that of the call two: guidance."""
    found = latents(coreml_bundle, backend="coreml-reference", static={"height": 32})
    assert relative_l2(found, plain) <= 1e-5


def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The components that OpenVINO compiles from now on."""
    from latentc.runtimes.backends.openvino import OpenVinoBackend

    told: list[str] = []
    work = OpenVinoBackend._compiled

    def counting(self: Any, graph: Any, *more: Any) -> Any:
        told.append(graph.component.name)
        return work(self, graph, *more)

    monkeypatch.setattr(OpenVinoBackend, "_compiled", counting)
    return told


@pytest.mark.parametrize("static", [None, {}], ids=["open", "static"])
def test_a_graph_is_compiled_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static: dict[str, float] | None
) -> None:
    told = compiled(monkeypatch)
    uncached = latents(bundle, backend="openvino", cache=False, static=static)
    assert len(told) == 3
    assert not list(tmp_path.rglob("*.blob"))
    for expected in (6, 6):
        found = latents(bundle, backend="openvino", cache=tmp_path, static=static)
        np.testing.assert_array_equal(found, uncached)
        assert len(told) == expected
    assert len(list(tmp_path.rglob("*.blob"))) == 3
    assert not list(tmp_path.rglob("*.tmp"))
    for other in ({"static": {"height": 48}}, {"compute": "bf16"}, {"threads": 2}):
        before = len(told)
        latentc.load(bundle, "openvino", cache=tmp_path, **other).close()
        assert len(told) > before


def test_large_weights_from_the_cache(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is given back between calls still reads as what was compiled."""
    from latentc.runtimes.backends import openvino as adapter

    plain = latents(bundle, backend="openvino", cache=None)
    monkeypatch.setattr(adapter, "_LARGE", 1)
    told = compiled(monkeypatch)
    for _ in range(2):
        found = latents(bundle, backend="openvino", cache=tmp_path)
        np.testing.assert_array_equal(found, plain)
    assert len(told) == 3


@pytest.mark.parametrize("damage", ["cut", "altered", "no record", "nonsense"])
def test_a_damaged_cache(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    from latentc.runtimes.backends import model_cache

    session = latentc.load(bundle, "openvino", cache=tmp_path)
    session.close()
    for blob in (tmp_path / "openvino").glob("*.blob"):
        content = blob.read_bytes()
        if damage == "no record":
            blob.with_suffix(".json").write_text("[]")
        else:
            spoilt = {"cut": content[: len(content) // 2], "nonsense": b"<x/>\nno model"}
            blob.write_bytes(spoilt.get(damage, content[:-1] + b"?"))
        if damage == "nonsense":  # with a record that vouches for it
            record = blob.with_suffix(".json")
            old = model_cache.msgspec.json.decode(record.read_bytes(), type=model_cache.Record)
            new = model_cache.Record(old.facts, model_cache.identity(blob.stat()))
            record.write_bytes(model_cache.msgspec.json.encode(new))
    told = compiled(monkeypatch)
    if damage == "nonsense":
        with pytest.warns(model_cache.CacheWarning, match="of no use"):
            latentc.load(bundle, "openvino", cache=tmp_path).close()
    else:
        latentc.load(bundle, "openvino", cache=tmp_path).close()
    assert len(told) == 3
    latentc.load(bundle, "openvino", cache=tmp_path).close()
    assert len(told) == 3


def test_a_cache_that_cannot_be_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentc.runtimes.backends.model_cache import CacheWarning

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="is a file; give a folder"):
        latentc.load(bundle, "openvino", cache=tmp_path / "file")
    monkeypatch.setattr("latentc.runtimes.backends.model_cache._SPARE", 1 << 60)
    with pytest.warns(CacheWarning, match="no room"):
        latentc.load(bundle, "openvino", cache=tmp_path / "full").close()


def test_one_size_only(bundle: Path) -> None:
    with latentc.load(bundle, backend="onnxruntime", static={"images": 2}) as pipe:
        made = pipe("a red circle", num_images_per_prompt=2, **CALL)
        assert made.latents.shape[0] == 2
        for other in (
            {"height": 48, "width": 32},
            {"guidance_scale": 1.0},
            {"num_images_per_prompt": 1},
        ):
            with pytest.raises(InputError, match="loaded for"):
                pipe("a red circle", **{"num_images_per_prompt": 2, **CALL, **other})


@pytest.mark.parametrize(
    ("static", "message"),
    [
        (
            {"size": 4},
            "'static' has no size 'size'; it takes: height, width, images, guidance_scale",
        ),
        ({"height": 7}, "height 7 is not a multiple of 4"),
        ({"images": 0}, "images must be at least 1"),
    ],
)
def test_bad_fixed_sizes(tmp_path: Path, static: dict[str, float], message: str) -> None:
    manifest = Manifest.load(make_bundle(tmp_path / "bundle"))
    with pytest.raises(InputError, match=message):
        fixed(manifest, static)


def latents_with(**changes: Any) -> Latents:
    """Return the latents of the hand-made bundle, changed."""
    return structs.replace(fakes._fields(fakes._components(True), True).latents, **changes)


@pytest.mark.fault("3.8", "sizes that are too small for a T2I-Adapter's features")
def test_sizes_have_a_minimum(tmp_path: Path) -> None:
    least = Manifest.load(make_bundle(tmp_path / "bundle", latents=latents_with(minimum=3)))
    assert fixed(least, {"height": 8})["denoiser"]["height"] == 4
    with pytest.raises(InputError, match="height 4: this model makes at least 8"):
        fixed(least, {"height": 4})


@pytest.mark.fault("3.8", "sizes that a pipeline makes smaller, in fixed graphs too")
def test_sizes_are_rounded(tmp_path: Path) -> None:
    rounding = Manifest.load(make_bundle(tmp_path / "bundle", latents=latents_with(rounds=True)))
    with pytest.warns(
        UserWarning, match="height 11 is not a multiple of 4: 8 is taken in its place"
    ):
        assert fixed(rounding, {"height": 11})["denoiser"]["height"] == 4
    with pytest.raises(InputError, match="height 3 is not a multiple of 4; nearest: 4"):
        fixed(rounding, {"height": 3})


def test_fixed_sizes_of_each_component(tmp_path: Path) -> None:
    manifest = Manifest.load(make_bundle(tmp_path / "bundle"))
    assert fixed(manifest, {"height": 8, "images": 3}) == {
        "text_encoder": {"batch": 1},
        "denoiser": {"batch": 6, "height": 4, "width": 8},
        "decoder": {"batch": 3, "height": 4, "width": 8},
    }
    assert fixed(manifest, {"guidance_scale": 1.0})["denoiser"]["batch"] == 1


def test_what_a_backend_cannot_do(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be asked to compute in 'bf16'; it can in: fp32"):
        latentc.load(bundle, backend="onnxruntime", compute="bf16")
    with pytest.raises(InputError, match="nothing to compile"):
        latentc.load(bundle, backend="onnxruntime", compile=True)
    with pytest.raises(DeviceUnavailable, match=r"no device 'cuda' .*it has: cpu"):
        latentc.load(bundle, backend="onnxruntime", device="cuda:0")
    with pytest.raises(DeviceUnavailable, match=r"no device 'hpu'"):
        latentc.load(bundle, backend="torch", device="hpu")


def test_an_npu_wants_fixed_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = engines.get("openvino")
    monkeypatch.setattr(type(backend), "devices", lambda self: ["CPU", "NPU"])
    with pytest.raises(InputError, match=r"NPU runs fixed sizes only.*--static"):
        backend.open(tmp_path / "model.xml", COMPONENT, "npu")


def test_the_whole_program_moves(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To PyTorch's device without memory: nothing of the program may stay on the CPU."""
    import torch

    backend = engines.get("torch")
    monkeypatch.setattr(type(backend), "devices", lambda self: ["cpu", "meta"])
    component = Manifest.load(bundle).component("denoiser")
    session: Any = backend.open(bundle / "torch-fp32/denoiser/model.pt2", component, "meta")
    shapes = {"sample": (2, 4, 16, 16), "timestep": (1,), "encoder_hidden_states": (2, 77, 32)}
    inputs = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    program = session._program
    made = program.module(*(inputs[name] for name in program.inputs))
    assert made[0].device.type == "meta"


def test_channels_last(bundle: Path, plain: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that --compile does but torch.compile itself, which takes minutes here."""
    import torch

    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **how: asked.append(how) or module)
    assert relative_l2(latents(bundle, backend="torch", compile=True), plain) <= 1e-5
    assert asked == [{"dynamic": True}] * 3


def test_io_bindings_on_the_real_engine(
    bundle: Path, plain: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, with the host's memory as the device's: the engine takes these calls."""
    from latentc.runtimes.backends import onnxruntime as adapter

    there = adapter._Device(("CPUExecutionProvider",), memory="cpu")
    monkeypatch.setattr(adapter, "_DEVICES", {"cpu": there})
    np.testing.assert_array_equal(latents(bundle, backend="onnxruntime"), plain)


# --- ONNX Runtime on a GPU, by a stand-in that checks what it is given ------------------


class FakeOrtValue:
    copies = 0

    def __init__(self, value: np.ndarray, place: tuple[str, int]) -> None:
        self.value, self.place = value.copy(), place

    @classmethod
    def ortvalue_from_numpy(cls, value: np.ndarray, device: str, index: int) -> FakeOrtValue:
        cls.copies += 1
        return cls(value, (device, index))


class FakeBinding:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: list[tuple[str, str, int]] = []

    def bind_ortvalue_input(self, name: str, value: FakeOrtValue) -> None:
        assert value.place == ("cuda", 1)
        self.calls.append(f"device {name}")
        self.inputs[name] = value.value

    def bind_cpu_input(self, name: str, value: np.ndarray) -> None:
        assert value.flags.c_contiguous
        self.calls.append(f"host {name}")
        self.inputs[name] = value

    def bind_output(self, name: str, device: str, index: int) -> None:
        self.outputs.append((name, device, index))

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        self.calls.append("copy back")
        assert self.outputs == [("prediction", "cuda", 1)]
        return [self.inputs["sample"] * 2]


class FakeInference:
    started = ("CUDAExecutionProvider", "CPUExecutionProvider")
    made: list[FakeInference] = []  # noqa: RUF012

    def __init__(self, path: str, sess_options: Any, providers: list[Any], **more: Any) -> None:
        assert more == {"enable_fallback": 0}
        self.providers = providers
        self.calls: list[str] = []
        FakeInference.made.append(self)

    def get_providers(self) -> list[str]:
        return list(self.started)

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self.calls)

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        assert not hasattr(options, "terminate")
        assert set(binding.inputs) == {"sample", "states"}
        self.calls.append("run")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("onnxruntime")
    settings = type("SessionOptions", (), {"add_free_dimension_override_by_name": lambda *_: None})
    module.SessionOptions, module.InferenceSession = settings, FakeInference
    module.OrtValue, module.__version__ = FakeOrtValue, "1.31.1"
    module.RunOptions = SimpleNamespace
    module.get_available_providers = lambda: [
        "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider",
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(FakeInference, "made", [])
    monkeypatch.setattr(FakeOrtValue, "copies", 0)
    return engines.get("onnxruntime")


def test_constants_stay_on_the_gpu(gpu: Any, tmp_path: Path) -> None:
    session = gpu.open(tmp_path / "model.onnx", COMPONENT, "CUDA:1")
    states = np.ones((2, 2), np.float32)
    bound = session.bind({"states": states})
    sample = np.ones((2, 4, 8, 8), np.float32)
    for _ in range(3):
        assert bound.run({"sample": sample})["prediction"].sum() == 2 * sample.size
    assert FakeOrtValue.copies == 1
    (engine,) = FakeInference.made
    assert engine.calls == ["device states", "host sample", "run", "copy back"] * 3
    assert engine.providers == [
        ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"}),
        "CPUExecutionProvider",
    ]
    with pytest.raises(InputError, match="'sample': expected shape"):
        bound.run({"sample": sample[:1]})  # the constants say batch 2
    session.close()
    with pytest.raises(BackendError, match="closed"):
        bound.run({"sample": sample})


def test_a_provider_that_does_not_start(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeInference, "started", ("CPUExecutionProvider",))
    with pytest.raises(BackendError, match=r"could not start CUDAExecutionProvider.*nvidia-smi"):
        gpu.open(tmp_path / "model.onnx", COMPONENT, "cuda")


def test_the_tensorrt_provider_caches_by_content(gpu: Any, tmp_path: Path) -> None:
    FakeInference.started = ("TensorrtExecutionProvider", *FakeInference.started)
    try:
        for key in ("a" * 64, "b" * 64):
            gpu.open(
                tmp_path / "model.onnx",
                COMPONENT,
                "tensorrt",
                SessionOptions(cache=tmp_path, key=key, compute="auto"),
            )
    finally:
        FakeInference.started = FakeInference.started[1:]
    paths = [dict(each.providers[0][1])["trt_engine_cache_path"] for each in FakeInference.made]
    assert len(set(paths)) == 2
    assert all(Path(path).is_dir() for path in paths)
    assert FakeInference.made[0].providers[1] == ("CUDAExecutionProvider", {"device_id": "0"})
    assert gpu.devices() == ["cpu", "cuda", "tensorrt"]
