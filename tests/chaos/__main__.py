"""Real runs that are killed, have a full disk, or write at once: ``python -m tests.chaos``
(`make chaos`).

Every fault keeps its folder under build/chaos. The figures go to a record (`--record`) that
docs/reliability.md is made from.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from tests import reliability
from tests.chaos import full_disk, processes, together
from tests.chaos.kills import Killed, trial, undisturbed
from tests.chaos.operations import OPERATIONS, Operation

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "chaos"
_ATTEMPTS = 4  # for each kill that is to hit: a command may be over before


def prepare(base: Path) -> tuple[Path, Path]:
    """Return a small verified bundle, and the pipeline that it was made from."""
    import torch

    from latentc.exporter.compiler.export import export
    from tests.support import tiny_configurations as tiny

    source, good = base / "source", base / "good"
    torch.manual_seed(3)
    tiny.stable_diffusion(source, tiny.SMALLEST)
    export(source, good, targets=("onnx",), schedulers=("ddim",), steps=(1, 2))
    return source, good


def kill_often(
    operation: Operation, count: int, seed: int, good: Path, source: Path, base: Path
) -> list[Killed]:
    """Kill a command until `count` kills have hit it while it ran."""
    seconds = undisturbed(operation, good, source, base)
    found: list[Killed] = []
    for number in range(count * _ATTEMPTS):
        found.append(trial(operation, seconds, good, source, base, number, seed))
        if sum(each.hit for each in found) >= count:
            break
    return found


def _worker(plan: dict[str, object]) -> None:
    """Kill some commands, in a process of its own; prints what came of it."""
    processes.import_everything()
    base = Path(str(plan["base"]))
    base.mkdir(parents=True, exist_ok=True)
    source, good = Path(str(plan["source"])), base / "good"
    shutil.copytree(str(plan["good"]), good)
    for name in plan["operations"]:  # type: ignore[attr-defined]
        operation = next(each for each in OPERATIONS if each.name == name)
        count, seed = int(str(plan["count"])), int(str(plan["seed"]))
        for killed in kill_often(operation, count, seed, good, source, base):
            print(json.dumps(asdict(killed)), flush=True)
            click.echo(f"{killed.operation}: {killed.signal} {killed.fault or 'held'}", err=True)


def _killed(names: Sequence[str], kills: int, jobs: int, seed: int, base: Path) -> list[Killed]:
    """Share the commands among processes and gather what they say."""
    count = -(-kills // len(names))
    children = []
    for job in range(jobs):
        plan = {
            "operations": list(names)[job::jobs],
            "count": count,
            "seed": seed,
            "base": str(base / f"job-{job}"),
            "source": str(base / "source"),
            "good": str(base / "good"),
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.chaos", "--plan", json.dumps(plan)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    lines = [line for each in children for line in each.communicate()[0].splitlines()]
    broken = [
        Killed("all", "", 0.0, False, f"a worker ended with {each.returncode}")
        for each in children
        if each.returncode
    ]
    return [*(Killed(**json.loads(line)) for line in lines), *broken]


@click.command()
@click.option("--kills", type=int, default=204, show_default=True, help="That hit, in all.")
@click.option("--jobs", type=int, default=2, show_default=True, help="Processes at a time.")
@click.option("--seed", type=int, help="Of the instants.  [default: another one each time]")
@click.option("--only", multiple=True, help="Commands whose names contain this; nothing else.")
@click.option("--rounds", type=int, default=10, show_default=True, help="Of exports at once.")
@click.option("--record", type=click.Path(path_type=Path), help="Where the figures go.")
@click.option("--plan", hidden=True)
def main(
    kills: int,
    jobs: int,
    seed: int | None,
    only: Sequence[str],
    rounds: int,
    record: Path | None,
    plan: str | None,
) -> None:
    """Kill commands that write, fill disks, and let several write at once."""
    if plan:
        _worker(json.loads(plan))
        return
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    click.echo(f"seed {seed}")
    began = time.monotonic()
    base = KEPT / f"{seed}"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    source, good = prepare(base)
    names = [
        each.name for each in OPERATIONS if not only or any(part in each.name for part in only)
    ]
    found = _killed(names, kills, min(jobs, len(names)), seed, base) if names else []
    beside, full, skipped = [], [], ""
    if not only or "together" in only:
        processes.import_everything()
        beside = [together.writers(n, rounds, good, source, base) for n in (2, 4)]
        beside.append(together.reader(rounds * 20, good, source, base))
    if not only or "disk" in only:
        if full_disk.is_allowed():
            full = full_disk.trials(good, source, base)
        else:
            skipped = "full disk: this user may not make private mounts"
            click.echo(f"skipped: {skipped}")
    faults = [f"{each.operation}, {each.signal} at {each.at:.2f} s: {each.fault}"
              for each in found if each.fault]  # fmt: skip
    faults += [fault for each in beside for fault in each.faults]
    faults += [f"full {f.folder} of {f.kibibytes} KiB, {f.operation}: {f.fault}: {f.said}"
               for f in full if f.fault]  # fmt: skip
    hits = Counter(each.operation for each in found if each.hit)
    signals = Counter(each.signal for each in found if each.hit)
    minutes = (time.monotonic() - began) / 60
    click.echo(f"{sum(hits.values())} kills in {minutes:.1f} minutes: {dict(hits)} {dict(signals)}")
    for each in beside:
        click.echo(f"{each.processes} × {each.what}: {each.went_through} through, "
                   f"{each.refused} refused, {len(each.faults)} faults")  # fmt: skip
    click.echo(f"{len(full)} full disks, {sum(each.code != 0 for each in full)} refused")
    for fault in faults:
        click.echo(f"fault: {fault}", err=True)
    reliability.save(
        "chaos",
        {
            "seed": seed,
            "minutes": round(minutes, 1),
            "kills": dict(hits),
            "signals": dict(signals),
            "together": [asdict(each) for each in beside],
            "full_disks": [{k: v for k, v in vars(f).items() if k != "said"} for f in full],
            "skipped": skipped,
            "faults": len(faults),
        },
        record,
    )
    if faults:
        sys.exit(1)
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
