"""Runs a plan: every case in fresh processes, taking turns, and puts the report together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentc.benchmarks.bench import energy, fidelity, machine, peers, roofline, statistics
from latentc.benchmarks.bench.cases import Case
from latentc.benchmarks.bench.fidelity import Images
from latentc.benchmarks.bench.model import (
    BundleRecord,
    CaseRecord,
    Interval,
    Limit,
    MachineRecord,
    Operations,
    Peak,
    Report,
    Row,
    Score,
    Speedup,
    Status,
)
from latentc.benchmarks.bench.plan import Plan
from latentc.benchmarks.bench.worker import STARTED
from latentc.benchmarks.measure import Bounds, Child, ChildFailed, run_child
from latentc.benchmarks.measure import machine as this_machine
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.bundle.quantities import build_size
from latentc.runtimes.bundle.structures import Artifact, Build, Role
from latentc.runtimes.machine import cores
from latentc.runtimes.storage.files import temporary_folder
from latentc.runtimes.version import __version__

WARM_UP, ROUND = "warm-up", "round"
# Scenarios of one component, where it is not the denoiser.
_OTHER_ROLES: Mapping[str, Role] = {"text_encode": "encoder", "vae_decode": "decoder"}
# (target, precision) → what the graph itself is computed in, where that is not fp32.
_ARITHMETIC = {
    ("tensorrt", "int8"): "fp16",
    ("tensorrt", "fp16"): "fp16",
    ("tensorrt", "bf16"): "bf16",
    ("torch", "bf16"): "bf16",
}
_MESSAGE = 600  # characters of a failure that the report keeps
_VERDICTS = {"more": "faster", "less": "slower", "same": "no difference"}

# told before each process: what is done, and how many processes are done of how many
Progress = Callable[[str, int, int], None]


@dataclass
class Measured:
    """A `Measured` holds what is known about one case so far.

    `samples`: scenario → rounds → seconds.
    """

    case: Case
    status: Status = "ok"
    message: str = ""
    samples: dict[str, list[list[float]]] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    device_memory: list[int] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    right: int | None = None
    operations: dict[str, list[int]] | None = None
    images: Images | None = None


def run(
    plan: Plan, output: Path, command: Sequence[str], progress: Progress = lambda *_: None
) -> Report:
    """Measure all cases and return the report; images are written to `output`/images.

    A case that fails, hangs or takes too much memory keeps its place with its status; the others
    go on.
    """
    begun, before = time.perf_counter(), this_machine()
    # Compiled graphs of all cases: what a killed run left is removed by the next one.
    with temporary_folder() as folder:
        bench = _Bench(plan, folder, progress)
        peaks = [bench.peaks()]
        bench.warm_up()
        bench.rounds()
        peaks.append(bench.peaks())
        best = roofline.best(peaks)
        operations = _operations(bench.measured.values())
        records = [
            _record(bench, measurement, output / "images")
            for measurement in bench.measured.values()
        ]
        rows = _rows(bench.measured, plan, best, operations)
    after = this_machine()
    notes = [*plan.notes, *_notes(plan, bench, before.load)]
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        latentc=__version__,
        command=[*command],
        seconds=time.perf_counter() - begun,
        settings=plan.settings,
        bundle=_bundle_record(plan),
        machine=MachineRecord(
            **{k: v for k, v in asdict(before).items() if k != "load"},
            load_before=before.load,
            load_after=after.load,
            gpus=machine.gpus(),
            energy_counters=bool(energy.read().counters),
        ),
        peaks=best,
        operations=operations,
        cases=records,
        rows=rows,
        notes=notes,
    )


class _Bench:
    """One run under way: its processes and what they have said."""

    def __init__(self, plan: Plan, folder: Path, progress: Progress) -> None:
        self.plan = plan
        self.folder = folder
        self.measured = {case.id: Measured(case) for case in plan.cases}
        self._progress = progress
        self._done = 0
        self._points = list(dict.fromkeys((_peak_device(c), c.threads) for c in plan.cases))
        rounds = 1 + plan.settings.rounds
        self._total = rounds * len(plan.cases) + 2 * len(self._points)
        limits = plan.settings
        self._bounds = Bounds(limits.timeout or None, limits.memory_limit or None)

    def peaks(self) -> list[dict[str, Any]]:
        """Return this machine's peaks at every device and number of threads; nothing where it
        fails.
        """
        records: list[dict[str, Any]] = []
        for device, threads in self._points:
            self._tell(f"peaks of {device}")
            request = self._request("peaks", {"device": device, "threads": threads})
            try:
                child = run_child(["-m", "latentc.benchmarks.bench.roofline", request],
                                  bounds=self._bounds)  # fmt: skip
                records += child.result
            except ChildFailed:
                continue
        return records

    def warm_up(self) -> None:
        """Run every case once, not timed: images, score, operations; files come into the cache."""
        counted: set[tuple[int, ...]] = set()
        for measurement in self.measured.values():
            point = measurement.case.point[:3] + measurement.case.point[4:]
            count = (
                measurement.case.variant == "torch"
                and measurement.case.on_cpu
                and point not in counted
            )
            self._one(measurement, WARM_UP, count)
            if count and measurement.operations:
                counted.add(point)

    def rounds(self) -> None:
        """Run every case in every round, in alternating order: what disturbs one disturbs all."""
        order = list(self.measured.values())
        for index in range(self.plan.settings.rounds):
            for each in order if index % 2 == 0 else reversed(order):
                self._one(each, ROUND)

    def _one(self, each: Measured, mode: str, count: bool = False) -> None:
        self._tell(f"{mode}: {each.case.name}")
        if each.status != "ok":
            return
        try:
            if each.case.engine == "peer":
                self._ask_peer(each, mode)
            else:
                self._run_worker(each, mode, count)
        except ChildFailed as error:
            kinds: dict[str, Status] = {"timeout": "timeout", "out of memory": "out of memory"}
            each.status = kinds.get(error.kind, "failed")
            each.message = _shortened(str(error))

    def _run_worker(self, each: Measured, mode: str, count: bool) -> None:
        images = self.folder / "images.npz"
        images.unlink(missing_ok=True)
        request = self._request(
            "case",
            {
                "case": asdict(each.case),
                "mode": mode,
                "bundle": str(self.plan.bundle),
                "source": str(self.plan.source),
                "prompt": self.plan.settings.prompt,
                "negative_prompt": self.plan.settings.negative_prompt,
                "guidance_scale": self.plan.settings.guidance_scale,
                "seed": self.plan.settings.seed,
                "repeats": self._repeats(),
                "images": str(images),
                "score": self._score(each.case),
                "count": count,
            },
        )
        started = {STARTED: repr(time.perf_counter())}
        environment = {**started, **_threads(each.case), **self._caches()}
        child = run_child(["-m", "latentc.benchmarks.bench.worker", request], environment,
                          bounds=self._bounds)  # fmt: skip
        self._keep(each, mode, child)
        if mode == WARM_UP:
            each.images = Images.load(images)

    def _keep(self, each: Measured, mode: str, child: Child) -> None:
        found: dict[str, Any] = child.result
        each.about = {name: found[name] for name in ("version", "device", "computed_in")}
        if found.get("device_memory"):
            each.device_memory.append(found["device_memory"])
        if mode == WARM_UP:
            each.right = found.get("right")
            each.operations = found.get("operations")
            if found.get("compile"):
                each.samples["compile"] = [found["compile"]]
            return
        each.memory.append(child.peak_memory)
        if found.get("energy") is not None:
            each.energy.append(found["energy"])
        for scenario in self.plan.settings.scenarios:
            if scenario != "compile" and found.get(scenario):
                each.samples.setdefault(scenario, []).append(found[scenario])

    def _ask_peer(self, each: Measured, mode: str) -> None:
        case, settings = each.case, self.plan.settings
        work = self.folder / "peers" / case.variant
        work.mkdir(parents=True, exist_ok=True)
        request = {
            "model": str(self.plan.source),
            "work": str(work),
            "prompt": settings.prompt,
            "negative_prompt": settings.negative_prompt or "",
            "seed": settings.seed,
            "steps": case.steps,
            "height": case.height,
            "width": case.width,
            "batch": case.batch,
            "guidance_scale": self._guidance_scale(),
            "threads": case.threads,
            "settings": case.settings,
            "repeats": max(1, self._repeats()),
            "warmup": 1,
        }
        wanted = ["end_to_end"] if mode == WARM_UP else settings.scenarios
        answer = peers.ask(case, request, wanted, work, self._bounds)
        each.about = {"version": answer.version, "device": "cpu", "computed_in": None}
        if mode == WARM_UP:
            each.images = Images.of_file(answer.image) if answer.image else None
            return
        each.memory.append(answer.peak_memory)
        for scenario, values in answer.samples.items():
            each.samples.setdefault(scenario, []).append([float(value) for value in values])

    def _guidance_scale(self) -> float:
        """Return the scale that was asked for, else the bundle's default: peers have defaults of
        their own.
        """
        scale, guidance = self.plan.settings.guidance_scale, self.plan.manifest.guidance
        if scale is not None:
            return scale
        return guidance.defaults[guidance.scale] if guidance.scale else 1.0

    def _repeats(self) -> int:
        """Return the number of calls after the first: none where only the first image is asked
        about.
        """
        steady = set(self.plan.settings.scenarios) - {"cold_start", "load", "compile", "first_call"}
        return self.plan.settings.repeats if steady else 0

    def _score(self, case: Case) -> int:
        """Return how many images the judge sees: of each build and the baseline once, not at every
        point.
        """
        mine = [c for c in self.plan.cases if (c.engine, c.name) == (case.engine, case.name)]
        judged = case.engine == "latentc" or case.variant == "torch"
        square = case.height == case.width == 64 and not (case.static and case.batch > 1)
        return self.plan.score if judged and square and mine[0] == case else 0

    def _caches(self) -> dict[str, str]:
        """Return the caches' folders: nothing that earlier runs have compiled counts, the warm-up's
        does.
        """
        places = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "LATENTC_CACHE": "latentc"}
        return {name: str(self.folder / place) for name, place in places.items()}

    def _request(self, name: str, content: Mapping[str, Any]) -> str:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(content), "utf-8")
        return str(path)

    def _tell(self, what: str) -> None:
        self._progress(what, self._done, self._total)
        self._done += 1


def _threads(case: Case) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(case.threads)} if case.threads else {}


def _peak_device(case: Case) -> str:
    """Return the device whose peaks limit a case, by PyTorch's name."""
    name = case.device.lower()
    if name.startswith(("cuda", "tensorrt")):
        return "cuda"
    return "cpu"


