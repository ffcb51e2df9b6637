"""Observers of results: told of every run that is done, and unable to harm one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentc.runtimes.pipeline import observe
from latentc.runtimes.pipeline.pipeline import Pipeline, load


@pytest.fixture(scope="module")
def pipe(sd_bundle: Path) -> Iterator[Pipeline]:
    with load(sd_bundle, backend="onnxruntime") as loaded:
        yield loaded


def test_an_observer_sees_runs_until_it_is_removed(pipe: Pipeline) -> None:
    seen: list[tuple[Any, Any]] = []
    remove = observe.add(lambda run, result: seen.append((run, result)))
    result = pipe("a star", num_inference_steps=1, seed=3)
    ((run, told),) = seen
    assert told is result
    assert run.request.seeds == (3,)
    remove()
    remove()
    pipe("a star", num_inference_steps=1)
    assert len(seen) == 1


def test_an_observer_that_fails_is_a_warning_once(pipe: Pipeline) -> None:
    seen: list[Any] = []

    def fail(run: Any, result: Any) -> None:
        raise RuntimeError("no disk")

    removers = [observe.add(fail), observe.add(lambda run, result: seen.append(result))]
    try:
        with pytest.warns(UserWarning, match=r"fail.*no disk"):
            assert pipe("a star", num_inference_steps=1).images
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pipe("a star", num_inference_steps=1).images
        assert len(seen) == 2
    finally:
        for remove in removers:
            remove()
