"""Every engine holds what a graph gives against the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends import backend as backends
from latentc.runtimes.backends.session import Feeds
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST
from latentc.runtimes.bundle.structures import TensorSpec
from latentc.runtimes.errors import BackendError, BundleError
from latentc.runtimes.pipeline.pipeline import load
from tests.support.fakes import GRAPHS, FakeBackend, make_bundle

Outputs = Mapping[str, TensorSpec]

# What a manifest may say that is not so.
LIES: Mapping[str, Callable[[Outputs], Outputs]] = {
    "rank": lambda o: _changed(o, shape=(*_first(o).shape, 1)),
    "size": lambda o: _changed(o, shape=(*_first(o).shape[:-1], 7)),
    "symbol": lambda o: _changed(o, shape=("2*batch", *_first(o).shape[1:])),
    "dtype": lambda o: _changed(o, dtype="int64"),
    "name": lambda o: {"other": _first(o)},
    "one more": lambda o: {**o, "other": _first(o)},
}

# Packages of Core ML are cast to what the manifest says; a program's outputs have no names.
HELD_OTHERWISE = {("coreml-reference", "dtype"), ("torch", "name")}


def _first(outputs: Outputs) -> TensorSpec:
    return next(iter(outputs.values()))


def _changed(outputs: Outputs, **changes: Any) -> Outputs:
    name = next(iter(outputs))
    return {**outputs, name: msgspec.structs.replace(outputs[name], **changes)}


@pytest.mark.fault("2.2", "outputs of another name, rank, dtype or size than the manifest says")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch", "coreml-reference"])
def test_an_engine_gives_something_else(backend: str, request: Any) -> None:
    made = "coreml_bundle" if backend == "coreml-reference" else "sd_bundle"
    bundle = Bundle.open(request.getfixturevalue(made))
    engine = backends.get(backend)
    build = next(each for each in bundle.manifest.builds if engine.loads(each))
    (component,) = bundle.manifest.of_role("encoder")
    ids = {name: np.ones((1, spec.shape[1]), spec.dtype) for name, spec in component.inputs.items()}
    entry = bundle.entry(build, component.name, engine)
    with engine.open(entry, component) as session:
        expected = session.run(ids)
    for name, lie in LIES.items():
        told = msgspec.structs.replace(component, outputs=lie(component.outputs))
        if (backend, name) in HELD_OTHERWISE:
            continue
        for bound in (False, True):
            with pytest.raises(BackendError, match="text_encoder"):
                _run(engine.open(entry, told), ids, bound)
    assert set(expected) == set(component.outputs)


def _run(session: Any, feeds: Feeds, bound: bool) -> None:
    with session:
        if bound:
            session.bind(feeds).run({})
        else:
            session.run(feeds)


def _wrong(name: str, change: Callable[[Array], Any]) -> Callable[[Feeds], dict[str, Array]]:
    return lambda feeds: {key: change(value) for key, value in GRAPHS[name](feeds).items()}


CHANGES: Mapping[str, Callable[[Array], Any]] = {
    "rank": lambda value: value[0],
    "one value": lambda value: value[..., :1, :1],
    "no value": lambda value: value[..., :0],
    "rows": lambda value: np.repeat(value, 2, axis=0),
    "half": lambda value: value.astype(np.float16),
    "integers": lambda value: value.astype(np.int64),
    "texts": lambda value: value.astype(str),
    "list": lambda value: value.tolist(),
    "None": lambda value: None,
    "complex": lambda value: value.astype(np.complex64),
    "bytes swapped": lambda value: value.astype(">f4"),
    "objects": lambda value: value.astype(object),
    "NaN that is masked": lambda value: np.ma.masked_invalid(np.where(value > 0, value, np.nan)),
    "no rows": lambda value: value[:0],
    "one number": lambda value: np.float32(value.mean()),
    "tensor": torch.from_numpy,
    "memory": memoryview,
}


@pytest.mark.fault("2.2", "second look: types that look as declared, and hide what is in them")
@pytest.mark.fault("2.2", "a wrong rank, dtype or size gives an image of one pixel or a raw error")
@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "decoder"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, change: str
) -> None:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(GRAPHS, "wrong", _wrong(component, CHANGES[change]))  # type: ignore[arg-type]
    with (
        load(make_bundle(tmp_path / "b", graphs={component: "wrong"}), FakeBackend()) as pipe,
        pytest.raises(BackendError, match=rf"^{component}: .*the manifest says float32"),
    ):
        pipe("a red circle", seed=1, num_inference_steps=2)


OTHERS: Mapping[str, Callable[[dict[str, Array]], Any]] = {
    "None": lambda outputs: None,
    "list": lambda outputs: list(outputs.values()),
    "nothing": lambda outputs: {},
    "one more": lambda outputs: {**outputs, "other": 1},
    "twice": lambda outputs: {**outputs, **{name.upper(): v for name, v in outputs.items()}},
    "places": lambda outputs: dict(enumerate(outputs.values())),
}


@pytest.mark.fault("2.2", "second look: an engine gives no mapping of names, or other names")
@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "decoder"])
@pytest.mark.parametrize("change", OTHERS)
def test_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, change: str
) -> None:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(GRAPHS, "wrong", lambda feeds: OTHERS[change](GRAPHS[component](feeds)))  # type: ignore[arg-type]
    with (
        load(make_bundle(tmp_path / "b", graphs={component: "wrong"}), FakeBackend()) as pipe,
        pytest.raises(BackendError, match=rf"^{component}: expected the outputs \['\w+'\], found "),
    ):
        pipe("a red circle", seed=1, num_inference_steps=2)


DECLARED: list[tuple[str, dict[str, Any]]] = [
    ("decoder", {"shape": ["batch", 3, 1, 1]}),
    ("decoder", {"shape": ["batch", 3, "rows", "columns"]}),
    ("decoder", {"shape": ["batch", 3, "2*width", "2*height"]}),
    ("decoder", {"shape": ["batch", 3, "4*height", "4*width"]}),
    ("decoder", {"shape": ["batch", 2, "2*height", "2*width"]}),
    ("decoder", {"shape": ["2*batch", 3, "2*height", "2*width"]}),
    ("decoder", {"shape": [3, "2*height", "2*width"]}),
    ("decoder", {"dtype": "int64"}),
    ("denoiser", {"shape": [1, 1, 1, 1]}),
    ("denoiser", {"shape": ["rows", 4, "height", "width"]}),
    ("denoiser", {"shape": ["batch", 4, "height", "width", 1]}),
    ("denoiser", {"shape": ["batch", 8, "height", "width"]}),
    ("denoiser", {"dtype": "int32"}),
]


@pytest.mark.fault("2.2", "second look: a manifest that declares the wrong rank, dtype or size")
@pytest.mark.parametrize(("component", "changes"), DECLARED)
def test_what_a_manifest_may_declare(
    tmp_path: Path, component: str, changes: dict[str, Any]
) -> None:
    bundle = make_bundle(tmp_path / "b")
    document = json.loads((bundle / MANIFEST).read_bytes())
    (changed,) = (each for each in document["components"] if each["name"] == component)
    for output in changed["outputs"].values():
        output.update(changes)
    (bundle / MANIFEST).write_text(json.dumps(document))
    says = "no images; expected floats|'image' does not follow from its inputs"
    says = says if component == "decoder" else "'denoiser' gives no 'prediction' of the form floats"
    with pytest.raises(BundleError, match=says):
        Bundle.open(bundle)