def _record(bench: _Bench, each: Measured, folder: Path) -> CaseRecord:
    case, plan = each.case, bench.plan
    build = _build_of(case, plan)
    size = build_size(build) if build else None
    if case.engine == "torch" and plan.source is not None:
        size = sum(p.stat().st_size for p in plan.source.rglob("*.safetensors"))
    reference = _reference(bench, case)
    image, difference = _save_images(bench, each, reference, folder)
    found = (
        fidelity.compare(each.images, reference.images)
        if each.images and reference and reference.images and reference is not each
        else None
    )
    score = None
    if each.right is not None:
        score = Score(right=each.right, images=plan.score, steps=case.steps)
    return CaseRecord(
        id=case.id,
        label=_label(case, plan.cases),
        engine=case.engine,
        variant=case.variant,
        target=build.target if build else None,
        precision=build.precision if build else None,
        computed_in=_computed_in(each, plan),
        backend=case.backend or None,
        version=each.about.get("version"),
        device=each.about.get("device") or case.device or "cpu",
        batch=case.batch,
        height=case.height,
        width=case.width,
        threads=case.threads,
        steps=case.steps,
        baseline=plan.baseline_of.get(case.id),
        status=each.status,
        message=each.message,
        file_size=size,
        peak_memory=_middle(each.memory),
        device_memory=_middle(each.device_memory),
        energy=sum(each.energy) / len(each.energy) if each.energy else None,
        fidelity=found,
        score=score,
        image=image,
        difference=difference,
        samples=each.samples,
    )


