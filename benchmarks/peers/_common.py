"""This module holds what the peers' scripts share: the two files, conversion, fresh processes,
staged weights.

It runs in the peers' environments and imports the standard library only, so that it adds nothing
to what is measured. A script is called in three ways:

- ``REQUEST RESULT``: converts if need be, measures in processes of their own, writes RESULT;
- ``--convert REQUEST FOLDER`` and ``--measure REQUEST FOLDER ANSWER``: those processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

SCENARIOS = ("cold_start", "end_to_end", "components")
SETTINGS = ("default", "best")
_ERROR_LINES = 8
_PREFIX = "text_model."


class PeerError(Exception):
    """A peer cannot do what is asked for, and why."""


# Annotations → types, where a number may be written without a fraction.
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
}


@dataclass(frozen=True)
class Request:
    """A request says what a peer is asked for.

    `model`: a diffusers folder. `work`: where conversions are kept. `threads`: 0 leaves the
    choice to the peer. `settings`: "default" is what its documentation starts with, "best" what
    it recommends for speed. `scenario`: "cold_start" measures `repeats` new processes from their
    start to the image on the disk, after `warmup` others; "end_to_end" and "components"
    measure `repeats` images in one process after `warmup` others. `scheduler`: a class of
    diffusers, None for the model's own.
    """

    model: str
    work: str
    prompt: str
    steps: int
    height: int
    width: int
    negative_prompt: str = ""
    seed: int = 0
    batch: int = 1
    guidance_scale: float = 7.5
    threads: int = 0
    settings: str = "default"
    scenario: str = "end_to_end"
    repeats: int = 1
    warmup: int = 0
    scheduler: str | None = None

    @classmethod
    def read(cls, path: Path) -> Request:
        """Read a request from a JSON file.

        Raises:
            PeerError: not a request.
        """
        try:
            request = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise PeerError(f"{path} is no request: {error}") from None
        for each in fields(cls):
            value, wanted = getattr(request, each.name), _TYPES[str(each.type)]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise PeerError(f"{path}: {each.name} must be {each.type}, not {value!r}")
        if request.scenario not in SCENARIOS or request.settings not in SETTINGS:
            raise PeerError(f"scenario must be one of {SCENARIOS}, settings one of {SETTINGS}")
        if not (Path(request.model) / "model_index.json").is_file():
            raise PeerError(f"{request.model} is not a diffusers folder")
        return request

    @property
    def best(self) -> bool:
        """Return whether the peer's best settings are asked for."""
        return self.settings == "best"


@dataclass
class Stages:
    """Seconds, by the stage's name; a stage may be measured more than once."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time inside."""
        begun = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Adds one time."""
        self.seconds.setdefault(name, []).append(seconds)

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Measure every call of a method of an object."""
        method = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.measure(stage):
                return method(*args, **kwargs)

        setattr(owner, name, measured)

    def clear(self, *kept: str) -> None:
        """Forget all but these."""
        self.seconds = {name: each for name, each in self.seconds.items() if name in kept}


class Peer:
    """One peer. Its packages are imported in its methods, which run in separate processes."""

    packages: Sequence[str] = ()  # whose versions are reported

    def check(self, request: Request) -> None:
        """Raise a `PeerError` for a model that this peer cannot run."""

    def convert(self, request: Request, folder: Path) -> None:
        """Write what `load` needs into an empty folder."""
        raise NotImplementedError

    def load(self, request: Request, folder: Path) -> Any:
        """Return what was converted, ready to make images."""
        raise NotImplementedError

    def draw(self, loaded: Any, request: Request, stages: Stages) -> list[Any]:
        """Return the images that it draws, as Pillow has them."""
        raise NotImplementedError

    def watch(self, loaded: Any, stages: Stages) -> None:
        """Measure the components' calls from now on, where this peer allows it."""

    def describe(self, request: Request, folder: Path) -> dict[str, Any]:
        """Return the settings that were used, for the report."""
        raise NotImplementedError


