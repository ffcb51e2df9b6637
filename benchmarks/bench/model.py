"""The report of a benchmark: what is written as JSON, and read again to compare.

Every figure of the HTML page and of the Markdown stands here once, and they point to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.strict import readable

FORMAT = "latentc-bench"
FORMAT_VERSION = 1
REPORT = "report.json"

Status = Literal["ok", "failed", "timeout", "out of memory"]
Verdict = Literal["faster", "slower", "no difference"]
# scenario → what it is
SCENARIOS = {
    "cold_start": "new process to first image",
    "load": "load",
    "compile": "compile",
    "first_call": "first call",
    "denoiser_step": "denoiser step",
    "text_encode": "text encode",
    "vae_decode": "VAE decode",
    "end_to_end": "end to end",
}


class _Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shared settings: immutable, strict, compared by value."""


class Interval(_Base, frozen=True, kw_only=True):
    """95% bootstrap interval."""

    low: float
    high: float


class Speedup(_Base, frozen=True, kw_only=True):
    """A speedup says how many times faster a case is than the case `baseline`.

    `value` is the baseline's median over this one's.
    """

    baseline: str
    value: float
    interval: Interval
    verdict: Verdict


class Limit(_Base, frozen=True, kw_only=True):
    """A limit says what this machine could do at best: `seconds` at its measured peak (`peak` names
    it), and the share of that limit which was reached.
    """

    seconds: float
    fraction: float
    bound: Literal["compute", "memory"]
    peak: str


class Row(_Base, frozen=True, kw_only=True):
    """One scenario of one case. Seconds; `noise` is a share of p50."""

    case: str
    scenario: str
    count: int
    rounds: int
    p50: float
    p90: float
    p99: float
    interval: Interval
    noise: float
    speedup: Speedup | None = None
    limit: Limit | None = None


class Fidelity(_Base, frozen=True, kw_only=True):
    """Against fp32 PyTorch with the same seed: PSNR in dB (99 for equal images), SSIM, relative
    L2 of the final latents (None where the engine gives none), largest difference of 255."""

    psnr: float
    ssim: float
    latents_relative_l2: float | None
    max_difference: int


class Score(_Base, frozen=True, kw_only=True):
    """The judge of the built-in model: with how many images of held-out prompts it agrees."""

    right: int
    images: int = msgspec.field(name="pictures")  # as reports have called it from the first
    steps: int


class CaseRecord(_Base, frozen=True, kw_only=True):
    """One case and what was measured. Bytes, joules per image, seconds in `samples`
    (scenario → rounds → values). Images are files beside the report."""

    id: str
    label: str
    engine: Literal["latentc", "torch", "peer"]
    variant: str
    target: str | None = None
    precision: str | None = None
    computed_in: str | None = None
    backend: str | None = None
    version: str | None = None
    device: str = "cpu"
    batch: int = 1
    height: int = 0
    width: int = 0
    threads: int = 0
    steps: int = 0
    baseline: str | None = None
    status: Status = "ok"
    message: str = ""
    file_size: int | None = None
    peak_memory: int | None = None
    device_memory: int | None = None
    energy: float | None = None
    fidelity: Fidelity | None = None
    score: Score | None = None
    image: str | None = msgspec.field(default=None, name="picture")
    difference: str | None = None
    samples: dict[str, list[list[float]]] = {}


class Peak(_Base, frozen=True, kw_only=True):
    """A measured peak: operations per second of a matrix product, or bytes per second."""

    device: str
    threads: int
    name: str
    unit: Literal["operations/s", "bytes/s"]
    value: float


class Operations(_Base, frozen=True, kw_only=True):
    """An `Operations` counts what one call of a component takes at a shape: operations (a
    multiply-add is two), bytes of its fp32 weights, and of its inputs and outputs.

    `end_to_end` is an image of `steps` steps.
    """

    component: str
    batch: int
    height: int
    width: int
    steps: int
    operations: int
    weights: int
    transfers: int


class Gpu(_Base, frozen=True, kw_only=True):
    """A GPU as its driver describes it; memory in bytes."""

    name: str
    driver: str
    memory: int


class MachineRecord(_Base, frozen=True, kw_only=True):
    """Where it ran. `memory` in bytes; loads are load averages before and after."""

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    load_before: float
    load_after: float
    versions: dict[str, str]
    gpus: list[Gpu] = []
    energy_counters: bool = False


class BundleRecord(_Base, frozen=True, kw_only=True):
    """A `BundleRecord` says what was measured: the bundle and its source."""

    name: str
    source: str
    fingerprint: str
    pipeline_class: str
    builtin: bool
    builds: list[str]


class Settings(_Base, frozen=True, kw_only=True):
    """The settings say what every case was asked for, and how it was measured."""

    prompt: str | None
    negative_prompt: str | None
    guidance_scale: float | None
    seed: int
    scenarios: list[str]
    rounds: int
    repeats: int
    timeout: float
    memory_limit: int
    short: bool = False


class Report(_Base, frozen=True, kw_only=True, dict=True):
    """The whole document. (`dict`: what is looked up often is put in order once.)"""

    format: Literal["latentc-bench"] = "latentc-bench"
    format_version: int = FORMAT_VERSION
    created: str
    latentc: str
    command: list[str]
    seconds: float
    settings: Settings
    bundle: BundleRecord
    machine: MachineRecord
    peaks: list[Peak]
    operations: list[Operations]
    cases: list[CaseRecord]
    rows: list[Row]
    notes: list[str]

    def case(self, name: str) -> CaseRecord:
        """Return the case of an id."""
        return self._cases[name]

    def row(self, case: str, scenario: str) -> Row | None:
        """Return the row of a case and a scenario, if it was measured."""
        return next((row for row in self.rows_of(case) if row.scenario == scenario), None)

    def rows_of(self, case: str) -> Sequence[Row]:
        """Return the rows of a case, in their order."""
        return self._rows.get(case, ())

    @cached_property
    def baselines(self) -> frozenset[str]:
        """Return the ids of the cases that others are compared with."""
        return frozenset(case.baseline for case in self.cases if case.baseline)

    @cached_property
    def _cases(self) -> Mapping[str, CaseRecord]:
        return {case.id: case for case in self.cases}

    @cached_property
    def _rows(self) -> Mapping[str, Sequence[Row]]:
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            rows.setdefault(row.case, []).append(row)
        return rows


def encode(report: Report) -> bytes:
    """Return the report as JSON."""
    return readable(report, indent=1)


@parser(InputError, "path", "a report of latentc bench")
def read(path: Path) -> Report:
    """Read a report, or the one in a folder.

    Raises:
        InputError: missing, damaged, no report, or of another version.
    """
    path = path / REPORT if path.is_dir() else path
    data = read_regular(path, LARGEST_DOCUMENT)
    document = json.loads(data)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{path} is no report of latentc bench")
    if document.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has version {document.get('format_version')!r} of the format; "
            f"this latentc reads version {FORMAT_VERSION}"
        )
    report = msgspec.json.decode(data, type=Report)
    _check_references(path, report)
    return report


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the document."""
    of_report = msgspec.json.schema(Report)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **of_report}


def _check_references(path: Path, report: Report) -> None:
    known = {case.id for case in report.cases}
    used = {row.case for row in report.rows} | {c.baseline for c in report.cases if c.baseline}
    used |= {row.speedup.baseline for row in report.rows if row.speedup}
    if used - known:
        raise InputError(f"{path} is damaged: no case {', '.join(sorted(used - known))}")
    if len(known) != len(report.cases):
        raise InputError(f"{path} is damaged: two cases have the same id")