def _reference(bench: _Bench, case: Case) -> Measured | None:
    """Return fp32 PyTorch at the same size, batch and steps, whatever its threads.

    It ran on the CPU, or where that was not measured, on what it did.
    """
    batch, height, width, _, steps = case.point
    references = [
        measurement
        for measurement in bench.measured.values()
        if (measurement.case.engine, measurement.case.variant) == ("torch", "torch")
        and (
            measurement.case.batch,
            measurement.case.height,
            measurement.case.width,
            measurement.case.steps,
        )
        == (batch, height, width, steps)
        and measurement.images
    ]
    return min(references, key=lambda each: not each.case.on_cpu, default=None)


def _save_images(
    bench: _Bench, each: Measured, reference: Measured | None, folder: Path
) -> tuple[str | None, str | None]:
    if each.images is None:
        return None, None
    folder.mkdir(parents=True, exist_ok=True)
    number = list(bench.measured).index(each.case.id)
    image = folder / f"{number:02}.png"
    fidelity.save_image(each.images.images, image)
    if reference is None or reference is each or reference.images is None:
        return f"images/{image.name}", None
    if reference.images.images.shape[1:] != each.images.images.shape[1:]:
        return f"images/{image.name}", None
    apart = folder / f"{number:02}-difference.png"
    fidelity.save_difference(each.images.images, reference.images.images, apart)
    return f"images/{image.name}", f"images/{apart.name}"


