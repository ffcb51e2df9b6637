"""Values asked for by `Pipeline.compute`, whatever it was loaded for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentc
from latentc.runtimes.errors import InputError
from latentc.runtimes.pipeline.loading import requested
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.presets.preset import Preset
from tests.hostile.test_odd_arguments import ODD
from tests.support.fakes import FakeBackend, make_bundle

SMALL = {"height": 8, "width": 8}
CALL: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 3}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def pipe(bundle: Path) -> Pipeline:
    return latentc.load(bundle, FakeBackend())


@pytest.mark.parametrize("low_memory", [False, True])
def test_loaded_for_one_size(bundle: Path, low_memory: bool) -> None:
    """Values that no size matters to are computed as ever; all else must be of the size."""
    static = {**SMALL, "images": 1, "guidance_scale": 3.0}
    with latentc.load(bundle, FakeBackend(), static=static, low_memory=low_memory) as pipe:
        assert pipe.compute("prompt_embeds", prompt=["a", "red"]).shape == (2, 6, 2)
        assert pipe.compute("denoised", **CALL, **SMALL).shape == (1, 4, 4, 4)
        assert pipe.compute("latents", seed=1, **SMALL).shape == (1, 4, 4, 4)
        with pytest.raises(InputError, match="it was loaded for"):
            pipe.compute("denoised", **CALL)
        with pytest.raises(InputError, match="it was loaded for"):
            pipe.compute("latents", seed=1)


def test_the_scheduler_of_the_pipeline(pipe: Pipeline) -> None:
    plain = pipe.compute("denoised", **CALL)
    pipe.scheduler = "noisy"
    found = pipe.compute("denoised", **CALL)
    assert np.array_equal(found, pipe(**CALL, output_type="latent").latents)
    assert not np.array_equal(found, plain)
    assert pipe(denoised=found, output_type="latent").latents.shape == found.shape


def test_a_preset_counts_where_something_is_denoised(pipe: Pipeline) -> None:
    preset = Preset("fast", {"guidance_stop": 0.5}, 1, {})
    latents = np.zeros((1, 4, 4, 4), np.float32)
    assert "guidance_stop" in requested(pipe.calls, preset, CALL, ["denoised"]).given
    assert requested(pipe.calls, preset, {"denoised": latents}).given == {"denoised"}
    with pytest.raises(InputError, match="no value 'x'"):
        requested(pipe.calls, preset, CALL, ["x"])


def test_what_is_given_can_be_asked_for(pipe: Pipeline) -> None:
    """A copy, in the value's own dtype."""
    given = np.arange(64).reshape(1, 4, 4, 4)
    found = pipe.compute("latents", latents=given)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, given)
    found[:] = 0
    assert given.any()
    both = pipe.compute("latents", "latents", latents=given)
    assert [*both] == ["latents"]


def test_texts_of_earlier_calls_are_not_spoilt(pipe: Pipeline) -> None:
    first = pipe.compute("prompt_embeds", prompt="a red circle")
    kept = first.copy()
    first[:] = 7
    np.testing.assert_array_equal(pipe.compute("prompt_embeds", prompt="a red circle"), kept)


@pytest.mark.parametrize("odd", ODD)
def test_odd_names(odd: str, pipe: Pipeline) -> None:
    for names in ((ODD[odd],), ("latents", ODD[odd])):
        with pytest.raises(InputError, match="can be asked for; this bundle has: neg"):
            pipe.compute(*names, **CALL)


def test_closed(pipe: Pipeline) -> None:
    pipe.close()
    with pytest.raises(InputError, match="this pipeline is closed"):
        pipe.compute("latents", seed=1)
