"""Plans as JSON: read by a loop of another hand, they give the sampler's own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentc import cli
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.errors import InputError, PlanNotFound
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.sampling.plan_json import document, write_plans
from latentc.runtimes.sampling.sampler import denoise
from tests.support.fakes import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(make_bundle(tmp_path / "bundle"), hashing="never")


def model(sample: np.ndarray, timestep: float) -> np.ndarray:
    return np.sin(sample) + timestep / 1000


def from_json(plan: dict[str, Any], slots: int, start: np.ndarray, draws: Any) -> np.ndarray:
    """The recurrence as the Swift page has it."""
    state = np.zeros((slots, *start.shape))
    state[0] = plan["init_noise_scale"] * start
    for step in plan["evaluations"]:
        guided = model(step["input_scale"] * state[0], step["timestep"])
        noise = next(draws) if step["noise_draw"] else 0 * start
        state = np.stack(
            [
                step["prediction"][k] * guided
                + step["noise"][k] * noise
                + sum(step["state"][k][j] * state[j] for j in range(slots))
                for k in range(slots)
            ]
        )
    return np.asarray(state[0])


def test_the_same_samples(bundle: Bundle, tmp_path: Path) -> None:
    start = np.random.default_rng(0).standard_normal((1, 4, 3, 3))
    noise = np.random.default_rng(1).standard_normal((20, 1, 4, 3, 3))
    for path in write_plans(bundle, tmp_path / "plans"):
        read = json.loads(path.read_text("utf-8"))
        schedule = next(s for s in bundle.manifest.schedules if s.name == path.stem)
        table = PlanTable.load(bundle.path(schedule.file))
        assert [plan["steps"] for plan in read["plans"]] == list(schedule.steps)
        assert read["clip"]["kind"] == "none"
        for entry in read["plans"]:
            plan = table.plan(entry["steps"])
            draws = iter(noise)
            steps = denoise(
                plan,
                plan.initial_sample(start),
                lambda sample, timestep: model(sample, float(timestep[0])),
                lambda draws=draws: next(draws),
                dtype=np.float64,
            )
            for last in steps:
                expected = last.latents
            found = from_json(entry, read["slots"], start, iter(noise))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_some_of_them(bundle: Bundle, tmp_path: Path) -> None:
    first = bundle.manifest.schedules[0]
    (path,) = write_plans(bundle, tmp_path, schedulers=first.name, steps=2)
    assert [plan["steps"] for plan in json.loads(path.read_text())["plans"]] == [2]
    with pytest.raises(InputError, match="no scheduler 'coffee' in this bundle; it has: "):
        write_plans(bundle, tmp_path, schedulers=["coffee"])
    with pytest.raises(PlanNotFound, match=r"no plan for 77 steps; add one with: latentc schedule"):
        write_plans(bundle, tmp_path, schedulers=[first.name], steps=[77])


def test_kinds_of_clipping(bundle: Bundle) -> None:
    schedule = bundle.manifest.schedules[0]
    table = PlanTable.load(bundle.path(schedule.file))
    arrays = {name: getattr(table, name) for name in PlanTable.__dataclass_fields__}
    clipping = PlanTable(**(arrays | {"clip": np.array([2.0, 1.5, 0.9])}))
    clip = document(schedule, clipping)["clip"]
    assert clip == {"kind": "dynamic", "limit": 1.5, "ratio": 0.9}


def test_limits_of_a_variance(bundle: Bundle) -> None:
    schedule = next(each for each in bundle.manifest.schedules if each.name == "noisy")
    table = PlanTable.load(bundle.path(schedule.file))
    arrays = {name: getattr(table, name) for name in PlanTable.__dataclass_fields__}
    learned = np.where(table.noise_draws == 1, 0.5, np.nan)
    made = PlanTable(**(arrays | {"log_low": learned - 1, "log_high": learned}))
    first, *_, last = document(schedule, made, (4,))["plans"][0]["evaluations"]
    assert (first["log_low"], first["log_high"]) == (-0.5, 0.5)
    assert first.keys() - last.keys() == {"log_low", "log_high"}


def test_the_command(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plans", str(bundle.root), "-o", str(tmp_path / "plans"), "--steps", "2"]) == 0
    names = {schedule.name for schedule in bundle.manifest.schedules}
    assert {path.stem for path in (tmp_path / "plans").iterdir()} == names
    out = capsys.readouterr().out
    assert all(f"{name}.json" in out for name in names)
    assert cli.run(["plans", str(bundle.root), "-o", str(tmp_path), "--scheduler", "x"]) == 2
