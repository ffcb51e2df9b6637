"""Plans that follow the image's size: polynomials through traced ones, beside the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from latentc.exporter.components.description import Shifted
from latentc.exporter.schedulers.plans import add_to_bundle, plain_config
from latentc.exporter.schedulers.shifting import Told, line, told_by, trace_told
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import Shift, Source, TensorSpec
from latentc.runtimes.errors import BundleError, ExportError, InputError
from latentc.runtimes.pipeline.plans import Plans
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.sampling.plan import PlanTable, join
from latentc.runtimes.sampling.plan_archive import read_all_plans
from latentc.runtimes.sampling.sampler import denoise
from tests.support import fakes

FREE = TensorSpec("float32", ("batch", 16, "height", "width"))
LATENTS = Latents(16, 8, 2, 1024, 1024, maximum=256)  # few points, which take less time
_PATCHES = Shifted(2, 1.15)
FREE_LATENTS = Latents(16, 8, 2, 1024, 1024)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "exponential": {},
    "linear": {"time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.02},
    "karras": {"use_karras_sigmas": True},
}


def scheduler_of(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)


def told_of(scheduler: Any, latents: Latents = LATENTS, sample: TensorSpec = FREE) -> Told:
    shift = line(scheduler.config, _PATCHES)
    return told_by("FluxPipeline", shift, latents, sample, ())


def run(scheduler: Any, steps: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and the last sample of the scheduler itself; the model returns noise."""
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    random = np.random.default_rng(0)
    sample = torch.from_numpy(random.standard_normal((1, 4, 2, 2)))
    for timestep in scheduler.timesteps:
        output = torch.from_numpy(random.standard_normal((1, 4, 2, 2)))
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return scheduler.timesteps.numpy(), sample.numpy()


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("tokens", [1, 391, 1024, 16384])
def test_every_size_has_its_plan(kind: str, tokens: int) -> None:
    scheduler = scheduler_of(**SETTINGS[kind])
    table = _tables(kind)
    mu = calculate_shift(tokens)
    plan = table.plan(8, 0, min(max(mu, table.shifts[0]), table.shifts[-1]))
    timesteps, expected = run(scheduler, 8, mu)
    random = np.random.default_rng(0)
    first = random.standard_normal((1, 4, 2, 2))
    outputs = random.standard_normal((8, 1, 4, 2, 2))
    calls = iter(outputs)
    loop = denoise(plan, first, lambda *_: next(calls), lambda: first, dtype=np.float64)
    *_, last = (step.latents for step in loop)
    assert np.abs(plan.timesteps - timesteps).max() <= 1e-3  # of 1000
    assert np.abs(last - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.fault("3.8", "FLUX: images of more than 4.2 megapixels, as far as diffusers goes")
@pytest.mark.parametrize("steps", [4, 28])
def test_large_images(steps: int) -> None:
    """Up to 4096 by 4096 pixels; a little beyond diffusers' scheduler fails."""
    scheduler = scheduler_of()
    table = trace_told(scheduler, [steps], told_of(scheduler, FREE_LATENTS))
    assert len(table.shifts) <= 31
    for tokens in (64, 16_384, 36_864, 50_000, 65_536):
        mu = calculate_shift(tokens)
        plan = table.plan(steps, 0, min(mu, table.shifts[-1]))
        timesteps, _ = run(scheduler, steps, mu)
        assert table.shifts[0] < mu <= table.shifts[-1] + 1e-9
        assert np.abs(plan.timesteps - timesteps).max() <= 1e-3
        assert np.abs(plan.prediction[:, 0] - np.diff(scheduler.sigmas.double())).max() <= 1e-6
    with pytest.raises(IndexError):
        run(scheduler, 28, calculate_shift(81_920))


@pytest.mark.fault("3.8", "FLUX: a scheduler that fails at the largest images has plans for others")
def test_fewer_sizes_where_a_scheduler_fails() -> None:
    told = told_of(scheduler_of(), FREE_LATENTS)
    stretched = scheduler_of(**SETTINGS["terminal"])
    assert trace_told(stretched, [4], told).shifts[-1] == pytest.approx(calculate_shift(16_384))
    too_large = replace(told, ranges=((0.5, calculate_shift(81_920)), (0.5, 1.0)))
    for skip_refused in (False, True):
        found = trace_told(scheduler_of(), [4, 28], too_large, skip_refused)
        assert (found.step_counts, found.shifts[-1]) == ((4, 28), 1.0)


@pytest.mark.fault("3.8", "steps that need plans at other sizes are added to those that are there")
def test_added_steps_may_need_other_points(tmp_path: Path) -> None:
    config = plain_config(scheduler_of())
    name = "FlowMatchEulerDiscreteScheduler"
    folder = fakes.make_bundle(
        tmp_path / "bundle",
        source=Source("fake", "FluxPipeline", "0" * 64, name, config),
        latents=Latents(4, fakes.FACTOR, 2, 16, 16, maximum=256),
    )
    manifest = Manifest.load(folder)
    shifted = msgspec.structs.replace(manifest.schedules[0], shift=line(config, _PATCHES))
    manifest = msgspec.structs.replace(manifest, schedules=(shifted,))
    (folder / MANIFEST).write_bytes(manifest.encode())

    tables = []
    for steps in (1, 20, 2):
        added = add_to_bundle(folder, schedulers="flow_euler", steps=steps).schedule("flow_euler")
        tables.append(read_all_plans(folder / added.file.path, added))

    assert len(tables[0].shifts) < len(tables[1].shifts)
    assert tables[1].shifts == tables[2].shifts
    assert [table.step_counts for table in tables] == [(1,), (1, 20), (1, 2, 20)]
    mu = calculate_shift(391)
    for steps in (1, 2, 20):
        timesteps, _ = run(scheduler_of(), steps, mu)
        assert np.abs(tables[2].plan(steps, 0, mu).timesteps - timesteps).max() <= 1e-3


_KNOWN: dict[str, PlanTable] = {}


def _tables(kind: str) -> PlanTable:
    if kind not in _KNOWN:
        scheduler = scheduler_of(**SETTINGS[kind])
        _KNOWN[kind] = trace_told(scheduler, [8], told_of(scheduler))
    return _KNOWN[kind]


def test_the_line_is_that_of_the_pipelines() -> None:
    shift = line(scheduler_of().config, Shifted(2, 1.15))
    assert shift is not None
    for height, width in ((2, 2), (64, 48), (128, 128), (256, 256)):
        assert shift.of(height, width) == pytest.approx(calculate_shift(height * width // 4))
    assert line(FlowMatchEulerDiscreteScheduler(shift=3.0).config, Shifted(2, 1.15)) is None


def test_one_table_serves_few_sizes_and_many() -> None:
    scheduler = scheduler_of()
    fixed = told_of(scheduler, sample=TensorSpec("float32", (1, 16, 64, 48)))
    ((low, high),) = fixed.ranges
    assert low == high == pytest.approx(calculate_shift(64 * 48 // 4))
    table = trace_told(scheduler, [4], fixed)
    assert table.shifts == (low,)
    timesteps, _ = run(scheduler, 4, low)
    assert np.abs(table.plan(4, 0, low).timesteps - timesteps).max() <= 1e-3
    assert len(_tables("exponential").shifts) < 20


def test_steps_can_be_added(tmp_path: Path) -> None:
    scheduler = scheduler_of()
    told = told_of(scheduler)
    whole = trace_told(scheduler, [8, 9], told)
    merged = trace_told(scheduler, [9], told).merge(_tables("exponential"))
    assert merged.step_counts == whole.step_counts == (8, 9)
    assert np.allclose(merged.plan(9, 0, 1.0).prediction, whole.plan(9, 0, 1.0).prediction)
    whole.save(tmp_path / "table.json")
    read = PlanTable.load(tmp_path / "table.json")
    assert np.array_equal(read.plan(8, 2, 1.0).prediction, whole.plan(8, 2, 1.0).prediction)


def test_a_shift_is_needed_and_has_limits() -> None:
    table = _tables("exponential")
    for shift in (None, table.shifts[-1] + 0.1):
        with pytest.raises(InputError, match="depend on the image's size"):
            table.plan(8, 0, shift)


def test_what_cannot_be_told() -> None:
    scheduler = scheduler_of()
    with pytest.raises(ExportError, match="does not tell it"):
        trace_told(scheduler, [4], Told(even_sigmas=True))
    pair = UniPCMultistepScheduler(use_dynamic_shifting=False)
    assert trace_told(pair, [4], Told()).shifts == (0.0,)
    jagged = Told(True, Shift(0.0, 1.0), ((0.0, 100.0),))
    with pytest.raises(ExportError, match=r"no polynomial|refuses"):
        trace_told(scheduler, [4], jagged)


def _without_a_plan(table: PlanTable) -> dict[str, Any]:
    last = table.parts()[-1]
    kept = [part for part in table.parts() if part.shift[0] != last.shift[0]]
    return {"table": join([*kept, replace(last, steps=np.array([9], np.int32))])}


def test_tables_that_are_not_whole_are_refused() -> None:
    table = _tables("exponential")
    with pytest.raises(BundleError, match="steps: expected the same for all shifts"):
        _without_a_plan(table)
    with pytest.raises(BundleError, match="shift"):
        replace(table, shift=table.shift[::-1].copy())
    with pytest.raises(BundleError, match="shift: NaN"):
        replace(table, shift=np.full(len(table.shift), np.nan))


@pytest.mark.fault("3.8", "a shift that falls with the size: images that are too large are refused")
def test_a_line_that_falls_has_an_end() -> None:
    """Where a configuration's `max_shift` is below its `base_shift`."""
    shift = line({"use_dynamic_shifting": True, "base_shift": 1.15, "max_shift": 0.5}, _PATCHES)
    assert shift is not None
    assert shift.slope < 0
    table = trace_told(scheduler_of(), [1], told_of(scheduler_of(base_shift=1.15, max_shift=0.5)))
    schedule = SimpleNamespace(shift=shift)
    manifest = SimpleNamespace(schedule=lambda _: schedule, latents=LATENTS)
    bundle: Any = SimpleNamespace(manifest=manifest)
    assert Plans(bundle).shift("flow_euler", table, 256, 256) == table.shifts[0]
    with pytest.raises(InputError, match=r"up to 4\.2 megapixels"):
        Plans(bundle).shift("flow_euler", table, 256, 258)
