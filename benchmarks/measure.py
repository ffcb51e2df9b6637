"""What every benchmark needs: fresh processes, their time and memory, medians, tables.

Only ratios of figures taken side by side in one run mean much: the same command differs by
10% between two moments of one machine. So cases take turns (`take_turns`), and reports give
medians and their spread.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PACKAGES = (
    *("numpy", "tokenizers", "Pillow", "onnxruntime", "openvino"),
    *("torch", "diffusers", "transformers", "onnx"),
)
_RESULT = "LATENTC_BENCHMARK_RESULT"  # names the file that a child writes its result to
_ERROR_LINES = 15
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
    """A child process ended with a non-zero exit code; holds the end of what it said."""


def run_child(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    echo: bool = False,
    output: Path | None = None,
) -> Child:
    """Run Python with `arguments` and wait for it.

    Wall time is from before the process is made to after it is gone.

    Args:
        environment: added to this process's own.
        echo: let the child write to this terminal.
        output: where to keep what it writes otherwise.

    Raises:
        ChildFailed: a non-zero exit code.
    """
    with tempfile.TemporaryDirectory(prefix="latentc-bench-") as folder:
        answer = Path(folder) / "result.json"
        output = output or Path(folder) / "output.txt"
        settings = {**os.environ, **(environment or {}), _RESULT: str(answer)}
        with output.open("wb") as sink:
            stream = None if echo else sink
            begun = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *arguments], env=settings, stdout=stream, stderr=stream
            )
            code, cpu, peak = _wait(process)
            seconds = time.perf_counter() - begun
        if code != 0:
            said = output.read_text(errors="replace").strip().splitlines()[-_ERROR_LINES:]
            raise ChildFailed(
                f"{' '.join(arguments[:3])[:80]} ended with code {code}"
                + "".join(f"\n    {line}" for line in said)
            )
        reported = json.loads(answer.read_text()) if answer.exists() else {}
        # The kernel's figure includes the moment before exec, when the child shared the memory
        # of this process: a small child of a large parent is right by its own word only.
        own = int(reported.get("peak_memory", 0)) or peak
        return Child(seconds, cpu, own, peak, reported.get("result"))


def run_script(script: str, arguments: Sequence[str], output: Path | None = None) -> Child:
    """Run the text of a script that knows nothing of being measured; see `run_child`."""
    return run_child(["-c", script + _EPILOGUE, *arguments], output=output)


def report(result: Any) -> None:
    """In a child of `run_child`: hand over a JSON-able result and the peak memory so far."""
    path = os.environ.get(_RESULT)
    if path:
        Path(path).write_text(json.dumps({"result": result, "peak_memory": peak_memory()}))


def peak_memory() -> int:
    """The largest resident size that this process has had, in bytes."""
    return _status("VmHWM") or _maximum_resident()


def current_memory() -> int:
    """The resident size of this process in bytes; 0 where the system does not say."""
    return _status("VmRSS")


@dataclass(frozen=True)
class Summary:
    """Median, smallest and largest of a series."""

    median: float
    low: float
    high: float
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """The summary of a series.

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
    """The function's value and the seconds it took."""
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
        """One line for the head of a table."""
        return (
            f"{self.cpu}, {self.cores} cores, {gib(self.memory)}, Python {self.python}, "
            f"load {self.load:.1f}"
        )


def machine() -> Machine:
    """This machine, and the versions of what is measured on it."""
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        memory=_total_memory(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        versions={name: found for name in PACKAGES if (found := _version(name))},
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed; the first is aligned left, numbers right."""
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
    """A size in GiB with two decimals."""
    return f"{size / 2**30:.2f} GiB"


def mib(size: float) -> str:
    """A size in MiB without decimals."""
    return f"{size / 2**20:.0f} MiB"


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, float, int]:
    """Exit code, processor time and peak resident size of this very child."""
    if not hasattr(os, "wait4"):
        return process.wait(), 0.0, 0
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C: no benchmark goes on in the background
        process.kill()
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
    """A field of /proc/self/status in bytes, 0 where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)
    except OSError:
        return 0


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _cores() -> int:
    return os.cpu_count() or 1


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
