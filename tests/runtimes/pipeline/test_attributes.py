"""These tests set what can be set on pipelines, runs and results, and what cannot, which is refused
with words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from latentc.runtimes.errors import InputError
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from tests.support.fakes import FakeBackend, make_bundle


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    with load(make_bundle(tmp_path / "bundle"), FakeBackend()) as made:
        yield made


def run(pipe: Pipeline, **arguments: Any) -> Any:
    return pipe("a", seed=1, output_type="latent", **arguments).images


@pytest.mark.fault("2.8", "pipe.scheduler = … changes nothing")
@pytest.mark.parametrize("name", ["noisy", "NoisyScheduler"])
def test_the_scheduler_of_the_pipeline(pipe: Pipeline, name: str) -> None:
    plain, noisy = (run(pipe, scheduler=each) for each in ("plain", "noisy"))
    assert (plain != noisy).any()
    assert pipe.scheduler == "plain"
    pipe.scheduler = name  # type: ignore[assignment]
    assert pipe.scheduler == "noisy"
    np.testing.assert_array_equal(run(pipe), noisy)
    assert pipe("a").settings["scheduler"] == "noisy"
    assert next(iter(pipe.stream("a")))._run.request.scheduler == "noisy"
    np.testing.assert_array_equal(run(pipe, scheduler="plain"), plain)  # the call's own goes first
    pipe.scheduler = pipe.scheduler
    np.testing.assert_array_equal(run(pipe, scheduler=pipe.scheduler), noisy)
    assert type(pipe("a", scheduler=pipe.scheduler).settings["scheduler"]) is str
    pipe.scheduler = None  # type: ignore[assignment]
    assert pipe.scheduler == "plain"
    np.testing.assert_array_equal(run(pipe), plain)


class NoisyScheduler:
    """Looks like one of diffusers'."""

    config: ClassVar[dict[str, int]] = {"num_train_timesteps": 1000}


class StrangeScheduler(NoisyScheduler):
    pass


@pytest.mark.fault("2.8", "a scheduler object is taken and ignored")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (NoisyScheduler(), "not an object of the class NoisyScheduler: .*; take 'noisy'"),
        (StrangeScheduler(), "of the class StrangeScheduler: .*; take 'plain' or 'noisy'"),
        ("dream", "no scheduler 'dream' in this bundle; it has: plain, noisy"),
        (3, "'scheduler' must be a name, not 3"),
    ],
)
def test_no_such_scheduler(pipe: Pipeline, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe.scheduler = value
    assert pipe.scheduler == "plain"
    with pytest.raises(InputError, match=message):
        pipe("a", scheduler=value)


@pytest.mark.fault("2.8", "attributes that change nothing can be set")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vae", "latentc export --vae"),
        ("unet", "fixed when it is exported"),
        ("safety_checker", "what can be set: scheduler"),
        ("schedulers", "what can be set: scheduler"),
        ("manifest", "what can be set: scheduler"),
        ("sessions", "what can be set: scheduler"),
        ("_progress_bar_config", "what can be set: scheduler"),
    ],
)
def test_attributes_that_cannot_be_set(pipe: Pipeline, name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"Pipeline.{name} cannot be set.*{hint}") as caught:
        setattr(pipe, name, None)
    assert isinstance(caught.value, AttributeError)


@pytest.mark.fault("2.8", "attributes of runs and results that change nothing can be set")
def test_attributes_of_runs_and_results(pipe: Pipeline) -> None:
    stream = pipe.stream("a")
    progress = next(stream)
    stream.latents = progress.latents * 0
    for name in ("scheduler", "timings", "num_timesteps", "_guidance_scale"):
        with pytest.raises(InputError, match=f"Run.{name} cannot be set.*set: latents"):
            setattr(stream, name, None)
    stream._interrupt = True  # diffusers' own way
    result = stream.finish()
    assert result.interrupted
    for frozen in (result, progress):
        with pytest.raises(AttributeError):
            frozen.anything = 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (3, "'callback_on_step_end' must be a function, not 3: Called as"),
        (lambda *_: {"latents": "x"}, "latents: expected an array of numbers, not 'x'"),
    ],
)
def test_callbacks_that_are_none(pipe: Pipeline, callback: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        pipe("a", callback_on_step_end=callback)


@pytest.mark.fault("2.8", "what diffusers' pipelines have, and these have not, says what to do")
@pytest.mark.parametrize(
    ("look", "hint"),
    [
        (lambda pipe: pipe.to("cuda"), "no attribute 'to'.*device="),
        (lambda pipe: pipe.enable_model_cpu_offload(), "low_memory=True"),
        (lambda pipe: pipe.load_lora_weights("x"), "latentc export --lora"),
        (lambda pipe: pipe.unet, "fixed when it is exported"),
        (lambda pipe: pipe.scheduler.config, "is the name 'plain', not a scheduler object"),
        (lambda pipe: pipe.nonsense, "it has: .*enable_vae_tiling.*schedulers"),
    ],
)
def test_attributes_that_are_not_there(
    pipe: Pipeline, look: Callable[[Any], object], hint: str
) -> None:
    with pytest.raises(AttributeError, match=hint):
        look(pipe)
    assert not hasattr(pipe, "unet")