def _rows(
    measured: Mapping[str, Measured],
    plan: Plan,
    peaks: Sequence[Peak],
    operations: Sequence[Operations],
) -> list[Row]:
    rows = []
    for name, each in measured.items():
        baseline = measured.get(plan.baseline_of.get(name, ""))
        for scenario in plan.settings.scenarios:
            rounds = each.samples.get(scenario)
            if not rounds or each.status != "ok":
                continue
            found = statistics.summarise(rounds)
            other = baseline.samples.get(scenario) if baseline else None
            faster = None
            if baseline and other and baseline.status == "ok":
                faster = speedup(baseline.case.id, other, rounds)
            limit = _limit(each, plan, scenario, found.p50, peaks, operations)
            rows.append(
                Row(
                    case=name,
                    scenario=scenario,
                    count=found.count,
                    rounds=found.rounds,
                    p50=found.p50,
                    p90=found.p90,
                    p99=found.p99,
                    interval=Interval(low=found.low, high=found.high),
                    noise=found.noise,
                    speedup=faster,
                    limit=limit,
                )
            )
    return rows


def speedup(baseline: str, slower: statistics.Rounds, faster: statistics.Rounds) -> Speedup:
    """Return how many times faster `faster` is, with its interval and what may be said about it."""
    ratio = statistics.ratio(slower, faster)
    word = statistics.verdict(ratio, statistics.noise(slower), statistics.noise(faster))
    return Speedup(
        baseline=baseline,
        value=ratio.value,
        interval=Interval(low=ratio.low, high=ratio.high),
        verdict=_VERDICTS[word],  # type: ignore[arg-type]
    )


def _build_of(case: Case, plan: Plan) -> Build | None:
    """Return the build that a case of ours runs; None for others.

    A kind of PyTorch pipeline may be called as a build is.
    """
    builds = plan.manifest.builds if case.engine == "latentc" else ()
    return next((build for build in builds if build.name == case.variant), None)


def _computed_in(each: Measured, plan: Plan, role: Role = "denoiser") -> str | None:
    """Return a case's precision.

    The manifest says it for builds of ours (the first component of a role), else the case's
    process.
    """
    build = _build_of(each.case, plan)
    name = next((c.name for c in plan.manifest.components if c.role == role), None)
    if build is None or name is None:
        return each.about.get("computed_in")
    return computed_in(build.artifacts[name], build.target, each.case.compute)


