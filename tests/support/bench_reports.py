"""Reports made by hand for the tests of `latentc.benchmarks.bench`, and a backend that
misbehaves."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from latentc.benchmarks.bench import statistics
from latentc.benchmarks.bench.model import (
    BundleRecord,
    CaseRecord,
    Fidelity,
    Gpu,
    Interval,
    Limit,
    MachineRecord,
    Operations,
    Peak,
    Report,
    Row,
    Score,
    Settings,
)
from latentc.benchmarks.bench.runner import speedup
from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.structures import Component
from tests.support.fakes import FakeBackend, FakeSession

SCENARIOS = ("cold_start", "load", "denoiser_step", "text_encode", "vae_decode", "end_to_end")
SECONDS = {
    **{"cold_start": 2.0, "load": 0.7, "denoiser_step": 0.05},
    **{"text_encode": 0.01, "vae_decode": 0.03, "end_to_end": 0.6},
}


class ModedBackend(FakeBackend):
    """The numpy backend of the tests; the option `mode` makes it crash, hang or take memory, the
    environment's BENCH_SLEEP (seconds) makes each call slower."""

    name: ClassVar[str] = "moded"

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        made = super()._open(entry, component, device, options)
        assert isinstance(made, FakeSession)
        return ModedSession(made, component, options.extra.get("mode", ""))


class ModedSession(Session):
    def __init__(self, inner: FakeSession, component: Component, mode: str) -> None:
        super().__init__(component.inputs, component.outputs)
        self._inner = inner
        self._mode = mode

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        if self._mode == "crash":
            raise RuntimeError("the engine exploded")
        if self._mode == "abort":
            os.abort()
        if self._mode == "hang":
            time.sleep(600)
        if self._mode == "memory":
            kept = [bytearray(b"x") * (64 << 20) for _ in range(40)]
            time.sleep(len(kept))
        time.sleep(float(os.environ.get("BENCH_SLEEP", "0")))
        return self._inner._run(feeds)


def install_backend(folder: Path) -> None:
    """Make `ModedBackend` known where `folder` is on the path, as an installed package would."""
    info = folder / "moded-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moded\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[latentc.backends]\nmoded = tests.support.bench_reports:ModedBackend\n"
    )


def series(
    seconds: float, rounds: int = 5, count: int = 6, noise: float = 0.02, seed: int = 0
) -> list[list[float]]:
    """Rounds of values about `seconds`; `noise` between rounds and within them."""
    draw = np.random.default_rng(seed)
    middles = seconds * (1 + noise * draw.standard_normal(rounds))
    return [[float(m * (1 + noise * x)) for x in draw.standard_normal(count)] for m in middles]


