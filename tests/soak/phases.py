"""This module says what one backend goes through for long, and measures what must stay level."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

THREADS = 16
_SAMPLES = 25
_WARM_UP = 0.4  # share of a phase that is not measured: allocators and engines fill their pools
# Bytes that a call, a load, or as many calls as there are threads may take for good, by the slope
# of the resident size.
_TOGETHER = f"{THREADS} threads"
_BOUND = 8 << 10
_BOUNDS = {"loads": 64 << 10, _TOGETHER: THREADS * _BOUND}

_CALL = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 7}


@dataclass(frozen=True)
class Phase:
    """A phase says what it gave: how often it went round, the slope of the resident size in bytes
    for each time, and how many descriptors and threads there are more than after the warm-up.
    """

    name: str
    count: int
    slope: float
    descriptors: int
    threads: int


@dataclass
class Soak:
    """The phases of one backend so far, and what was wrong."""

    backend: str
    phases: list[Phase] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def measure(self, name: str, count: int, once: Callable[[], object]) -> None:
        """Do something `count` times and note what it takes for good."""
        every = max(1, count // _SAMPLES)
        sizes: list[tuple[int, int]] = []
        start: tuple[int, int] | None = None
        for number in range(count):
            once()
            if number < count * _WARM_UP:
                continue
            if number % every == 0:
                gc.collect()
                sizes.append((number, _resident()))
                start = start or _handles()
        gc.collect()
        end, begin = _handles(), start or _handles()
        phase = Phase(name, count, _slope(sizes), end[0] - begin[0], end[1] - begin[1])
        self.phases.append(phase)
        bound = _BOUNDS.get(name, _BOUND)
        if phase.slope > bound:
            self.faults.append(f"{name}: {phase.slope:.0f} bytes each, more than {bound}")
        if phase.descriptors > 0 or phase.threads > 0:
            self.faults.append(
                f"{name}: {phase.descriptors} descriptors and {phase.threads} threads stay"
            )

    def expect(self, name: str, holds: bool) -> None:
        """Note a fault unless something holds."""
        if not holds:
            self.faults.append(name)


def run(backend: str, bundle: str, calls: int, loads: int) -> dict[str, Any]:
    """Go through all phases with one backend."""
    soak = Soak(backend)
    expected = image_of(bundle, backend)
    load = partial(_load, bundle, backend)
    with load() as pipe:

        def call() -> None:
            soak.expect("calls: another image", _digest(pipe(**_CALL)) == expected)

        soak.measure("calls", calls, call)
        soak.measure("abandoned streams", max(20, calls // 5), partial(_abandon, pipe))
        soak.measure("raising callbacks", max(20, calls // 5), partial(_raise, pipe))
        call()
        with ThreadPoolExecutor(THREADS) as pool:

            def together() -> None:
                results = list(pool.map(lambda _: _digest(pipe(**_CALL)), range(THREADS)))
                soak.expect("threads: another image", set(results) == {expected})

            together()
            soak.measure(_TOGETHER, max(20, calls // 20), together)

    def once() -> None:
        with load() as other:
            soak.expect("loads: another image", _digest(other(**_CALL)) == expected)

    soak.measure("loads", loads, once)
    for method in ("fork", "spawn"):
        for _ in range(3):
            soak.expect(f"{method}: another image", _in_child(method, bundle, backend) == expected)
    once()
    return {**asdict(soak), "faults": sorted(set(soak.faults))}


def image_of(bundle: str, backend: str) -> str:
    """Load a pipeline, make the image and return its digest."""
    with _load(bundle, backend) as pipe:
        return _digest(pipe(**_CALL))


def _load(bundle: str, backend: str) -> Any:
    import latentc

    return latentc.load(bundle, backend=backend, threads=1)


def _digest(result: Any) -> str:
    pixels = np.asarray(result.images[0])
    return hashlib.sha256(pixels.tobytes() + result.latents.tobytes()).hexdigest()


def _abandon(pipe: Any) -> None:
    """Begin a run, take a step of it, and forget it."""
    run = pipe.stream(**_CALL)
    list(islice(iter(run), 1))
    del run


class _OwnError(Exception):
    pass


def _raise(pipe: Any) -> None:
    """Make a call whose callback raises in its first step."""

    def callback(*_: Any) -> None:
        raise _OwnError

    with suppress(_OwnError):
        pipe(**_CALL, callback_on_step_end=callback)


def _in_child(method: str, bundle: str, backend: str) -> str:
    context: Any = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_send_image, args=(send, bundle, backend))
    child.start()
    send.close()
    found = receive.recv() if receive.poll(180) else "no answer within 180 s"
    child.join(30)
    if child.is_alive():
        child.kill()
        child.join()
    receive.close()
    child.close()
    return str(found)


def _send_image(pipe: Any, bundle: str, backend: str) -> None:
    pipe.send(image_of(bundle, backend))
    pipe.close()
    os._exit(0)  # a forked engine need not be taken down in order


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _handles() -> tuple[int, int]:
    import psutil

    own = psutil.Process()
    return own.num_fds(), own.num_threads()


def _slope(sizes: list[tuple[int, int]]) -> float:
    """Return by how much the second number grows when the first one grows by one."""
    if len(sizes) < 3:
        return 0.0
    at, values = np.array(sizes, np.float64).T
    return float(np.polyfit(at, values, 1)[0])
