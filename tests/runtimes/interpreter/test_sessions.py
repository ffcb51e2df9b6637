"""Sessions that are kept, and sessions that live for as long as they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentc.runtimes.backends.session import Session
from latentc.runtimes.backends.sessions import Sessions
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import BackendError
from latentc.runtimes.pipeline.pipeline import load
from tests.support.fakes import GRAPHS, FakeBackend, FakeSession, make_bundle


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records what is opened (+) and closed (-), in order."""
    told: list[str] = []
    opened, closed = FakeBackend._open, FakeSession._close

    def open_(self: FakeBackend, entry: Path, component: Any, *rest: Any) -> Session:
        told.append(f"+{component.name}")
        session = opened(self, entry, component, *rest)
        session.told_name = component.name  # type: ignore[attr-defined]
        return session

    def close(self: FakeSession) -> None:
        told.append(f"-{getattr(self, 'told_name', '?')}")
        closed(self)

    monkeypatch.setattr(FakeBackend, "_open", open_)
    monkeypatch.setattr(FakeSession, "_close", close)
    return told


def test_one_component_at_a_time(bundle: Path, log: list[str]) -> None:
    arguments: dict[str, Any] = {"seed": 1, "output_type": "np", "num_inference_steps": 2}
    with load(bundle, FakeBackend()) as pipe:
        expected = pipe("a red circle", **arguments).images
        assert sorted(log) == ["+decoder", "+denoiser", "+text_encoder"]
    log.clear()
    with load(bundle, FakeBackend(), low_memory=True) as pipe:
        assert log == []
        rest = ["+denoiser", "-denoiser", "+decoder", "-decoder"]
        # The second time, the text is encoded already.
        for opened in (["+text_encoder", "-text_encoder", *rest], rest):
            found = pipe("a red circle", **arguments).images
            np.testing.assert_array_equal(found, expected)
            assert log == opened
            log.clear()


def test_a_run_that_is_given_up_frees_the_denoiser(bundle: Path, log: list[str]) -> None:
    with load(bundle, FakeBackend(), low_memory=True) as pipe:
        run = pipe.stream("a red circle", num_inference_steps=4)
        next(run)
        assert log[-1] == "+denoiser"
        run.close()
        assert log[-1] == "-denoiser"


def test_two_runs_share_what_is_open(bundle: Path, log: list[str]) -> None:
    with load(bundle, FakeBackend(), low_memory=True) as pipe:
        runs = [pipe.stream("a red circle", num_inference_steps=2) for _ in range(2)]
        for run in runs:
            next(run)
        assert log.count("+denoiser") == 1
        runs[0].finish()
        assert "-denoiser" not in log
        runs[1].finish()
        assert log.count("-denoiser") == 1


def made(
    bundle: Path,
    keep: bool,
    opener: Callable[[str], Session] | None = None,
    parallel: bool = False,
) -> Sessions:
    components = {each.name: each for each in Manifest.load(bundle).components}
    graphs = {**GRAPHS}
    return Sessions(
        components,
        opener or (lambda name: FakeSession(graphs[name], components[name])),
        keep,
        parallel,
    )


@pytest.mark.parametrize("keep", [True, False])
def test_a_mapping(bundle: Path, keep: bool) -> None:
    sessions = made(bundle, keep)
    assert [*sessions] == ["text_encoder", "denoiser", "decoder"]
    assert len(sessions) == 3
    assert sessions["decoder"] is sessions["decoder"]
    with pytest.raises(KeyError):
        sessions["vae"]
    sessions.close()
    sessions.close()
    with pytest.raises(BackendError, match="closed"), sessions.using("denoiser") as session:
        session.run({})


def test_all_are_opened_at_once(bundle: Path) -> None:
    components = {each.name: each for each in Manifest.load(bundle).components}
    together = threading.Barrier(len(components), timeout=10)

    def opener(name: str) -> Session:
        together.wait()  # breaks unless every component is being opened
        return FakeSession(GRAPHS[name], components[name])

    sessions = made(bundle, True, opener, parallel=True)
    assert {name: session.inputs for name, session in sessions.items()} == {
        name: dict(component.inputs) for name, component in components.items()
    }


def test_the_first_of_several_failures(bundle: Path, log: list[str]) -> None:
    components = {each.name: each for each in Manifest.load(bundle).components}
    failed = threading.Event()

    def opener(name: str) -> Session:
        if name == "decoder":
            failed.set()
            raise BackendError("no decoder")
        assert failed.wait(10)
        if name == "denoiser":
            raise BackendError("no denoiser")
        return FakeSession(GRAPHS[name], components[name])

    with pytest.raises(BackendError, match="no denoiser"):
        made(bundle, True, opener, parallel=True)
    assert log == ["-?"]  # the text encoder


def test_who_loads_at_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    opened = FakeBackend._open

    def open_(self: FakeBackend, *rest: Any) -> Session:
        seen.add(threading.get_ident())
        return opened(self, *rest)

    monkeypatch.setattr(FakeBackend, "_open", open_)
    monkeypatch.setattr(FakeBackend, "loads_in_parallel", False)
    load(bundle, FakeBackend()).close()
    monkeypatch.setattr(FakeBackend, "loads_in_parallel", True)
    load(bundle, FakeBackend()).close()  # too small a bundle
    monkeypatch.setattr(FakeBackend, "loads_in_parallel", False)
    monkeypatch.setattr("latentc.runtimes.pipeline.pipeline._PARALLEL", 0)
    load(bundle, FakeBackend()).close()
    assert seen == {threading.get_ident()}
    monkeypatch.setattr(FakeBackend, "loads_in_parallel", True)
    load(bundle, FakeBackend()).close()
    assert len(seen) > 1


def test_a_failure_to_open_leaves_nothing_open(bundle: Path, log: list[str]) -> None:
    def opener(name: str) -> Session:
        if name == "decoder":
            raise BackendError("no decoder")
        return FakeSession(GRAPHS[name], next(c for c in components if c.name == name))

    components = Manifest.load(bundle).components
    with pytest.raises(BackendError, match="no decoder"):
        made(bundle, True, opener)
    assert log == ["-?", "-?"]
