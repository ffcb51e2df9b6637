"""Closing a pipeline, and giving up a run, while a call is under way: nothing is freed beneath it,
nothing waits for itself, and whoever is in a call gets a clean error."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentc
from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import BackendError, InputError
from latentc.runtimes.interrupts import on_interrupt
from latentc.runtimes.pipeline import observe
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from latentc.runtimes.pipeline.run import Run
from tests.support.fakes import GRAPHS, FakeBackend, FakeSession, make_bundle

PROMPT = "a red circle"
PATIENCE = 20  # seconds after which something has not happened


class Step:
    """Stops the denoiser's graph: `began` says that it runs, `go` lets it end."""

    def __init__(self) -> None:
        self.began, self.go, self.ended = (threading.Event() for _ in range(3))
        self.inside: Callable[[], object] | None = None  # called in the graph's own thread

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self.began.set()
        if self.inside is not None:
            self.inside()
        else:
            assert self.go.wait(PATIENCE)
        made = GRAPHS["denoiser"](feeds)
        self.ended.set()
        return made


class Task(threading.Thread):
    """A thread that keeps what its function returns or raises."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result, self.error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error

    def end(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "it waits forever"
        return self.error or self.result


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Step]:
    made = Step()
    monkeypatch.setitem(GRAPHS, "stopped", made)  # type: ignore[arg-type]
    yield made
    made.go.set()


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch, step: Step) -> list[bool]:
    """For each time that the denoiser is freed, whether the stopped call had ended by then."""
    told: list[bool] = []

    def close(self: FakeSession) -> None:
        if "sample" in self.inputs:
            told.append(step.ended.is_set())

    monkeypatch.setattr(FakeSession, "_close", close)
    return told


@pytest.fixture(params=[False, True], ids=["kept", "low_memory"])
def pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step, request: pytest.FixtureRequest
) -> Pipeline:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    bundle = make_bundle(tmp_path / "bundle", graphs={"denoiser": "stopped"})
    return load(bundle, FakeBackend(), low_memory=request.param)


@pytest.mark.fault("1.7", "closing a pipeline frees an engine beneath a call")
def test_closing_waits_for_the_call(pipe: Pipeline, step: Step, closed: list[bool]) -> None:
    call = Task(lambda: pipe(PROMPT))
    assert step.began.wait(PATIENCE)
    closers = [Task(pipe.close) for _ in range(2)]
    closers[0].join(0.2)
    assert all(each.is_alive() for each in closers)
    with pytest.raises(InputError, match="pipeline is closed"):
        pipe(PROMPT)
    with pytest.raises(BackendError, match="pipeline is closed"):
        pipe.decode(np.zeros((1, 4, 8, 8), np.float32))
    step.go.set()
    assert [each.end() for each in closers] == [None, None]
    error = call.end()
    assert isinstance(error, BackendError)
    assert "this pipeline was closed before the call had ended" in str(error)
    assert closed == [True]


def _from_a_handler(close: Callable[[], object]) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: close())
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def _from_a_finaliser(close: Callable[[], object]) -> None:
    class Owner:
        def __del__(self) -> None:
            close()

    owner = Owner()
    owner.itself = owner  # type: ignore[attr-defined]
    del owner
    gc.collect()


# Signals are raised in a process of their own: one in which engines had worked for long ended with
# SIGSEGV when it got one under pytest.
SIGNALS = "LATENTC_TEST_SIGNALS"
HOW = {
    "directly": lambda close: close(),
    **({"signal handler": _from_a_handler} if SIGNALS in os.environ else {}),
    "finaliser": _from_a_finaliser,
    "another thread, unawaited": lambda close: Task(close),
}


@pytest.mark.fault("1.7", "close() from inside of a call waits for itself")
@pytest.mark.parametrize("how", HOW)
def test_closing_from_inside_of_a_step(
    pipe: Pipeline, step: Step, closed: list[bool], how: str
) -> None:
    step.inside = lambda: HOW[how](pipe.close)
    with pytest.raises(BackendError, match="pipeline was closed"):
        pipe(PROMPT)
    pipe.close()
    assert closed == [True]
    with pytest.raises(InputError, match="pipeline is closed"):
        pipe(PROMPT)


@pytest.mark.fault("1.7", "giving up a run from inside of it raises 'generator already executing'")
@pytest.mark.parametrize("how", HOW)
def test_giving_up_from_inside_of_a_step(pipe: Pipeline, step: Step, how: str) -> None:
    run = pipe.stream(PROMPT)
    step.inside = lambda: HOW[how](run.close)
    steps = list(run)
    assert steps == [] or how.startswith("another")
    assert len(steps) <= 1
    with pytest.raises(InputError, match="closed or failed"):
        run.finish()
    step.inside = lambda: None
    assert len(pipe(PROMPT).images) == 1  # the pipeline is as it was


@pytest.mark.fault("1.7", "giving up a run in its callback")
def test_giving_up_in_a_callback(pipe: Pipeline, step: Step) -> None:
    step.go.set()
    seen: list[int] = []

    def callback(run: Run, index: int, *_: object) -> None:
        seen.append(index)
        run.close()

    with pytest.raises(InputError, match="closed or failed"):
        pipe(PROMPT, callback_on_step_end=callback)
    assert seen == [0]


@pytest.mark.fault("1.7", "closing a pipeline in a callback")
def test_closing_in_a_callback(pipe: Pipeline, step: Step) -> None:
    step.go.set()
    with pytest.raises(BackendError, match="pipeline was closed"):
        pipe(PROMPT, callback_on_step_end=lambda *_: pipe.close())


@pytest.mark.fault("1.7", "closing where observers of results are called")
@pytest.mark.filterwarnings("error")
def test_closing_in_an_observer(pipe: Pipeline, step: Step) -> None:
    step.go.set()

    def close(run: Run, result: latentc.Result) -> None:
        run.close()
        run.pipeline.close()

    remove = observe.add(close)
    try:
        assert len(pipe(PROMPT).images) == 1  # it is there already
    finally:
        remove()


@pytest.mark.fault("1.7", "giving up a run from another thread raises ValueError")
def test_giving_up_from_another_thread(pipe: Pipeline, step: Step, closed: list[bool]) -> None:
    run = pipe.stream(PROMPT)
    steps = Task(lambda: list(run))
    assert step.began.wait(PATIENCE)
    run.close()  # does not wait
    assert steps.is_alive()
    assert closed == []
    with pytest.raises(InputError, match="at work already"):
        next(run)
    step.go.set()
    assert steps.end() == []
    with pytest.raises(InputError, match="closed or failed"):
        run.finish()
    assert closed == ([] if pipe.sessions._keep else [True])
    assert len(pipe(PROMPT).images) == 1


@pytest.mark.fault("1.7", "closing with streams that were left half-way")
def test_closing_with_streams_left_half_way(pipe: Pipeline, step: Step) -> None:
    step.go.set()
    runs = [pipe.stream(PROMPT) for _ in range(3)]
    for run in runs[:2]:
        next(run)
    assert Task(pipe.close).end() is None
    for run in runs:
        with pytest.raises(BackendError, match="pipeline was closed"):
            next(run)
    runs[0].close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be forked")
@pytest.mark.fault("1.7", "closing in a process that was forked during a call waits forever")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_closing_in_a_forked_process(pipe: Pipeline, step: Step) -> None:
    """The thread that runs the call is not there: nobody will end it."""
    call = Task(lambda: pipe(PROMPT))
    assert step.began.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        try:
            pipe.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    step.go.set()
    assert len(call.end().images) == 1


def test_giving_up_before_the_first_step(pipe: Pipeline, step: Step, closed: list[bool]) -> None:
    run = pipe.stream(PROMPT)
    closers = [Task(run.close) for _ in range(8)]
    assert [each.end() for each in closers] == [None] * 8
    run.interrupt()
    assert list(run) == []
    assert not step.began.is_set()
    assert closed == []
    step.go.set()
    assert len(pipe(PROMPT).images) == 1


def test_many_threads_close_what_many_threads_use(pipe: Pipeline, step: Step) -> None:
    """Streams are taken further, given up and forgotten while the pipeline is closed under them."""
    step.go.set()
    ready = threading.Barrier(9)

    def work(number: int) -> None:
        runs = [pipe.stream(PROMPT, seed=each) for each in range(3)]
        next(runs[0])
        ready.wait(PATIENCE)
        for run in runs:
            if number % 2:
                run.close()
            list(run)
        pipe.close()

    workers = [Task(lambda number=number: work(number)) for number in range(8)]  # type: ignore[misc]
    ready.wait(PATIENCE)
    assert [Task(pipe.close).end() for _ in range(3)] == [None] * 3
    for worker in workers:
        error = worker.end()
        assert error is None or isinstance(error, BackendError | InputError)


@pytest.mark.fault("1.7", "giving up a run ends the step that is under way, where the engine can")
def test_a_step_is_ended_by_its_engine(
    pipe: Pipeline, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only that of the run, not those of others that share the session."""
    ended, plain = threading.Event(), FakeSession._run

    def endless(self: FakeSession, feeds: Feeds) -> dict[str, Array]:
        if "sample" not in feeds:
            return plain(self, feeds)
        with self._abortable(ended.set):
            step.began.set()
            assert ended.wait(PATIENCE)
            raise RuntimeError("ended by the engine")

    run = pipe.stream(PROMPT)
    monkeypatch.setattr(FakeSession, "_run", endless)
    steps = Task(lambda: list(run))
    assert step.began.wait(PATIENCE)
    pipe.stream(PROMPT).close()
    assert not ended.is_set()
    run.close()
    assert steps.end() == []
    step.began.clear()
    ended.clear()
    call = Task(lambda: pipe(PROMPT))
    assert step.began.wait(PATIENCE)
    assert Task(pipe.close).end() is None
    assert isinstance(call.end(), BackendError)