def make_report(
    speeds: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    machine_speed: float = 1.0,
    noise: float = 0.02,
    batches: Sequence[int] = (1,),
    failed: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    images: Path | None = None,
) -> Report:
    """A report; `speeds` are cases and how many times as fast as PyTorch they are."""
    speeds = {"onnx-fp32": 2.0, "openvino-fp16": 3.0} if speeds is None else speeds
    cases: list[CaseRecord] = []
    rows: list[Row] = []
    for batch in batches:
        baseline = _case("torch", "torch", batch, None, images, 1.0, machine_speed, noise, seed)
        made = [baseline]
        for number, (variant, speed) in enumerate(speeds.items(), 1):
            made.append(
                _case("latentc", variant, batch, baseline.id, images, speed, machine_speed,
                      noise, seed + 17 * number)
            )  # fmt: skip
        cases += made
        rows += [row for case in made for row in _rows(case, baseline)]
    for variant, status in (failed or {}).items():
        cases.append(
            CaseRecord(id=f"latentc/{variant}/b1", label=f"{variant} on engine", engine="latentc",
                       variant=variant, baseline=cases[0].id, status=status,  # type: ignore[arg-type]
                       message="Traceback …\n    BackendError: it <broke> & fell")
        )  # fmt: skip
    return Report(
        created="2030-01-02T03:04:05+00:00",
        latentc="9.9",
        command=["latentc", "bench", "shapes", "-o", "report"],
        seconds=100.5,
        settings=Settings(
            prompt="a <large> red circle", negative_prompt=None, guidance_scale=2.0, seed=3,
            scenarios=[*SCENARIOS], rounds=5, repeats=2, timeout=100.0, memory_limit=1 << 33,
        ),
        bundle=BundleRecord(
            name="shapes", source="shapes", fingerprint="f" * 64, builtin=True,
            pipeline_class="StableDiffusionPipeline", builds=[*speeds],
        ),
        machine=MachineRecord(
            cpu="A processor", cores=2, memory=1 << 34, system="Linux 1", python="3.11.7",
            load_before=0.5, load_after=1.5,
            versions=dict(versions or {"torch": "2.13.0", "onnxruntime": "1.31.1"}),
            gpus=[Gpu(name="A GPU", driver="1.2", memory=80 << 30)],
        ),
        peaks=[
            Peak(device="cpu", threads=0, name="fp32", unit="operations/s", value=5.5e10),
            Peak(device="cpu", threads=0, name="memory copy", unit="bytes/s", value=1.5e10),
        ],
        operations=[
            Operations(component="denoiser_step", batch=1, height=64, width=64, steps=10,
                       operations=1_320_000_000, weights=20_400_000, transfers=32_768),
        ],
        cases=cases,
        rows=rows,
        notes=["energy was not measured"],
    )  # fmt: skip


def _case(
    engine: Any, variant: str, batch: int, baseline: str | None, images: Path | None,
    speed: float, machine_speed: float, noise: float, seed: int,
) -> CaseRecord:  # fmt: skip
    samples = {
        name: series(seconds * batch / speed / machine_speed, noise=noise, seed=seed + place)
        for place, (name, seconds) in enumerate(SECONDS.items())
    }
    names: dict[str, str | None] = {"image": None, "difference": None}
    if images is not None:
        (images / "images").mkdir(exist_ok=True)
        for name in names:
            path = f"images/{variant}-{batch}-{name}.png"
            Image.new("RGB", (16, 16), "red").save(images / path)
            names[name] = path
    ours = engine == "latentc"
    label = f", batch {batch}" if batch > 1 else ""
    return CaseRecord(
        id=f"{engine}/{variant}/b{batch}",
        label=(f"{variant} on engine" if ours else "PyTorch eager") + label,
        engine=engine, variant=variant, target="onnx" if ours else None,
        precision="fp32", computed_in="fp32", backend="engine" if ours else None,
        version="engine 1.0", batch=batch, height=64, width=64, steps=10, baseline=baseline,
        file_size=24_600_000, peak_memory=123 << 20, device_memory=2 << 30, energy=12.5,
        fidelity=Fidelity(psnr=61.5, ssim=0.9991, latents_relative_l2=1.5e-6, max_difference=2)
        if ours else None,
        score=Score(right=9, images=10, steps=10), samples=samples, **names,
    )  # fmt: skip


def _rows(case: CaseRecord, baseline: CaseRecord) -> list[Row]:
    found = []
    for scenario, rounds in case.samples.items():
        s = statistics.summarise(rounds)
        faster = None
        if case is not baseline:
            faster = speedup(baseline.id, baseline.samples[scenario], rounds)
        limit = None
        if scenario == "denoiser_step":
            limit = Limit(seconds=0.02, fraction=0.02 / s.p50, bound="compute", peak="fp32")
        found.append(
            Row(case=case.id, scenario=scenario, count=s.count, rounds=s.rounds, p50=s.p50,
                p90=s.p90, p99=s.p99, interval=Interval(low=s.low, high=s.high), noise=s.noise,
                speedup=faster, limit=limit)
        )  # fmt: skip
    return found
