"""Long runs: ``python -m tests.soak`` (`make soak`).

Each backend that is installed makes images for long, in a process of its own: many calls of one
pipeline, many loads, many threads, child processes, streams that are abandoned and callbacks that
raise. Memory, file descriptors and threads must stay level, and every image must be the same, bit
by bit. The figures go to a record (`--record`) that docs/reliability.md is made from.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tests import reliability
from tests.soak import phases

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = {"onnxruntime": "onnx", "openvino": "openvino", "torch": "torch"}


def _prepare(base: Path) -> Path:
    """Return a small verified bundle with a build for each backend."""
    import torch

    from latentc.exporter.compiler.export import export
    from tests.support import tiny_configurations as tiny

    torch.manual_seed(3)
    tiny.stable_diffusion(base / "source", tiny.SMALLEST)
    bundle = base / "bundle"
    targets = tuple(BACKENDS.values())
    export(base / "source", bundle, targets=targets, schedulers=("ddim",), steps=(1, 2))
    return bundle


def _run(backend: str, bundle: Path, calls: int, loads: int, cache: Path) -> dict[str, Any]:
    """Run all phases with a backend in a process of its own and return what they give."""
    plan = {"backend": backend, "bundle": str(bundle), "calls": calls, "loads": loads}
    environment = {**os.environ, "LATENTC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--plan", json.dumps(plan)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        return {"backend": backend, "phases": [], "faults": [ended.stderr.strip()[-500:]]}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@click.command()
@click.option("--calls", type=int, default=1000, show_default=True, help="Of each backend.")
@click.option("--loads", type=int, default=100, show_default=True, help="Of each backend.")
@click.option("--backend", "backends", multiple=True, help="Only this one.  [default: all]")
@click.option("--record", type=click.Path(path_type=Path), help="Where the figures go.")
@click.option("--plan", hidden=True)
def main(
    calls: int, loads: int, backends: Sequence[str], record: Path | None, plan: str | None
) -> None:
    """Make images for long, and hold memory, descriptors, threads and images level."""
    if plan:
        print(json.dumps(phases.run(**json.loads(plan))))
        return
    base = Path(tempfile.mkdtemp(prefix="latentc-soak-"))
    began = time.monotonic()
    try:
        bundle = _prepare(base)
        chosen = [name for name in BACKENDS if not backends or name in backends]
        found = [_run(name, bundle, calls, loads, base / "cache") for name in chosen]
    finally:
        shutil.rmtree(base, ignore_errors=True)
    minutes = round((time.monotonic() - began) / 60, 1)
    for each in found:
        for phase in each["phases"]:
            click.echo(
                f"{each['backend']:<12} {phase['name']:<22} {phase['count']:>6} "
                f"{phase['slope']:>9.1f} B each  {phase['descriptors']:+d} descriptors  "
                f"{phase['threads']:+d} threads"
            )
        for fault in each["faults"]:
            click.echo(f"fault: {each['backend']}: {fault}", err=True)
    count = sum(len(each["faults"]) for each in found)
    click.echo(f"{minutes} minutes, {count} faults")
    reliability.save("soak", {"minutes": minutes, "faults": count, "backends": found}, record)
    if count:
        sys.exit(1)


if __name__ == "__main__":
    main()