def main(peer: Peer, arguments: Sequence[str] | None = None) -> None:
    """Run a peer's script: convert a model, measure it, or answer a request with processes that do
    both.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--convert"]:
        request = Request.read(Path(words[1]))
        peer.convert(request, Path(words[2]))
    elif words[:1] == ["--measure"]:
        _measure(peer, Request.read(Path(words[1])), Path(words[2]), Path(words[3]))
    elif len(words) == 2:
        sys.exit(_serve(peer, Path(words[0]), Path(words[1])))
    else:
        sys.exit(f"usage: {Path(sys.argv[0]).name} REQUEST.json RESULT.json")


def scheduler_name(model: Path) -> str:
    """Return the class of a diffusers folder's scheduler."""
    return str(read_json(model / "scheduler" / "scheduler_config.json")["_class_name"])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file; Python's reader also takes the ``-Infinity`` that diffusers writes."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def finite(path: Path, **changed: Any) -> None:
    """Rewrite a configuration without infinite numbers, which are no JSON, and with changes."""
    kept = {
        name: value
        for name, value in read_json(path).items()
        if not (isinstance(value, float) and not math.isfinite(value))
    }
    path.write_text(json.dumps(kept | changed, indent=2) + "\n", encoding="utf-8")


def stage_model(request: Request, folder: Path, expected: Callable[[str, Path], set[str]]) -> Path:
    """Make the model with its text encoders' weights named as an older transformers wants them.

    transformers 5.23 and newer save CLIP text encoders without the prefix ``text_model.``. Older
    ones then draw random weights and only warn, and the images have nothing to do with the
    prompt. Everything else is linked.

    Args:
        expected: (part's class, its folder) → the names of the weights that it wants.

    Raises:
        PeerError: weights would be missing all the same.
    """
    source, staged = Path(request.model).resolve(), folder / "model"
    shutil.copytree(source, staged, copy_function=_link)
    index = read_json(source / "model_index.json")
    for name, value in index.items():
        weights = staged / name / "model.safetensors"
        if name.startswith("text_encoder") and isinstance(value, list) and weights.exists():
            rename(weights, expected(str(value[1]), source / name))
    config = staged / "scheduler" / "scheduler_config.json"
    if request.scheduler:
        changed = {**read_json(config), "_class_name": request.scheduler}
        config.unlink()
        config.write_text(json.dumps(changed), encoding="utf-8")
        index["scheduler"] = ["diffusers", request.scheduler]
        (staged / "model_index.json").unlink()
        (staged / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return staged


def rename(path: Path, expected: set[str]) -> None:
    """Give the tensors of a safetensors file the expected names, with or without the prefix."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
        names = {name: _expected_name(name, expected) for name in header}
        missing = expected - set(names.values())
        if missing:
            raise PeerError(f"{path.parent.name} lacks weights: {', '.join(sorted(missing)[:3])} …")
        if all(name == new for name, new in names.items()):
            return
        text = json.dumps({names[name]: value for name, value in header.items()}).encode()
        text += b" " * (-len(text) % 8)
        path.unlink()  # a link, or the file that is still open
        with path.open("xb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(file, out, 1 << 24)


def transformers_keys(class_name: str, folder: Path) -> set[str]:
    """Return the weights that this environment's transformers wants for a part."""
    import torch
    import transformers

    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        module = cls(cls.config_class.from_pretrained(str(folder)))
    # Buffers that are not saved are no weights.
    return {name for name, _ in module.named_parameters()}


def _expected_name(name: str, expected: set[str]) -> str:
    for candidate in (name, _PREFIX + name, name.removeprefix(_PREFIX)):
        if candidate in expected:
            return candidate
    return name


def _link(source: str, target: str) -> None:
    if source.endswith(".json"):
        shutil.copyfile(source, target)  # may be rewritten
    else:
        os.symlink(source, target)


def _serve(peer: Peer, asked: Path, result: Path) -> int:
    """Convert, measure, and write the result, or what went wrong."""
    answer: dict[str, Any] = {
        "ok": False,
        "error": None,
        "versions": {name: found for name in peer.packages if (found := _version(name))},
        "settings": {},
        "stages": {},
        "peak_memory_bytes": 0,
        "image": None,
    }
    try:
        request = Request.read(asked)
        peer.check(request)
        folder = _converted(peer, request, asked)
        answer["settings"] = {"settings": request.settings, **peer.describe(request, folder)}
        answer |= _measured(request, asked, folder, result)
        answer["ok"] = True
    except PeerError as error:
        answer["error"] = str(error)
    result.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")
    return 0 if answer["ok"] else 1


def _converted(peer: Peer, request: Request, asked: Path) -> Path:
    """Return the folder with the conversion, made by a process of its own if it is not there."""
    work = Path(request.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    folder = work / f"{Path(sys.argv[0]).stem}-{_key(peer, request)}"
    complete = Path(f"{folder}.complete")
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _child(["--convert", str(asked), str(folder)], "conversion")
        complete.touch()
    return folder


def _key(peer: Peer, request: Request) -> str:
    """Return a key of all that a conversion depends on: the model's files, versions, this code,
    scheduler.
    """
    model = Path(request.model)
    facts: list[Any] = [request.scheduler, [_version(name) for name in peer.packages]]
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        stat = path.stat()
        facts.append((path.relative_to(model).as_posix(), stat.st_size, stat.st_mtime_ns))
    code = [Path(sys.argv[0]).read_bytes(), Path(__file__).read_bytes()]
    return hashlib.sha256(repr(facts).encode() + b"".join(code)).hexdigest()[:16]


def _measured(request: Request, asked: Path, folder: Path, result: Path) -> dict[str, Any]:
    """Return what the measuring processes found, put together."""
    processes = request.warmup + request.repeats if request.scenario == "cold_start" else 1
    stages, peaks, answer = Stages(), [], {}
    for index in range(processes):
        file = result.with_suffix(f".{os.getpid()}.part")
        begun = time.perf_counter()
        try:
            _child(["--measure", str(asked), str(folder), str(file)], "run")
            seconds = time.perf_counter() - begun
            answer = read_json(file)
        finally:
            file.unlink(missing_ok=True)
        if request.scenario == "cold_start" and index < request.warmup:
            continue
        peaks.append(answer["peak_memory_bytes"])
        if request.scenario == "cold_start":
            stages.add("first_image", seconds)
        for name, values in answer["stages"].items():
            stages.seconds.setdefault(name, []).extend(values)
    image = Path(f"{result.with_suffix('')}.png")
    shutil.copyfile(answer["image"], image)
    os.unlink(answer["image"])
    return {"stages": stages.seconds, "peak_memory_bytes": max(peaks), "image": str(image)}


def _child(arguments: Sequence[str], what: str) -> None:
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = " | ".join(done.stdout.strip().splitlines()[-_ERROR_LINES:])
        raise PeerError(f"its {what} ended with code {done.returncode}: {said}")


def _measure(peer: Peer, request: Request, folder: Path, answer: Path) -> None:
    """Load, draw, and say how long it took, in a process of its own."""
    stages, image = Stages(), Path(f"{answer}.png")
    with stages.measure("load"):
        loaded = peer.load(request, folder)
    if request.scenario == "cold_start":
        peer.draw(loaded, request, Stages())[0].save(image)
    else:
        peer.watch(loaded, stages)
        for _ in range(request.warmup):
            peer.draw(loaded, request, stages)
        stages.clear("load")
        for _ in range(request.repeats):
            with stages.measure("end_to_end"):
                images = peer.draw(loaded, request, stages)
        images[0].save(image)
    measured = {
        "stages": stages.seconds,
        "peak_memory_bytes": peak_memory(),
        "image": str(image),
    }
    answer.write_text(json.dumps(measured), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # what a library does when it is unloaded is none of its work


def peak_memory() -> int:
    """Return the largest resident size that this process has had, in bytes; 0 if nobody knows."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
