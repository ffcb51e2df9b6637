"""NaN and infinity that a call brings, and numbers that become infinite on their way, are errors
that say where they are: no graph gets them, whatever it would make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Feeds
from latentc.runtimes.bundle.manifest import MANIFEST
from latentc.runtimes.errors import InputError, LatentcError, NumericalError
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from tests.support import fakes
from tests.support.fakes import FakeBackend, make_bundle

SHAPE = (1, 4, 8, 8)
CALL: Mapping[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}


def _run_and_hide(graph: Callable[[Feeds], dict[str, Array]], feeds: Feeds) -> dict[str, Array]:
    """Run a graph that ends in a clamp, as some engines make it: what it gives is finite."""
    return {name: np.nan_to_num(np.clip(value, -9, 9)) for name, value in graph(feeds).items()}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pipeline]]:
    """A function: inputs that are float16, by component → a pipeline whose graphs hide NaN."""
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    pipes: list[Pipeline] = []
    graphs = {}
    for name in ("text_encoder", "denoiser", "decoder"):
        graphs[name] = f"hiding_{name}"
        hidden = partial(_run_and_hide, fakes.GRAPHS[name])
        monkeypatch.setitem(fakes.GRAPHS, graphs[name], hidden)  # type: ignore[arg-type]

    def get(**halves: str) -> Pipeline:
        bundle = make_bundle(tmp_path / "bundle", graphs=graphs)
        document = json.loads((bundle / MANIFEST).read_bytes())
        for component in document["components"]:
            if component["name"] in halves:
                component["inputs"][halves[component["name"]]]["dtype"] = "float16"
        (bundle / MANIFEST).write_text(json.dumps(document))
        pipes.append(load(bundle, FakeBackend()))
        return pipes[-1]

    yield get
    for pipe in pipes:
        pipe.close()


def replacing(value: float, masked: bool = False) -> dict[str, Any]:
    """Arguments of a call whose callback puts one number into the last image's latents."""

    def change(pipe: Any, step: int, timestep: float, given: dict[str, Any]) -> dict[str, Any]:
        latents = given["latents"].copy()
        latents[-1].flat[-1] = value
        return {"latents": np.ma.masked_invalid(latents) if masked else latents}

    names = {"callback_on_step_end_tensor_inputs": ["latents"]}
    return {"callback_on_step_end": change, "num_images_per_prompt": 2, **names}


def latents(value: float) -> Array:
    filled = np.ones(SHAPE, np.float32)
    filled[0, 1, 2, 3] = value
    return filled


def encoded(pipe: Pipeline, value: float, masked: bool = False) -> dict[str, Any]:
    """Arguments of a call with encoded texts, of which one number is another."""
    texts = {name: array.copy() for name, array in pipe.encode_prompt("a red circle").items()}
    texts["prompt_embeds"].flat[-1] = value
    if masked:
        texts["prompt_embeds"] = np.ma.masked_invalid(texts["prompt_embeds"])
    return {"prompt": None, **texts}


CALLS: Mapping[str, tuple[Callable[[Pipeline], Mapping[str, Any]], type[LatentcError]]] = {
    "a callback: NaN in one image": (lambda _: replacing(np.nan), NumericalError),
    "a callback: infinity": (lambda _: replacing(-np.inf), NumericalError),
    "a callback: NaN that is masked": (lambda _: replacing(np.nan, masked=True), NumericalError),
    "latents: NaN that is masked": (
        lambda _: {"latents": np.ma.masked_invalid(latents(np.nan))},
        InputError,
    ),
    "latents beyond float32": (lambda _: {"latents": np.full(SHAPE, 1e300)}, InputError),
    "encoded text: NaN": (lambda pipe: encoded(pipe, np.nan), InputError),
    "encoded text: infinity": (lambda pipe: encoded(pipe, np.inf), InputError),
    "encoded text: NaN that is masked": (lambda pipe: encoded(pipe, np.nan, True), InputError),
    "a scale that is NaN": (lambda _: {"guidance_scale": np.nan}, InputError),
    "a size that is infinite": (lambda _: {"original_size": (np.inf, 1)}, InputError),
    "a size beyond float32": (lambda _: {"original_size": (1e39, 1)}, InputError),
    "a scale beyond float32": (lambda _: {"guidance_scale": -1e39}, InputError),
    "a weight of a word": (
        lambda _: {"prompt": "(red:1e39) circle", "prompt_weighting": True},
        InputError,
    ),
}


@pytest.mark.fault("2.1", "second look: NaN in one number, behind a mask, or beyond float32")
@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_brings(name: str, make: Callable[..., Pipeline]) -> None:
    pipe = make()
    arguments, error = CALLS[name]
    with pytest.raises(error):
        pipe(**{**CALL, **arguments(pipe)})


# What runs a pipeline with a number that float16 does not have, and the input that is of it.
HALVES: Mapping[str, tuple[tuple[str, str], Callable[[Pipeline], object]]] = {
    "latents": (("decoder", "latents"), lambda pipe: pipe(**CALL, latents=latents(1e7))),
    "a callback's": (("decoder", "latents"), lambda pipe: pipe(**{**CALL, **replacing(-1e5)})),
    "decode": (("decoder", "latents"), lambda pipe: pipe.decode(latents(1e6))),
    "encoded text": (
        ("denoiser", "encoder_hidden_states"),
        lambda pipe: pipe(**{**CALL, **encoded(pipe, 7e4)}),
    ),
}


@pytest.mark.fault("2.1", "second look: numbers that are infinite in a graph of half precision")
@pytest.mark.parametrize("way", HALVES)
def test_numbers_beyond_half_precision(way: str, make: Callable[..., Pipeline]) -> None:
    (component, name), use = HALVES[way]
    pipe = make(**{component: name})
    assert np.isfinite(pipe(**CALL, output_type="np").images).all()
    message = f"^{component}: its input '{name}' holds numbers beyond float16"
    with pytest.raises(NumericalError, match=message):
        use(pipe)
