"""Peers: other programs that run the same pipelines, each in an environment of its own.

Their requirements exclude ours and each other's, so nothing here imports them. A peer is a
script next to this file, run by its environment's Python: ``<name>.py REQUEST.json RESULT.json``;
`_common.py` says what both files hold, ``<name>.txt`` what its environment is made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentc.runtimes.errors import BackendError, InputError
from latentc.runtimes.storage.files import temporary_folder
from latentc.runtimes.unknown_names import suggestion

HERE = Path(__file__).parent
HOME = "LATENTC_PEERS"  # environment variable: the folder that holds the environments
_DEFAULT_HOME = Path("build") / "peers"
_STAMP = "latentc-peer.json"
_ERROR_LINES = 15
# Ours would lead a peer to packages that are not its own.
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class Peer:
    """A peer holds what can be known about it without its environment.

    `unwanted`: packages that its requirements bring along and that are taken out again.
    """

    name: str
    about: str
    folder: Path = HERE
    unwanted: Sequence[str] = ()

    @property
    def script(self) -> Path:
        """Return the script that runs the peer."""
        return self.folder / f"{self.name}.py"

    @property
    def requirements(self) -> Path:
        """Return the file of requirements that the peer's environment is made of."""
        return self.folder / f"{self.name}.txt"

    @property
    def digest(self) -> str:
        """Return a digest of the peer's requirements: an environment that was made from others is
        out of date.
        """
        text = self.requirements.read_bytes() + repr([*self.unwanted]).encode()
        return hashlib.sha256(text).hexdigest()[:16]


# torchvision from the package index is built for CUDA; next to a CPU build of PyTorch its import
# fails, and transformers with it. None of the peers needs it to make an image from a text.
_VISION = ("torchvision",)
PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("optimum-onnx", "ONNX Runtime behind diffusers' pipelines"),
        Peer("optimum-intel", "OpenVINO behind diffusers' pipelines", unwanted=_VISION),
        Peer("openvino-genai", "OpenVINO's own pipelines in C++", unwanted=_VISION),
        Peer("stable-diffusion-cpp-python", "stable-diffusion.cpp: ggml, compiled on install"),
    )
}


def find(name: str) -> Peer:
    """Return the peer of this name.

    Raises:
        InputError: there is none; lists those that there are.
    """
    if name not in PEERS:
        raise InputError(f"no peer {name!r}; {suggestion(name, PEERS)}")
    return PEERS[name]


def home(into: Path | None = None) -> Path:
    """Return the environments' folder: `into`, else `LATENTC_PEERS`, else ``build/peers``."""
    return (into or Path(os.environ.get(HOME) or _DEFAULT_HOME)).absolute()


def python(peer: Peer, into: Path | None = None) -> Path:
    """Return the Python of a peer's environment.

    Raises:
        InputError: it is missing, unfinished or out of date; names the command that makes it.
    """
    folder = home(into) / peer.name
    command = f"python -m latentc.benchmarks.peers create {peer.name}"
    command += f" --into {into}" if into else ""
    state = read_stamp(folder)
    if state is None:
        what = "is unfinished" if folder.exists() else "is not there"
        raise InputError(f"the environment of {peer.name} ({folder}) {what}: {command}")
    if state.get("requirements") != peer.digest:
        raise InputError(
            f"the environment of {peer.name} ({folder}) was made from other requirements: {command}"
        )
    return _interpreter(folder)


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """Return what an environment says about itself: `requirements` and `packages`.

    None where there is none that can run.
    """
    try:
        stamp: dict[str, Any] = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if _interpreter(folder).exists() else None


def create(peer: Peer, into: Path | None = None) -> Path:
    """Make a peer's environment, or bring the one that is there up to date; returns its folder.

    What pip says goes to the standard error. An interrupted run is taken up by the next one.

    Raises:
        InputError: pip failed, for example because something has to be compiled and cannot be.
    """
    folder = home(into) / peer.name
    (folder / _STAMP).unlink(missing_ok=True)
    if not _interpreter(folder).exists():
        shutil.rmtree(folder, ignore_errors=True)
        _do([sys.executable, "-m", "venv", str(folder)])
    pip = [str(_interpreter(folder)), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    _do([*pip, "install", "--quiet", "--requirement", str(peer.requirements)])
    if peer.unwanted:
        _do([*pip, "uninstall", "--quiet", "--yes", *peer.unwanted])
    frozen = _do([*pip, "freeze"], capture=True).split()
    state = {"requirements": peer.digest, "packages": frozen}
    (folder / _STAMP).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    return folder


def run(
    peer: Peer,
    request: Mapping[str, Any],
    result: Path,
    *,
    into: Path | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run a peer and return what it has written to `result`.

    A peer that fails has ``ok`` false and its error there; `BackendError` is for one that leaves
    no result.

    Args:
        request: see `_common.Request`.
        result: a JSON file; the image is written beside it.
        timeout: seconds, conversion included; None waits.

    Raises:
        InputError: its environment is missing; names the command that makes it.
        BackendError: it wrote no result, or ran out of time.
    """
    interpreter = python(peer, into)
    result = result.absolute()
    result.unlink(missing_ok=True)
    with temporary_folder() as folder:
        asked = folder / "request.json"
        asked.write_text(json.dumps(dict(request)), encoding="utf-8")
        command = [str(interpreter), str(peer.script), str(asked), str(result)]
        said = _wait(command, timeout)
    try:
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lines = "\n".join(said.splitlines()[-_ERROR_LINES:])
        raise BackendError(f"{peer.name} wrote no result: {lines}") from None
    return answer


def environment() -> dict[str, str]:
    """Return environment variables for a peer: offline, without ours, and in English."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "LC_ALL": "C.UTF-8"}


def _wait(command: Sequence[str], timeout: float | None) -> str:
    """Return what a command says; it and its children are killed when the time is over."""
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            _kill(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BackendError(f"{command[1]}: not done after {timeout:g} s") from None
            raise
    return said


def _kill(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        import signal

        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _do(command: Sequence[str], *, capture: bool = False) -> str:
    done = subprocess.run(
        command,
        env=environment(),
        stdout=subprocess.PIPE if capture else sys.stderr,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InputError(f"{' '.join(command[1:4])} ended with code {done.returncode}")
    return done.stdout or ""
