"""This module makes cases to measure, from flags or from a TOML file, as a product of axes.

A file has settings at its top and one `[[case]]` per group; where a list stands, every value of it
makes a case:

    scenarios = ["denoiser_step", "end_to_end"]
    rounds = 5

    [[case]]
    build = ["onnx-fp32", "openvino-fp32"]
    batch = [1, 4]
    size = ["512x512"]        # width x height
    threads = [0, 2]          # 0: the engine's choice

    [[case]]
    peer = "optimum-onnx"
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from latentc.benchmarks.bench.model import SCENARIOS
from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.files import LARGEST_SETTINGS, read_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.unknown_names import suggestion

# Kinds of PyTorch pipelines, each with what a person calls it.
BASELINES = {
    "torch": "eager",
    "torch-channels-last": "channels last",
    "torch-compile": "compile",
    "torch-bf16": "bf16, channels last",
    "torch-compile-bf16": "compile, bf16",
}
NO_BASELINE = "none"
PEER_SETTINGS = ("default", "best")
PEERS = ("optimum-onnx", "optimum-intel", "openvino-genai", "stable-diffusion-cpp-python")
_TOP = {"scenarios", "rounds", "repeats", "baseline", "case"}
_LISTED = ("build", "torch", "peer", "backend", "device", "batch", "size", "threads", "steps",
           "compute", "settings")  # fmt: skip
_FLAGS = ("compile", "static", "low_memory", "no_cache")
_KNOWN = {*_LISTED, *_FLAGS, "options", "call"}
_TYPES: Mapping[str, type] = {"batch": int, "threads": int, "steps": int}
_MOST_DOTS = 256  # in a line, where each may be another level of a key
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Case:
    """One engine at one setting. `variant` is the build, the kind of PyTorch pipeline, or the peer.

    Sizes are in pixels, `threads` 0 is the engine's choice. `call` holds further arguments of
    the call, such as a `cache_interval`: its steps may differ, and a step is their mean.
    `no_cache`: graphs are compiled at each start, not read as an earlier one compiled them.
    """

    engine: Literal["latentc", "torch", "peer"]
    variant: str
    backend: str = ""
    device: str = ""
    batch: int = 1
    height: int = 0
    width: int = 0
    threads: int = 0
    steps: int = 0
    compute: str | None = None
    compile: bool = False
    static: bool = False
    low_memory: bool = False
    no_cache: bool = False
    settings: str = "default"
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    call: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def point(self) -> tuple[int, int, int, int, int]:
        """Return what two cases must have in common to be compared: batch, height, width, threads,
        steps.
        """
        return self.batch, self.height, self.width, self.threads, self.steps

    @property
    def on_cpu(self) -> bool:
        """Return whether it runs on the processor (no device named means an engine's first: the
        CPU).
        """
        return self.device.lower() in ("", "cpu")

    @property
    def id(self) -> str:
        """Return a unique id, stable between runs: reports are compared by it."""
        parts = [self.engine, self.variant, self.backend, self.device.lower()]
        parts += [self.compute or "", "compile" if self.compile else ""]
        parts += ["low-memory" if self.low_memory else "", "no-cache" if self.no_cache else ""]
        parts += ["static" if self.static else "", *(f"{k}={v}" for k, v in self.options.items())]
        parts += [f"{k}={v:g}" for k, v in self.call.items()]
        parts += [self.settings if self.settings != "default" else ""]
        parts += [f"b{self.batch}", f"{self.width}x{self.height}", f"t{self.threads}"]
        return "/".join([*filter(None, parts), f"s{self.steps}"])

    @property
    def name(self) -> str:
        """Return what a person calls the case, without the point."""
        if self.engine == "torch":
            text = f"PyTorch {BASELINES[self.variant]}"
        elif self.engine == "peer":
            text = self.variant + (", best settings" if self.settings == "best" else "")
        else:
            text = f"{self.variant} on {self.backend}"
        extra = [] if self.on_cpu else [self.device]
        extra += [f"compute {self.compute}"] if self.compute else []
        extra += ["compiled"] if self.compile and self.engine == "latentc" else []
        extra += ["static"] if self.static else []
        extra += ["low memory"] if self.low_memory else []
        extra += ["no cache"] if self.no_cache else []
        extra += [f"{key}={value}" for key, value in self.options.items()]
        extra += [f"{key} {value:g}" for key, value in self.call.items()]
        return ", ".join([text, *extra])


@dataclass(frozen=True)
class Group:
    """Cases as a product: every field a list, as in a `[[case]]` of a file."""

    builds: tuple[str, ...] = ()
    torches: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("",)
    devices: tuple[str, ...] = ("",)
    batches: tuple[int, ...] = (1,)
    sizes: tuple[tuple[int, int], ...] = ((0, 0),)  # width, height; 0: the bundle's
    threads: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (0,)
    computes: tuple[str | None, ...] = (None,)
    settings: tuple[str, ...] = ("default",)
    compile: bool = False
    static: bool = False
    low_memory: bool = False
    no_cache: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    call: Mapping[str, float] = field(default_factory=dict)

    def cases(self) -> list[Case]:
        """Return the product of the group's axes; builds still lack their backend where none is
        named.
        """
        points = list(
            itertools.product(self.batches, self.sizes, self.threads, self.steps, self.devices)
        )
        cases = []
        for batch, (width, height), threads, steps, device in points:
            common: dict[str, Any] = {"batch": batch, "width": width, "height": height}
            common |= {"threads": threads, "steps": steps, "device": device}
            for build, backend, compute in itertools.product(
                self.builds, self.backends, self.computes
            ):
                chosen = Case("latentc", build, backend, compute=compute, **common)
                cases.append(replace(chosen, compile=self.compile, static=self.static,
                                    low_memory=self.low_memory, no_cache=self.no_cache,
                                    options=dict(self.options), call=dict(self.call)))  # fmt: skip
            cases += [Case("torch", name, **common) for name in self.torches]
            cases += [
                Case("peer", name, settings=setting, **common)
                for name, setting in itertools.product(self.peers, self.settings)
            ]
        return cases


@dataclass(frozen=True)
class CaseFile:
    """A file of cases. What is None was not said there."""

    groups: tuple[Group, ...]
    scenarios: tuple[str, ...] | None = None
    rounds: int | None = None
    repeats: int | None = None
    baselines: tuple[str, ...] | None = None


@parser(InputError, "path", "a file of cases in TOML")
def read(path: Path) -> CaseFile:
    """Read a file of cases.

    Raises:
        InputError: not TOML, an unknown key (the message lists those that there are), or a value
            of another kind.
    """
    text = read_regular(path, LARGEST_SETTINGS).decode()
    # What tomllib takes for a key of n parts grows with n²: 200 kB would fill 20 GB of memory.
    if max((line.count(".") for line in text.splitlines()), default=0) > _MOST_DOTS:
        raise ValueError(f"a line has more than {_MOST_DOTS} dots")
    document = tomllib.loads(text)
    _refuse_unknown(f"{path}", document, _TOP)
    groups = document.get("case", [])
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise InputError(f"{path}: cases are written as [[case]]")
    return CaseFile(
        groups=tuple(_group(f"{path}, [[case]] {i}", each) for i, each in enumerate(groups, 1)),
        scenarios=_names(path, document, "scenarios"),
        rounds=_positive(path, document, "rounds"),
        repeats=_positive(path, document, "repeats"),
        baselines=_baselines(path, document),
    )


def check_scenarios(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repeats, in the usual order.

    Raises:
        InputError: an unknown one.
    """
    wanted = set(names)
    for name in sorted(wanted - SCENARIOS.keys()):
        raise InputError(f"no scenario {name!r}; {suggestion(name, SCENARIOS)}")
    return tuple(name for name in SCENARIOS if name in wanted)