@pytest.mark.fault("1.7", "Ctrl-C waits for the end of a step")
@pytest.mark.fault("1.7", "closing in a signal handler")
def test_what_is_raised_in_a_process_of_its_own() -> None:
    """The tests of this file that raise signals."""
    arguments = [__file__, "-q", "-p", "no:cacheprovider", "-k", "signal or interrupt_ends"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parents[3],
        env={**os.environ, SIGNALS: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "6 passed" in result.stdout, result.stdout


@pytest.mark.skipif(SIGNALS not in os.environ, reason="runs in a process of its own")
def test_an_interrupt_ends_the_step(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, plain = threading.Event(), FakeSession._run

    def endless(self: FakeSession, feeds: Feeds) -> dict[str, Array]:
        if "sample" not in feeds:
            return plain(self, feeds)
        # An engine's own code runs no handlers of Python's: nor does this, of any effect.
        held = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            with self._abortable(ended.set):
                signal.raise_signal(signal.SIGINT)
                assert ended.wait(PATIENCE)
                raise RuntimeError("ended by the engine")
        finally:
            signal.signal(signal.SIGINT, held)

    monkeypatch.setattr(FakeSession, "_run", endless)
    before = signal.set_wakeup_fd(-1)
    run = pipe.stream(PROMPT)
    with on_interrupt(run.close):
        assert list(run) == []
    assert signal.set_wakeup_fd(before) == -1
    with on_interrupt(run.close):
        pass
    assert not any(each.name == "latentc-interrupts" for each in threading.enumerate())


@pytest.mark.fault("1.7", "a session that is bound to constants is closed beneath a call")
def test_a_bound_session() -> None:
    """A bound session gives back what was placed for it when its call has ended, and once."""
    events: list[str] = []
    step = Step()

    class Placing(Session):
        def _run(self, feeds: Feeds) -> dict[str, Array]:
            raise NotImplementedError

        def _run_placed(self, feeds: Feeds, placed: Any) -> dict[str, Array]:
            step.began.set()
            assert step.go.wait(PATIENCE)
            events.append("ran")
            return {"y": placed["b"]}

        def _release(self, placed: Any) -> None:
            events.append("released")

        def _close(self) -> None:
            events.append("closed")

    spec = TensorSpec("float32", ("batch",))
    session = Placing({"a": spec, "b": spec}, {"y": spec})
    bound = session.bind({"b": np.ones(2, np.float32)})
    call = Task(lambda: bound.run({"a": np.ones(2, np.float32)}))
    assert step.began.wait(PATIENCE)
    closers = [Task(bound.close), Task(session.close)]
    closers[0].join(0.2)
    assert events == []
    step.go.set()
    assert [each.end() for each in closers] == [None, None]
    np.testing.assert_array_equal(call.end()["y"], np.ones(2))
    assert events == ["ran", "released", "closed"]
    with pytest.raises(BackendError, match="closed"):
        bound.run({"a": np.ones(2, np.float32)})


@pytest.mark.fault("1.7", "PyTorch ends the process: tensors that are freed after the close")
@pytest.mark.parametrize("ended", ["bound", "unbound", "failed"])
def test_no_tensor_outlives_its_session(ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that frees one of PyTorch's tensors while Python shuts down ends the process, so
    nothing that a caller may still have refers to one, an exception included."""
    torch = pytest.importorskip("torch")
    from latentc.runtimes.backends.torch import TorchSession, _Settings
    from latentc.runtimes.backends.torch_program import LoadedProgram

    def module(a: Any, b: Any) -> tuple[Any]:
        if ended == "failed":
            raise RuntimeError("out of memory")
        return (a + b,)

    spec = TensorSpec("float32", ("batch",))
    component = Component("denoiser", "denoiser", {"a": spec, "b": spec}, {"y": spec})
    program = LoadedProgram(module, ("a", "b"), {})
    session = TorchSession(torch, program, component, _Settings("cpu", "fp32", False))
    tensors: list[weakref.ref[Any]] = []
    from_numpy = torch.from_numpy

    def watched(array: Array) -> Any:
        tensors.append(weakref.ref(tensor := from_numpy(array)))
        return tensor

    monkeypatch.setattr(torch, "from_numpy", watched)
    ones = np.ones(2, np.float32)
    kept: list[Any] = [session if ended == "unbound" else session.bind({"b": ones})]
    feeds = {"a": ones, "b": ones} if ended == "unbound" else {"a": ones}
    try:
        kept.append(kept[0].run(feeds))
    except BackendError as error:
        kept.append(error)
    session.close()
    assert len(kept) == 2
    assert isinstance(kept[1], BackendError) == (ended == "failed")
    assert len(tensors) == 2
    assert not any(tensor() is not None for tensor in tensors)
    if ended != "failed":
        assert kept[1]["y"].flags.owndata
