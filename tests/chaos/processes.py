"""Commands of latentc in forked children of a process that has imported everything already."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.chaos.operations import Place

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_PATIENCE = 300.0  # seconds for a run that is not killed
_POLL = 0.005


def import_everything() -> None:
    """Import what the commands need; no engine may have started a thread before a fork."""
    import onnxruntime
    import torch

    import latentc.benchmarks.bench.cli
    import latentc.cli
    import latentc.exporter.compiler.export
    import latentc.exporter.families.stable_diffusion

    torch.set_num_threads(1)
    assert all(
        (latentc.benchmarks.bench.cli, latentc.exporter.compiler.export, latentc.cli, onnxruntime)
    )
    latentc.exporter.families.stable_diffusion  # noqa: B018
    import diffusers

    for name in ("StableDiffusionPipeline", "DDIMScheduler", "EulerDiscreteScheduler"):
        getattr(diffusers, name)  # they are imported when they are first asked for


def start(place: Place, work: Callable[[], int], log: str) -> int:
    """Run `work` in a child and return its process id, which is that of its group as well."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(place.root / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ["LATENTC_CACHE"] = str(place.cache)
        os.environ["TMPDIR"] = str(place.temporary)
        import tempfile

        tempfile.tempdir = None
        code = work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def command(arguments: Sequence[str]) -> Callable[[], int]:
    """Return a function that runs latentc's command line and returns its exit code."""

    def work() -> int:
        from latentc import cli

        return cli.run(list(arguments))

    return work


def wait(child: int, seconds: float = _PATIENCE) -> int | None:
    """Return a child's exit code, minus the signal that ended it; None where it still runs."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(_POLL)


def kill(child: int, number: int) -> int:
    """Send a signal, as a terminal does where it is Ctrl-C, and return what the child ended with.

    Raises:
        AssertionError: it went on for half a minute, or left processes behind.
    """
    (os.killpg if number == signal.SIGINT else os.kill)(child, number)
    code = wait(child, 30.0)
    if code is None:
        end(child)
        raise AssertionError(f"goes on after {signal.Signals(number).name}")
    end_group(child)
    return code


def end(child: int) -> None:
    """End a child and its group."""
    end_group(child)
    os.waitpid(child, 0)


def end_group(child: int) -> None:
    """End what a child started and left behind."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def run(place: Place, arguments: Sequence[str], log: str = "run.txt") -> int:
    """Run a command to its end and return its exit code."""
    child = start(place, command(arguments), log)
    code = wait(child)
    if code is None:
        end(child)
        raise AssertionError(f"{' '.join(arguments)} takes more than {_PATIENCE:g} s")
    return code


def checked(place: Place, check: Callable[[Place], object]) -> None:
    """Run a check in a child, so that nothing that it reads stays in this process.

    Raises:
        AssertionError: it failed; says how.
    """
    path = Path(place.root / "check.txt")
    path.unlink(missing_ok=True)

    def work() -> int:
        check(place)
        return 0

    if wait(start(place, work, path.name)) != 0:
        lines = path.read_text(errors="replace").strip().splitlines() or ["it died"]
        raise AssertionError(lines[-1])


def chance(seed: int, *names: object) -> random.Random:
    """Return a source of chance for one trial."""
    return random.Random(f"{seed} {' '.join(map(str, names))}")