@parser(InputError, "text", "a size")
def parse_size(text: str) -> tuple[int, int]:
    """Return width and height in pixels: ``"768x512"`` → (768, 512).

    Raises:
        InputError: another form.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match or not (int(match[1]) and int(match[2])):
        raise InputError(f"size {text!r}: expected WIDTHxHEIGHT, such as 768x512")
    return int(match[1]), int(match[2])


def with_baselines(
    cases: Sequence[Case], kinds: Sequence[str]
) -> tuple[list[Case], dict[str, str]]:
    """Add the PyTorch cases of `kinds` at every point, first; the first kind is the baseline.

    Returns:
        all cases, and the id of each one's baseline. A GPU case is compared with PyTorch on the
        CPU where the device's name is not PyTorch's (OpenVINO's GPU).
    """
    added: dict[str, Case] = {}
    baseline_of: dict[str, str] = {}
    for case in cases:
        for index, kind in enumerate(kinds):
            base = _torch_beside(case, kind)
            added.setdefault(base.id, base)
            if index == 0 and base.id != case.id:
                baseline_of[case.id] = base.id
    for case in added.values():
        first = _torch_beside(case, kinds[0])
        if first.id != case.id:
            baseline_of[case.id] = first.id
    rest = [case for case in cases if case.id not in added]
    return [*added.values(), *rest], baseline_of


def _torch_beside(case: Case, kind: str) -> Case:
    device = case.device if case.device.lower().startswith(("cuda", "mps", "xpu")) else ""
    batch, height, width, threads, steps = case.point
    return Case("torch", kind, device=device, batch=batch, height=height, width=width,
                threads=threads, steps=steps)  # fmt: skip


def _group(where: str, given: Mapping[str, Any]) -> Group:
    _refuse_unknown(where, given, _KNOWN)
    lists = {name: _listed(where, name, given[name]) for name in _LISTED if name in given}
    chosen = [name for name in ("build", "torch", "peer") if name in lists]
    if len(chosen) != 1:
        raise InputError(f"{where}: give one of build, torch and peer")
    for name, known in (("torch", BASELINES), ("peer", PEERS), ("settings", PEER_SETTINGS)):
        for value in lists.get(name, ()):
            if value not in known:
                raise InputError(f"{where}: no {name} {value!r}; {suggestion(str(value), known)}")
    for name in ("batch", "threads", "steps"):
        if any(value < (name != "threads") for value in lists.get(name, ())):
            raise InputError(f"{where}: {name} must be positive")
    for name in _FLAGS:
        if not isinstance(given.get(name, False), bool):
            raise InputError(f"{where}: {name} must be true or false")
    options, call = given.get("options", {}), given.get("call", {})
    if not isinstance(options, dict):
        raise InputError(f"{where}: options must be a table")
    if not isinstance(call, dict) or any(
        type(value) not in (int, float) for value in call.values()
    ):
        raise InputError(f"{where}: call must be a table of arguments that are numbers")
    return Group(
        builds=lists.get("build", ()),
        torches=lists.get("torch", ()),
        peers=lists.get("peer", ()),
        backends=lists.get("backend", ("",)),
        devices=lists.get("device", ("",)),
        batches=lists.get("batch", (1,)),
        sizes=tuple(parse_size(text) for text in lists["size"]) if "size" in lists else ((0, 0),),
        threads=lists.get("threads", (0,)),
        steps=lists.get("steps", (0,)),
        computes=lists.get("compute", (None,)),
        settings=lists.get("settings", ("default",)),
        compile=given.get("compile", False),
        static=given.get("static", False),
        low_memory=given.get("low_memory", False),
        no_cache=given.get("no_cache", False),
        options={key: str(value) for key, value in options.items()},
        call=call,
    )


def _refuse_unknown(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(given.keys() - known)
    if unknown:
        hint = suggestion(unknown[0], sorted(known), "known")
        raise InputError(f"{where}: unknown key {unknown[0]!r}; {hint}")


def _listed(where: str, name: str, value: Any) -> tuple[Any, ...]:
    kind = _TYPES.get(name, str)
    values = value if isinstance(value, list) else [value]
    if not values or any(type(each) is not kind for each in values):
        word = "a whole number" if kind is int else "a text"
        raise InputError(f"{where}: {name} must be {word}, or a list of them")
    return tuple(values)


def _names(path: Path, document: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    return _listed(str(path), name, document[name]) if name in document else None


def _baselines(path: Path, document: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = _names(path, document, "baseline")
    for name in names or ():
        if name not in (*BASELINES, NO_BASELINE):
            hint = suggestion(str(name), (*BASELINES, NO_BASELINE))
            raise InputError(f"{path}: no baseline {name!r}; {hint}")
    return names


def _positive(path: Path, document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"{path}: {name} must be a positive whole number")
    return value