def computed_in(artifact: Artifact, target: str, compute: str | None) -> str:
    """Return the precision that most of a component's arithmetic really has.

    Smaller weights alone change nothing, except where the engine goes by the types of the graph.
    """
    precision, _ = split_passes(artifact.precision)
    if precision == "w8a8":
        return "int8"
    if compute or artifact.compute:
        return compute or artifact.compute
    if target == "coreml":
        return "fp32" if precision == "fp32" else "fp16"
    return _ARITHMETIC.get((target, precision), "fp32")


def _limit(
    each: Measured,
    plan: Plan,
    scenario: str,
    seconds: float,
    peaks: Sequence[Peak],
    operations: Sequence[Operations],
) -> Limit | None:
    case = each.case
    key = scenario, case.batch, case.height, case.width, case.steps
    work = next(
        (o for o in operations if (o.component, o.batch, o.height, o.width, o.steps) == key), None
    )
    kind = _computed_in(each, plan, _OTHER_ROLES.get(scenario, "denoiser"))
    # With arguments of its own a call may do less than the model's operations.
    if work is None or kind is None or (case.call and scenario not in _OTHER_ROLES):
        return None
    return roofline.limit(work, seconds, peaks, _peak_device(case), case.threads, kind)


def _operations(measured: Iterable[Measured]) -> list[Operations]:
    found: dict[tuple[str, int, int, int, int], Operations] = {}
    for measurement in measured:
        case = measurement.case
        for stage, (count, weights, transfers) in (measurement.operations or {}).items():
            key = stage, case.batch, case.height, case.width, case.steps
            found[key] = Operations(
                component=stage, batch=case.batch, height=case.height, width=case.width,
                steps=case.steps, operations=count, weights=weights, transfers=transfers,
            )  # fmt: skip
    return list(found.values())


def _bundle_record(plan: Plan) -> BundleRecord:
    source = plan.manifest.source
    return BundleRecord(
        name=plan.bundle.resolve().name,
        source=source.id,
        fingerprint=source.fingerprint,
        pipeline_class=source.pipeline_class,
        builtin=plan.builtin,
        builds=[build.name for build in plan.manifest.builds],
    )


def _notes(plan: Plan, bench: _Bench, load: float) -> list[str]:
    count = cores()
    found = []
    if load > 0.5 * count:
        found.append(
            f"other programs were running (load average {load:.1f} on {count} cores before the "
            "start): times are worse than the machine's, and the noise larger"
        )
    if not energy.read().counters:
        found.append("energy was not measured: this system shows no counters that can be read")
    if plan.settings.rounds < 3:
        found.append("fewer than three rounds: noise between processes is hardly seen")
    if not plan.baseline_of:
        found.append("no baseline: nothing is compared, and images have no reference")
    if plan.score:
        found.append(
            f"the judge saw {plan.score} images of held-out prompts per build, at the steps of "
            "the measurement; at 25 steps the model does better"
        )
    return found


def _label(case: Case, cases: Sequence[Case]) -> str:
    """Return the case's name, with those parts of its point in which the cases differ."""
    parts = [case.name]
    if len({c.batch for c in cases}) > 1:
        parts.append(f"batch {case.batch}")
    if len({(c.width, c.height) for c in cases}) > 1:
        parts.append(f"{case.width}×{case.height}")
    if len({c.threads for c in cases}) > 1:
        parts.append(f"{case.threads} threads" if case.threads else "all threads")
    if len({c.steps for c in cases}) > 1:
        parts.append(f"{case.steps} steps")
    return ", ".join(parts)


def _middle(values: Sequence[int]) -> int | None:
    return sorted(values)[len(values) // 2] if values else None


def _shortened(text: str) -> str:
    """Return the end of a long message: Python's last line says what it was."""
    return text if len(text) <= _MESSAGE else "… " + text[-_MESSAGE:]
