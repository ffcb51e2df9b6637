"""This module holds what every benchmark needs: fresh processes, their time and memory, medians,
tables.

Only ratios of figures taken side by side in one run mean much: the same command differs by
10% between two moments of one machine. So cases take turns (`take_turns`), and reports give
medians and their spread.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from latentc.runtimes.machine import cores, processor
from latentc.runtimes.storage.files import temporary_folder

T = TypeVar("T")

PACKAGES = (
    *("numpy", "tokenizers", "Pillow", "onnxruntime", "openvino"),
    *("torch", "diffusers", "transformers", "onnx"),
)
_RESULT = "LATENTC_BENCHMARK_RESULT"  # names the file that a child writes its result to
_ERROR_LINES = 15
# How libraries say that an allocation failed.
_NO_MEMORY = ("MemoryError", "bad_alloc", "out of memory", "not enough memory", "OutOfMemory")
# Ends a script that is measured: what `report(None)` does, without importing anything.
_EPILOGUE = f"""
try:
    with open("/proc/self/status", encoding="ascii") as _lines:
        _kib = next(_line.split()[1] for _line in _lines if _line.startswith("VmHWM"))
    with open(__import__("os").environ["{_RESULT}"], "w") as _answer:
        _answer.write('{{"peak_memory": %d}}' % (int(_kib) << 10))
except OSError:
    pass
