"""This module measures what this machine can do at best, and counts a pipeline's operations.

    python -m latentc.benchmarks.bench.roofline REQUEST.json

Peaks are the best of several products of square matrices and of several copies, with the library
that the baseline uses (PyTorch, or numpy where there is none): a limit that real programs reach on
this machine, not the data sheet's. The fraction of a limit follows Williams, Waterman and
Patterson, "Roofline" (CACM 52(4), 2009): the larger of operations / peak and bytes / bandwidth.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from latentc.benchmarks.bench.model import Limit, Operations, Peak

BANDWIDTH = "memory copy"
_SIDES = (512, 1024, 2048)
_SECONDS = 0.3  # for each size
_COPY = 64 << 20  # float32 values: 256 MiB, more than caches hold


def measure(device: str = "cpu", threads: int = 0) -> list[dict[str, Any]]:
    """Return the peaks of one device: records of `Peak`, without what is not there."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return [*_numpy_peaks(threads)]
    return [*_torch_peaks(device, threads)]


def best(records: Sequence[Sequence[Mapping[str, Any]]]) -> list[Peak]:
    """Return the best of several measurements of the same peaks."""
    best_by_key: dict[tuple[str, int, str], Peak] = {}
    for record in (measurement for measured in records for measurement in measured):
        peak = Peak(**record)
        key = peak.device, peak.threads, peak.name
        if key not in best_by_key or best_by_key[key].value < peak.value:
            best_by_key[key] = peak
    return list(best_by_key.values())


def limit(
    work: Operations, seconds: float, peaks: Sequence[Peak], device: str, threads: int, kind: str
) -> Limit | None:
    """Return what the peaks allow for this work, and the share of it that `seconds` reached.

    None where nothing was measured for the device, the number of threads and the precision.
    """
    mine = {p.name: p.value for p in peaks if p.device == device and p.threads == threads}
    name = kind if kind in mine else None
    if name is None or BANDWIDTH not in mine or not work.operations:
        return None
    compute = work.operations / mine[name]
    memory = (work.weights + work.transfers) / mine[BANDWIDTH]
    least = max(compute, memory)
    bound: Literal["compute", "memory"] = "compute" if compute >= memory else "memory"
    return Limit(seconds=least, fraction=least / seconds, bound=bound, peak=name)


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Count the operations that PyTorch does inside; the function tells how many so far.

    PyTorch's counter has no entry for its attention kernel on the CPU: it gets that of the others.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    own: dict[Any, Any] = {}
    name = "_scaled_dot_product_flash_attention_for_cpu"
    operator = getattr(torch.ops.aten, name, None)
    if operator is not None:
        own[operator] = attention
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        yield lambda: int(counter.get_total_flops())


def _torch_peaks(device: str, threads: int) -> Iterator[dict[str, Any]]:
    import torch

    if threads:
        torch.set_num_threads(threads)
    wait: Callable[[], Any] = torch.cuda.synchronize if device.startswith("cuda") else bool
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device != "cpu":
        kinds["fp16"] = torch.float16
    for name, dtype in kinds.items():
        with suppress(RuntimeError):
            value = max(_product_rate(torch, device, dtype, side, wait) for side in _SIDES)
            yield _record(device, threads, name, value)
    with suppress(RuntimeError):
        value = max(_int8_rate(torch, device, side, wait) for side in _SIDES)
        yield _record(device, threads, "int8", value)
    source = torch.ones(_COPY, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), wait)
    yield _record(device, threads, BANDWIDTH, 2 * 4 * _COPY / seconds, "bytes/s")


def _product_rate(torch: Any, device: str, dtype: Any, side: int, wait: Callable[[], Any]) -> float:
    a = torch.ones(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return float(2 * side**3 / _fastest(lambda: torch.mm(a, a, out=out), wait))


def _int8_rate(torch: Any, device: str, side: int, wait: Callable[[], Any]) -> float:
    a = torch.ones(side, side, device=device, dtype=torch.int8)
    return float(2 * side**3 / _fastest(lambda: torch._int_mm(a, a), wait))


def _numpy_peaks(threads: int) -> Iterator[dict[str, Any]]:
    import numpy as np

    rates = []
    for side in _SIDES:
        a = np.ones((side, side), np.float32)
        rates.append(2 * side**3 / _fastest(lambda a=a: a @ a, bool))  # type: ignore[misc]
    yield _record("cpu", threads, "fp32", max(rates))
    source = np.ones(_COPY, np.float32)
    target = np.empty_like(source)
    seconds = _fastest(lambda: np.copyto(target, source), bool)
    yield _record("cpu", threads, BANDWIDTH, 2 * 4 * _COPY / seconds, "bytes/s")


def _fastest(function: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Return the seconds of the fastest call: a peak is what the machine does when undisturbed."""
    function()
    wait()
    times: list[float] = []
    begun = perf_counter()
    while not times or (perf_counter() - begun < _SECONDS and len(times) < 1000):
        start = perf_counter()
        function()
        wait()
        times.append(perf_counter() - start)
    return min(times)


def _record(
    device: str, threads: int, name: str, value: float, unit: str = "operations/s"
) -> dict[str, Any]:
    return {"device": device, "threads": threads, "name": name, "unit": unit, "value": value}


if __name__ == "__main__":
    from latentc.benchmarks.measure import report

    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    report(measure(asked["device"], asked["threads"]))
