"""One trial: a command is killed at some instant, and what it leaves is looked at."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import processes
from tests.chaos.operations import Operation, Place, leftovers


@dataclass(frozen=True)
class Killed:
    """A `Killed` says what one kill gave.

    `hit`: whether the command was still running; `fault`: what was wrong.
    """

    operation: str
    signal: str
    at: float
    hit: bool
    fault: str = ""


def undisturbed(operation: Operation, good: Path, source: Path, base: Path) -> float:
    """Run a command once without a kill; return the seconds that it takes.

    Raises:
        AssertionError: it fails, or leaves something behind.
    """
    place = _place(base, good, source)
    place.make(operation.had_bundle)
    began = time.monotonic()
    code = processes.run(place, operation.arguments(place))
    seconds = time.monotonic() - began
    said = (place.root / "run.txt").read_text(errors="replace")
    if code:
        raise AssertionError(f"{operation.name} fails by itself: {said[-800:]}")
    if left := leftovers(place):
        raise AssertionError(f"{operation.name} leaves {left} by itself")
    shutil.rmtree(place.root)
    return seconds


def trial(
    operation: Operation,
    seconds: float,
    good: Path,
    source: Path,
    base: Path,
    number: int,
    seed: int,
) -> Killed:
    """Kill a command that takes `seconds` at an instant by chance, and check what is there."""
    chance = processes.chance(seed, operation.name, number)
    one = processes.SIGNALS[number % len(processes.SIGNALS)]
    at = chance.uniform(0.0, seconds)
    place = _place(base, good, source)
    place.make(operation.had_bundle)
    name = signal.Signals(one).name
    child = processes.start(place, processes.command(operation.arguments(place)), "killed.txt")
    code = processes.wait(child, at)
    if code is not None:
        fault = "" if code == 0 else f"fails by itself with {code}"
        return _over(place, Killed(operation.name, name, at, False, fault))
    try:
        code = processes.kill(child, one)
        expected = {-one, 130} if one == signal.SIGINT else {-one}
        if code not in expected:
            hit = code != 0
            fault = f"ends with {code} after {name}" if hit else ""
            if fault:
                return _over(place, Killed(operation.name, name, at, hit, fault))
        _check(operation, place)
    except AssertionError as error:
        return _over(place, Killed(operation.name, name, at, True, str(error)[:500]))
    return _over(place, Killed(operation.name, name, at, code != 0))


def _check(operation: Operation, place: Place) -> None:
    """Raise AssertionError unless nothing is half-written, and the next run puts all right."""
    processes.checked(place, operation.check)
    code = processes.run(place, operation.arguments(place), "next.txt")
    if code:
        said = (place.root / "next.txt").read_text(errors="replace").strip()[-300:]
        raise AssertionError(f"the next run ends with {code}: {said}")
    processes.checked(place, operation.check)
    if left := leftovers(place):
        raise AssertionError(f"left behind after the next run: {left}")


def _place(base: Path, good: Path, source: Path) -> Place:
    return Place(Path(tempfile.mkdtemp(prefix="trial-", dir=base)), good, source)


def _over(place: Place, killed: Killed) -> Killed:
    """Remove a trial's folders, unless they are needed to understand a fault."""
    if not killed.fault:
        shutil.rmtree(place.root, ignore_errors=True)
        return killed
    return Killed(killed.operation, killed.signal, killed.at, killed.hit,
                  f"{killed.fault} (in {place.root})")  # fmt: skip