"""


@dataclass(frozen=True)
class Child:
    """A process that is over.

    `peak_memory` is what the process itself read last (Linux's VmHWM), `max_rss` what the
    kernel said when it was gone, both in bytes. `cpu` is its processor time in seconds, which
    other programs disturb less. `result` is what it handed to `report`.
    """

    seconds: float
    cpu: float
    peak_memory: int
    max_rss: int
    result: Any


class ChildFailed(RuntimeError):
    """A child process ended with a non-zero exit code; holds the end of what it said.

    `kind` is ``failed``, ``timeout`` or ``out of memory``.
    """

    def __init__(self, message: str, kind: str = "failed") -> None:
        self.kind = kind
        super().__init__(message)


@dataclass(frozen=True)
class Bounds:
    """The bounds say what a child may use before it is ended.

    They are wall seconds, and resident bytes together with its own children (watched where psutil
    is installed). None is no bound.
    """

    seconds: float | None = None
    memory: int | None = None


def run_child(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    echo: bool = False,
    output: Path | None = None,
    python: str | None = None,
    bounds: Bounds = Bounds(),
) -> Child:
    """Run Python with `arguments` and wait for it.

    Wall time is from before the process is made to after it is gone.

    Args:
        environment: added to this process's own.
        echo: let the child write to this terminal.
        output: where to keep what it writes otherwise.
        python: the interpreter of another environment.
        bounds: after which it is ended.

    Raises:
        ChildFailed: a non-zero exit code, or the bounds were passed.
    """
    with temporary_folder() as folder:
        answer = folder / "result.json"
        output = output or folder / "output.txt"
        settings = {**os.environ, **(environment or {}), _RESULT: str(answer)}
        with output.open("wb") as sink:
            stream = None if echo else sink
            begun = time.perf_counter()
            process = subprocess.Popen(
                [python or sys.executable, *arguments], env=settings, stdout=stream, stderr=stream
            )
            watch = _Watch(process, bounds, begun)
            code, cpu, peak = _wait(process, watch)
            seconds = time.perf_counter() - begun
        if code != 0:
            said = output.read_text(errors="replace").strip().splitlines()[-_ERROR_LINES:]
            what = " ".join(arguments[:3])[:80]
            raise _failure(what, code, said, watch)
        reported = json.loads(answer.read_text()) if answer.exists() else {}
        # The kernel's figure includes the moment before exec, when the child shared the memory
        # of this process: a small child of a large parent is right by its own word only.
        own = int(reported.get("peak_memory", 0)) or peak
        return Child(seconds, cpu, own, peak, reported.get("result"))


def run_script(script: str, arguments: Sequence[str], output: Path | None = None) -> Child:
    """Run the text of a script that knows nothing of being measured; see `run_child`."""
    return run_child(["-c", script + _EPILOGUE, *arguments], output=output)


def report(result: Any) -> None:
    """Hand over a JSON-able result and the peak memory so far, in a child of `run_child`."""
    path = os.environ.get(_RESULT)
    if path:
        Path(path).write_text(json.dumps({"result": result, "peak_memory": peak_memory()}))


def peak_memory() -> int:
    """Return the largest resident size that this process has had, in bytes."""
    return _status("VmHWM") or _maximum_resident()


def current_memory() -> int:
    """Return the resident size of this process in bytes; 0 where the system does not say."""
    return _status("VmRSS")


def anonymous_memory() -> int:
    """Return the resident bytes of this process that are no mapped file; 0 where the system does
    not say.
    """
    return _status("RssAnon")


@dataclass(frozen=True)
class Summary:
    """Median, smallest and largest of a series."""

    median: float
    low: float
    high: float
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Return the summary of a series.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to summarise")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def take_turns(cases: dict[str, Callable[[], T]], runs: int) -> dict[str, list[T]]:
    """Run every case `runs` times, all of them in every round, in alternating order.

    A machine that warms up, or gets busy for a while, then touches all cases alike.
    """
    results: dict[str, list[T]] = {name: [] for name in cases}
    for index in range(runs):
        names = list(cases) if index % 2 == 0 else list(reversed(cases))
        for name in names:
            results[name].append(cases[name]())
    return results


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return the function's value and the seconds it took."""
    begun = time.perf_counter()
    value = function()
    return value, time.perf_counter() - begun


@dataclass(frozen=True)
class Machine:
    """Where something was measured. `memory` in bytes, `load` is the load average at the time
    (other programs on the same cores make every figure worse)."""

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    load: float
    versions: Mapping[str, str]

    def line(self) -> str:
        """Return one line for the head of a table."""
        return (
            f"{self.cpu}, {self.cores} cores, {gib(self.memory)}, Python {self.python}, "
            f"load {self.load:.1f}"
        )


def machine() -> Machine:
    """Return what this machine is, and the versions of what is measured on it."""
    return Machine(
        cpu=processor(),
        cores=cores(),
        memory=_total_memory(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        versions={name: version for name in PACKAGES if (version := _version(name))},
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table: columns as wide as needed, the first aligned left, numbers right."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_json(path: Path, measured: Mapping[str, Any]) -> None:
    """Write a report together with a description of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": asdict(machine()), **measured}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def gib(size: float) -> str:
    """Return a size in GiB with two decimals."""
    return f"{size / 2**30:.2f} GiB"


def mib(size: float) -> str:
    """Return a size in MiB without decimals."""
    return f"{size / 2**20:.0f} MiB"


class _Watch:
    """Ends a child that passes its bounds; `reason` then says which."""

    _PAUSE = 0.05  # seconds between two looks

    def __init__(self, process: subprocess.Popen[bytes], bounds: Bounds, begun: float) -> None:
        self.reason = ""
        self.kind = "failed"
        self._process = process
        self._bounds = bounds
        self._begun = begun
        self._over = threading.Event()
        self._lock = threading.Lock()
        if bounds != Bounds():
            threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        """Stop watching: the child has ended, and its number may go to another process."""
        with self._lock:
            self._over.set()

    def _look(self) -> None:
        while not self._over.wait(self._PAUSE):
            seconds, memory = self._bounds.seconds, self._bounds.memory
            if seconds is not None and time.perf_counter() - self._begun > seconds:
                self._end("timeout", f"still running after {seconds:g} s")
            elif memory is not None and _tree_memory(self._process.pid) > memory:
                self._end("out of memory", f"took more than {gib(memory)}")

    def _end(self, kind: str, reason: str) -> None:
        with self._lock:
            if not self._over.is_set():
                self.kind, self.reason = kind, reason
                self._over.set()
                _kill_tree(self._process)


def _failure(what: str, code: int, said: Sequence[str], watch: _Watch) -> ChildFailed:
    """Return the error for a child that ended with another code than 0."""
    text = "".join(f"\n    {line}" for line in said)
    if watch.reason:
        return ChildFailed(f"{what} was ended: {watch.reason}{text}", watch.kind)
    starved = code == -9 or any(sign in text for sign in _NO_MEMORY)
    message = f"{what} ended with code {code}{text}"
    return ChildFailed(message, "out of memory" if starved else "failed")


def _tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and of those that it started; 0 if nobody can say."""
    try:
        import psutil
    except ImportError:
        return 0
    try:
        root = psutil.Process(pid)
        return sum(each.memory_info().rss for each in (root, *root.children(recursive=True)))
    except psutil.Error:  # gone meanwhile
        return 0


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a child and what it started."""
    below: list[Any] = []
    try:
        import psutil

        below = psutil.Process(process.pid).children(recursive=True)
    except Exception:  # psutil is missing, or the process is gone: the child itself is left
        below = []
    process.kill()
    for each in below:
        with contextlib.suppress(Exception):
            each.kill()


def _wait(process: subprocess.Popen[bytes], watch: _Watch) -> tuple[int, float, int]:
    """Return exit code, processor time and peak resident size of this very child."""
    if not hasattr(os, "wait4"):
        code = process.wait()
        watch.stop()
        return code, 0.0, 0
    try:
        # First without reaping: until wait4 the number belongs to the child.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        watch.stop()
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C: no benchmark goes on in the background
        watch.stop()
        _kill_tree(process)
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    return process.returncode, cpu, _to_bytes(usage.ru_maxrss)


def _maximum_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return _to_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _to_bytes(maximum: int) -> int:
    return maximum if sys.platform == "darwin" else maximum * 1024


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes, 0 where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)
    except OSError:
        return 0


def _total_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
