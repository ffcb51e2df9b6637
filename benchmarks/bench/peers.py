"""Other programs that run diffusion models, each in an environment of its own.

A peer's script is run as ``<its python> benchmarks/peers/<name>.py REQUEST.json RESULT.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from latentc.benchmarks.bench.cases import Case
from latentc.benchmarks.measure import Bounds, ChildFailed, run_child
from latentc.runtimes.backends.session import first_line
from latentc.runtimes.errors import BackendError, BackendUnavailable, InputError, LatentcError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.folders import cache_folder
from latentc.runtimes.storage.parsing import parser

SCRIPTS = Path(__file__).resolve().parent.parent / "peers"
# a stage of a peer's result → our scenario
_STAGES = {
    "first_image": "cold_start",
    "load": "load",
    "end_to_end": "end_to_end",
    "denoiser_call": "denoiser_step",
    "text_encode": "text_encode",
    "vae_decode": "vae_decode",
}
# what a peer is asked → the scenarios that are taken from its answer
_ASKS: Mapping[str, tuple[str, ...]] = {
    "cold_start": ("cold_start",),
    "end_to_end": ("end_to_end",),
    "components": ("denoiser_step", "text_encode", "vae_decode"),
}
_LOAD = "load"  # every answer has it


@dataclass(frozen=True)
class Answer:
    """An answer holds what a peer measured: seconds by scenario, peak bytes, image, version."""

    samples: dict[str, list[float]]
    peak_memory: int
    image: Path | None
    version: str


def python_of(name: str) -> Path:
    """Return the interpreter of a peer's environment.

    Raises:
        BackendUnavailable: there is none; names the command that makes it.
    """
    create = f"python -m latentc.benchmarks.peers create {name}"
    try:
        # The module that makes environments knows where they are.
        interpreter = Path(import_module("latentc.benchmarks.peers").python_of(name))
    except (ImportError, AttributeError):
        base = os.environ.get("LATENTC_PEERS") or cache_folder() / "peers"
        interpreter = Path(base) / name / "bin" / "python"
    if not interpreter.exists():
        raise BackendUnavailable(name, create, "it has no environment here")
    return interpreter


def script_of(name: str) -> Path:
    """Return the script that runs a peer.

    Raises:
        InputError: there is none.
    """
    for path in (SCRIPTS / f"{name}.py", SCRIPTS / f"{name.replace('-', '_')}.py"):
        if path.is_file():
            return path
    raise InputError(f"no script runs the peer {name!r}: {SCRIPTS / name}.py is missing")


def ask(
    case: Case,
    request: Mapping[str, Any],
    scenarios: Sequence[str],
    folder: Path,
    bounds: Bounds,
) -> Answer:
    """Run a peer once for each kind of scenario that is wanted.

    Raises:
        ChildFailed: it failed, by its own word or by its exit code, or passed its bounds.
    """
    samples: dict[str, list[float]] = {}
    answers = []
    asked = {what: {*found} & {*scenarios} for what, found in _ASKS.items()}
    if _LOAD in scenarios and not any(asked.values()):
        asked["components"] = {_LOAD}
    for what, wanted in asked.items():
        if wanted:
            answer = _run(case, {**request, "scenario": what}, folder, bounds)
            answers.append(answer)
            stages = {_STAGES.get(name, name): values for name, values in answer["stages"].items()}
            found = wanted | ({_LOAD} & {*scenarios})
            samples |= {name: stages[name] for name in found - samples.keys() if stages.get(name)}
    images = [answer["image"] for answer in answers if answer.get("image")]
    versions: dict[str, str] = answers[-1]["versions"] if answers else {}
    return Answer(
        samples,
        max((int(each.get("peak_memory_bytes") or 0) for each in answers), default=0),
        Path(images[-1]) if images else None,
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _said(answered: Path) -> str:
    """Return what a peer that failed wrote about it; "" if it did not come to that."""
    try:
        return str(_answer(answered)["error"] or "")
    except (LatentcError, KeyError):
        return ""


@parser(BackendError, "path", "a result that can be read")
def _answer(path: Path) -> dict[str, Any]:
    """Return what a peer wrote."""
    answer = json.loads(read_regular(path, LARGEST_DOCUMENT))
    if not isinstance(answer, dict):
        raise TypeError("a result is an object")
    return answer


def _run(case: Case, request: Mapping[str, Any], folder: Path, bounds: Bounds) -> dict[str, Any]:
    asked, answered = folder / "request.json", folder / "result.json"
    answered.unlink(missing_ok=True)
    asked.write_text(json.dumps(request), "utf-8")
    arguments = [str(script_of(case.variant)), str(asked), str(answered)]
    try:
        run_child(arguments, python=str(python_of(case.variant)), bounds=bounds)
    except ChildFailed as error:
        said = _said(answered)
        raise ChildFailed(said, error.kind) if said else error from None
    try:
        answer = _answer(answered)
        if not answer["ok"]:
            raise ChildFailed(str(answer["error"]))
        if not isinstance(answer["stages"], dict) or not isinstance(answer["versions"], dict):
            raise TypeError("stages and versions must be objects")
    except (LatentcError, KeyError, TypeError) as error:
        message = f"{case.variant} gave no result that can be read: {first_line(error)}"
        raise ChildFailed(message) from error
    return answer
