"""Arguments of every odd type and size, for every argument that there is: an `InputError` that says
what is expected, or what diffusers does."""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentc
from latentc.exporter.compiler import export as compiler
from latentc.exporter.export_arguments import ExportArguments
from latentc.runtimes import plugins
from latentc.runtimes.backends.backend import SessionOptions, get
from latentc.runtimes.errors import InputError, LatentcError
from latentc.runtimes.options import declared
from latentc.runtimes.pipeline.pipeline import Pipeline
from tests.support import fakes


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text for it")


ODD: dict[str, Any] = {
    "array": np.array([1, 2]),
    "array of one": np.array([1.5]),
    "array without axes": np.array(1),
    "empty array": np.array([]),
    "array of texts": np.array(["a"]),
    "numpy integer": np.int64(1),
    "numpy truth": np.bool_(True),
    "masked": np.ma.masked,
    "date": np.datetime64("2020"),
    "truth": True,
    "nan": float("nan"),
    "infinity": float("inf"),
    "float": 1.0,
    "negative": -1,
    "zero": 0,
    "huge": 10**9,
    "huger": -(10**30),
    "hugest": 10**5000,
    "complex": 1j,
    "text": "2",
    "empty text": "",
    "bytes": b"x",
    "surrogate": "\ud800",
    "surrogates": ["a", "\udfff"],
    "long text": "a" * 100_000,
    "zeros in it": "a\0b",
    "empty list": [],
    "nothing in it": [None],
    "lists": [[1]],
    "mapping": {"a": 1},
    "mapping of texts": {"intr_op": "1"},
    "set": {1},
    "tensor": torch.tensor([1, 2]),
    "generator": torch.Generator(),
    "generators": [torch.Generator()],
    "function": len,
    "class": int,
    "object": object(),
    "unprintable": Unprintable(),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    fakes.make_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Pipeline:
    return latentc.load(bundle, fakes.FakeBackend())


@pytest.mark.fault("3.7", "an odd value of an argument of a call is a traceback")
@pytest.mark.parametrize("odd", ODD)
def test_calls(pipe: Pipeline, odd: str) -> None:
    taken = []
    for name in pipe.signature.names:
        arguments = {"prompt": "a red circle", "num_inference_steps": 1, name: ODD[odd]}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pipe.stream(**arguments).close()
        except LatentcError as error:
            if not isinstance(error, InputError):
                pytest.fail(f"{name}: {type(error).__name__}: {error}")
            continue
        taken.append(name)
    if odd in ("generator", "object", "unprintable", "function", "class", "complex", "date"):
        assert taken == (["generator"] if odd == "generator" else [])


@pytest.mark.fault("3.7", "an odd value of an argument of load is a traceback, or ignored")
@pytest.mark.parametrize("odd", ODD)
def test_loading(bundle: Path, odd: str) -> None:
    for name in inspect.signature(latentc.load).parameters:
        arguments = {"bundle": bundle, "backend": fakes.FakeBackend(), name: ODD[odd]}
        try:
            latentc.load(**arguments).close()
        except LatentcError as error:
            assert "\n" not in str(error)  # noqa: PT017 (others load)


class _SourceReached(Exception):
    """All arguments were taken."""


@pytest.mark.fault("3.7", "an odd value of an option of an export is a traceback")
@pytest.mark.parametrize("odd", ODD)
def test_exporting(odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any) -> None:
        raise _SourceReached

    monkeypatch.setattr(compiler, "resolve", reached)
    monkeypatch.setattr(plugins, "entry_points", lambda _: {})  # looking for them takes its time
    taken = set()
    for name in declared(ExportArguments).keys() - {"report"}:  # it is called
        beside = {"targets": ("onnx", "coreml"), "height": 64, "width": 64, "verify": False}
        try:
            compiler.preflight("source", tmp_path / "bundle", **{**beside, name: ODD[odd]})
        except LatentcError as error:
            assert "\n" not in str(error)  # noqa: PT017 (others reach the source)
        except _SourceReached:
            taken.add(name)
    if odd in ("generator", "object", "unprintable", "function", "class", "complex", "date"):
        assert not taken


@pytest.mark.fault("3.7", "an odd value of an argument of another method is a traceback")
@pytest.mark.parametrize("odd", ODD)
def test_other_methods(pipe: Pipeline, odd: str) -> None:
    usual = {"decode": {"latents": np.zeros((1, 4, 4, 4), np.float32)}}
    usual["encode_prompt"] = {"prompt": "a"}
    for method, arguments in usual.items():
        for name in inspect.signature(getattr(pipe, method)).parameters:
            with warnings.catch_warnings(), suppress(LatentcError):
                warnings.simplefilter("ignore")
                getattr(pipe, method)(**{**arguments, name: ODD[odd]})


def test_tables_cover_all_arguments(pipe: Pipeline) -> None:
    signature = inspect.signature(latentc.load).parameters
    assert {"threads", "options", "static", "cache"} <= set(signature)
    assert {"seed", "height", "scheduler", "output_type", "guidance_scale"} <= set(
        pipe.signature.names
    )


@pytest.mark.fault("3.7", "several seeds in an array")
def test_an_array_of_seeds_is_a_list_of_them(pipe: Pipeline) -> None:
    call = {"num_images_per_prompt": 2, "num_inference_steps": 1, "output_type": "np"}
    many = pipe("a red circle", seed=np.array([1, 2]), **call)
    assert many.seeds == (1, 2)
    np.testing.assert_array_equal(many.images, pipe("a red circle", seed=[1, 2], **call).images)
    with pytest.raises(InputError, match="2 seeds for 1 images"):
        pipe("a red circle", seed=np.array([1, 2]))
    with pytest.raises(InputError, match="give the generator as 'generator'"):
        pipe("a red circle", seed=torch.Generator().manual_seed(3))


@pytest.mark.fault("3.7", "denoising_end=1.0 is the whole schedule in diffusers")
def test_the_whole_schedule(pipe: Pipeline) -> None:
    call = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
    whole = pipe("a red circle", denoising_end=1.0, **call)
    np.testing.assert_array_equal(whole.images, pipe("a red circle", **call).images)
    for end in (0, -0.1, 1.001, float("nan")):
        with pytest.raises(InputError, match="denoising_end"):
            pipe("a red circle", denoising_end=end)


@pytest.mark.fault("3.7", "more images than any memory holds")
@pytest.mark.parametrize(
    "call",
    [
        {"prompt": "a", "num_images_per_prompt": 10**9},
        {"prompt": ["a"] * 200, "num_images_per_prompt": 100},
    ],
)
def test_too_many_images(pipe: Pipeline, call: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at most 10000"):
        pipe.stream(**call)


@pytest.mark.fault("3.7", "an engine's option that is misspelt is ignored")
@pytest.mark.parametrize(
    ("backend", "option", "says"),
    [
        ("onnxruntime", "intr_op", "did you mean .*session.intra_op_num_threads"),
        ("onnxruntime", "session.intra_op.allow_spining", "allow_spinning"),
        ("onnxruntime", "x" * 40, "it has [0-9]+, such as"),
        ("openvino", "NUM_STREAM", "NUM_STREAMS"),
        ("openvino", "FULL_DEVICE_NAME", "no option"),
        ("torch", "anything", "it has: none"),
    ],
)
def test_options_of_engines(backend: str, option: str, says: str) -> None:
    engine = get(backend)
    options = SessionOptions(extra={option: "1"})
    component = fakes._components(True)[0]
    with pytest.raises(InputError, match=says):
        engine.open(Path("nothing.onnx"), component, "cpu", options)


@pytest.mark.parametrize(
    ("backend", "option"),
    [
        ("onnxruntime", "session.intra_op.allow_spinning"),
        ("onnxruntime", "session.disable_prepacking"),
        ("openvino", "NUM_STREAMS"),
        ("openvino", "CACHE_DIR"),
    ],
)
def test_options_that_engines_have(backend: str, option: str) -> None:
    engine = get(backend)
    assert option in (engine.option_names(engine.devices()[0]) or ())


# Arguments of diffusers' calls that the plain bundle of `tests.support.fakes` has no use for.
IGNORED: dict[str, Any] = {
    "eta": 0.5,
    "clip_skip": 1,
    "guess_mode": True,
    "cross_attention_kwargs": {"scale": 0.5},
    "timesteps": [500, 1],
    "sigmas": [1.0, 0.0],
    "strength": 0.5,
    "image": np.zeros((16, 16, 3), np.uint8),
    "guidance_rescale": 0.5,
    "control_guidance_start": 0.1,
    "ip_adapter_scale": 0.5,
    "max_sequence_length": 7,
    "original_inference_steps": 9,
    "padding_mask_crop": 3,
    "denoising_start": 0.5,
    "cache_interval": 2,
    "callback": print,
}


@pytest.mark.fault("2.7", "second look: what diffusers knows and the bundle has no use for")
@pytest.mark.parametrize("name", IGNORED)
def test_arguments_that_would_change_nothing(name: str, tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    call = {"num_inference_steps": 2, name: IGNORED[name]}
    refused = pytest.raises(InputError, match=rf"unknown argument '{name}'|has no|use for {name}")
    with latentc.load(bundle, fakes.FakeBackend()) as pipe, refused:
        pipe("a red circle", **call)
