"""This machine's GPUs, as their driver describes them."""

from __future__ import annotations

import subprocess

from latentc.benchmarks.bench.model import Gpu

_MIB = 1 << 20


def gpus() -> list[Gpu]:
    """Return NVIDIA's GPUs; none where there is no driver."""
    rows = _ask("--query-gpu=name,driver_version,memory.total")
    return [
        Gpu(name=name, driver=driver, memory=int(memory) * _MIB)
        for name, driver, memory in (row for row in rows if len(row) == 3)
    ]


def process_gpu_memory(pid: int) -> int | None:
    """Return the bytes that a process holds on NVIDIA's GPUs; None where the driver tells none."""
    rows = _ask("--query-compute-apps=pid,used_memory")
    mine = [int(used) for number, used in (r for r in rows if len(r) == 2) if number == str(pid)
            and used.isdigit()]  # fmt: skip
    return sum(mine) * _MIB if mine else None


def _ask(query: str) -> list[list[str]]:
    command = ("nvidia-smi", query, "--format=csv,noheader,nounits")
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in shown.stdout.splitlines()]
