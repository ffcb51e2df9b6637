"""A process of its own for the readers: what hangs or dies does not take the tests along.

It takes one request a line on its standard input, JSON, and answers one a line on what was its
standard output. Its memory is bounded.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MORE_MEMORY = 4 << 30  # bytes of address space beyond what the imports take


@dataclass(frozen=True)
class Answer:
    """An answer says what a reader did.

    `kind` is "used", "refused", "crashed" (another exception, or the process died) or "hung"; of a
    refusal `error` is its class, or "command", and `code` the exit code; `seconds` is processor
    time.
    """

    kind: str
    said: str = ""
    error: str = ""
    code: int = 0
    seconds: float = 0.0


class Worker:
    """Runs readers one after the other; starts a new process after one that died or hung."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, reader: str, bundle: Path, scratch: Path, timeout: float) -> Answer:
        """Let a reader read a bundle; `timeout` in seconds."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"reader": reader, "bundle": str(bundle), "scratch": str(scratch)}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            self.close()
            return Answer("hung", f"no answer within {timeout:g} s")
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self._process = None
            return Answer("crashed", f"the process died with {code}")
        return Answer(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            environment = {
                **os.environ,
                "LATENTC_CACHE": str(self._cache),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.worker"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # it is ready
        return self._process


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print is no answer
    from tests.hostile.readers import READERS

    _import_everything()
    _bound_memory()
    readers = {reader.name: reader for reader in READERS}
    print("ready", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.process_time()
        answer = _answer(readers[request["reader"]], request)
        answer["seconds"] = round(time.process_time() - began, 4)
        print(json.dumps(answer), file=answers)


def _answer(reader: Any, request: dict[str, str]) -> dict[str, Any]:
    from tests.hostile.readers import refusal

    try:
        said = reader.read(Path(request["bundle"]), Path(request["scratch"]))
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            return {"kind": "crashed", "said": traceback.format_exc()}
        name, code = refused
        return {"kind": "refused", "said": str(error), "error": name, "code": code}
    return {"kind": "used", "said": said}


def _import_everything() -> None:
    """Import what the readers need, so that the time for it counts to no case."""
    import importlib

    for name in (
        "latentc.cli",
        "latentc.exporter.compiler.export",
        "onnxruntime",
        "openvino",
        "torch",
    ):
        try:
            importlib.import_module(name)
        except ImportError:
            continue


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
