"""The search of `latentc tune`, on builds whose speed and errors are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from PIL import Image

from latentc import cli
from latentc.runtimes import plugins
from latentc.runtimes.arrays import Array
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.session import Feeds
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import JudgeProbe
from latentc.runtimes.commands import report
from latentc.runtimes.errors import BackendError, DeviceUnavailable, InputError, PlanNotFound
from latentc.runtimes.options import complete
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from latentc.runtimes.pipeline.run import Timings
from latentc.runtimes.presets import setups
from latentc.runtimes.presets.preset import LIMITS
from latentc.runtimes.presets.setups import Setup
from latentc.runtimes.presets.trials import Budget, Fidelity, Trial, Tuning, cuts_more
from latentc.runtimes.sampling.step_cache import kinds
from latentc.runtimes.texts.encoded import Encoded
from latentc.runtimes.tuning import tune
from latentc.runtimes.tuning.step_times import Times, measure
from latentc.runtimes.tuning.tune import Search
from latentc.runtimes.tuning.tune_arguments import TuneArguments
from latentc.runtimes.verification import judges
from tests.support import fakes
from tests.support.fakes import FakeBackend, add_build, add_probes, make_bundle

# Seconds per row of a denoiser call, by precision: no clock is asked in these tests.
COSTS = {"fp32": 0.4, "int8": 0.2, "int4": 0.1, "w8a8": 0.05, "bf16": 3.0, "w8a8+merged": 0.2}


def graph(error: float) -> Callable[[Feeds], dict[str, Array]]:
    """A denoiser that is off by `error`, relatively."""

    def run(feeds: Feeds) -> dict[str, Array]:
        made = fakes.denoiser(feeds)["prediction"]
        return {"prediction": made * np.float32(1 + error)}

    return run


def foretold(
    pipe: Pipeline,
    call: Mapping[str, Any],
    patience: float | None,
    window: bool = False,
    caching: bool = False,
) -> Times | None:
    """Return what `step_times.measure` would find if the builds took what `COSTS` says."""
    next(pipe.stream(**call))  # what cannot run fails here
    cost = COSTS[pipe.build.precision]
    if patience and cost > patience:
        return None
    unguided = {(False, True): cost} if window else {}
    return Times(0.01, 0.02, {(True, True): 2 * cost, **unguided})


class Slow(FakeBackend):
    """For checking only."""

    name = "slow"
    slow = True


class Judge:
    """Finds as many of the images right as it is told to."""

    right = 25

    def __init__(self) -> None:
        self._asked = 0

    def prompts(self, count: int) -> Sequence[str]:
        return ["a"] * count

    def agrees(self, image: Image.Image, prompt: str) -> bool:
        self._asked += 1
        return self._asked <= self.right


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds_of = {"fake": FakeBackend, "slow": Slow}
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "BACKENDS", dict.fromkeys(kinds_of, "x:X"))
    real = engines.find
    monkeypatch.setattr(engines, "find", lambda name: kinds_of.get(name) or real(name))
    here = {judges.ENTRY_POINTS: {"judge": f"{__name__}:Judge"}}
    monkeypatch.setattr(plugins, "entry_points", lambda group: here.get(group, {}))
    made = {
        "exact": graph(0),
        "near": graph(1e-3),
        "far": graph(0.8),
        "wrong": graph(5),
    }
    monkeypatch.setattr(fakes, "GRAPHS", {**fakes.GRAPHS, **made})
    monkeypatch.setattr(tune, "measure", foretold)
    monkeypatch.setattr(tune, "thread_counts", lambda: [])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Builds of many kinds, and the probes of the exact one."""
    folder = make_bundle(tmp_path / "bundle", graphs={"denoiser": "exact"})
    add_probes(folder)
    for precision, denoiser in (("int8", "near"), ("int4", "far"), ("w8a8", "wrong")):
        add_build(folder, precision, denoiser)
    return folder


def judged(folder: Path, right: int) -> None:
    """Give the bundle a judge, who found so many of 25 images by PyTorch right."""
    manifest = Manifest.load(folder)
    assert manifest.probes is not None
    probe = JudgeProbe({}, "plain", 1, 7, 16, 8, "judge", ("a",) * 25, right)
    probes = msgspec.structs.replace(manifest.probes, judged=probe)
    (folder / MANIFEST).write_bytes(msgspec.structs.replace(manifest, probes=probes).encode())


def search(folder: Path, **how: Any) -> Tuning:
    return tune.tune(Bundle.open(folder), **how)


def test_the_plan(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    found = search(bundle, tell=lambda what, spent: told.append(what))
    plain = {trial.setup.build: trial for trial in found.trials if not trial.arguments}
    assert [*plain] == ["fake-w8a8", "fake-int4", "fake-int8", "fake-fp32"]  # by time
    assert found.reference.setup.build == "fake-fp32"
    assert all(trial.setup.backend == "fake" for trial in found.trials)  # the slow one is not asked
    assert (found.steps, found.prompts) == (4, ("a red circle",))
    wrong = plain["fake-w8a8"].fidelity
    assert wrong is not None
    assert wrong.image_psnr < LIMITS["fast"].image_psnr
    for name, trial in found.winners.items():
        assert trial.fidelity is not None
        assert LIMITS[name].allow(trial.fidelity.image_psnr, trial.fidelity.points)
        good = [
            each.seconds or 0
            for each in found.trials
            if each.fidelity and LIMITS[name].allow(each.fidelity.image_psnr, each.fidelity.points)
        ]
        assert (trial.seconds or 0) <= min(good) * tune.TIE
    seconds = [found.winners[name].seconds or 0 for name in LIMITS]
    assert seconds == sorted(seconds, reverse=True)
    assert found.winners["faithful"].setup.build == "fake-int8"
    assert found.winners["fast"].setup.build == "fake-int4"
    assert told[0].startswith("timing fake-fp32")
    report.print_tuning(found)
    out = capsys.readouterr().out
    assert "guidance_stop" in out
    assert "balanced" in out


def test_windows_need_open_sizes_and_save_what_they_say(bundle: Path) -> None:
    windowed = [trial for trial in search(bundle).trials if trial.arguments]
    assert windowed
    assert not any(trial.setup.static for trial in windowed)  # fewer rows in some steps
    for trial in windowed:
        first, end = (
            int(trial.arguments.get(name, usual) * 4)
            for name, usual in (("guidance_start", 0), ("guidance_stop", 1))
        )
        manifest = Manifest.load(bundle)
        precision = next(b.precision for b in manifest.builds if b.name == trial.setup.build)
        rows = 4 + (end - first)  # two of guided steps, one of the others
        assert trial.seconds == pytest.approx(0.03 + COSTS[precision] * rows)


def test_the_judge_has_a_say(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(bundle, 25)
    monkeypatch.setattr(Judge, "right", 24)  # of every build: four points of 100 less
    found = search(bundle)
    tried = [each.fidelity for each in found.trials if each.fidelity and each.fidelity.right]
    assert tried
    assert {(each.right, each.images, each.points) for each in tried} == {(24, 25, 4.0)}
    assert found.winners["faithful"] == found.reference  # nothing else to fall back on
    assert found.winners["balanced"] == found.reference
    assert found.winners["fast"].setup.build != "fake-fp32"


def test_judged_as_good_is_faithful(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(bundle, 24)
    monkeypatch.setattr(Judge, "right", 24)
    assert search(bundle).winners["faithful"].setup.build == "fake-int8"


def test_time_is_bounded(bundle: Path) -> None:
    """A clock that only the search turns: one second for each look at it."""
    ticks = iter(range(100_000))
    found = search(bundle, seconds=3, clock=lambda: float(next(ticks)))
    assert found.winners["fast"] == found.reference
    assert any("setups were not measured" in note for note in found.notes)
    assert {*found.record.presets} == {*LIMITS}


def test_a_setup_that_is_hopeless_is_given_up(bundle: Path) -> None:
    add_build(bundle, "bf16", "exact")
    trial = next(t for t in search(bundle).trials if t.setup.build == "fake-bf16")
    assert trial.seconds is None
    assert trial.note == "a step over 4 × the fastest"


def test_a_precision_that_nobody_knows(bundle: Path) -> None:
    add_build(bundle, "w8a8+merged", "near")
    assert any(t.setup.build == "fake-w8a8+merged" and t.seconds for t in search(bundle).trials)


@pytest.mark.parametrize("graph_name", ["broken", "nan_denoiser"])
def test_a_build_that_fails_is_told_of(bundle: Path, graph_name: str) -> None:
    add_build(bundle, "bf16", graph_name)
    found = search(bundle)
    trial = next(t for t in found.trials if t.setup.build == "fake-bf16")
    assert trial.fidelity is None
    assert "denoiser" in trial.note or "exploded" in trial.note
    assert found.winners["faithful"].setup.build == "fake-int8"


def test_no_build_runs(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "broken", graphs={"denoiser": "broken"})
    with pytest.raises(BackendError, match=r"no build runs here.*exploded"):
        search(folder, prompts=["a"])


def test_a_bundle_without_fp32(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    builds = tuple(each for each in manifest.builds if each.precision != "fp32")
    (bundle / MANIFEST).write_bytes(msgspec.structs.replace(manifest, builds=builds).encode())
    found = search(bundle)
    assert any("has no fp32 build" in note for note in found.notes)


def test_a_bundle_without_text_or_guidance(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "plain", text=False)
    found = search(folder)
    assert not any(trial.arguments for trial in found.trials)
    assert found.prompts == ()


def test_bad_input(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanNotFound, match=r"77 steps; there are: 1-2, 4"):
        search(bundle, steps=77)
    with pytest.raises(InputError, match="no backend named 'x'"):
        search(bundle, backend="x")
    with pytest.raises(DeviceUnavailable, match="no device 'gpu'"):
        search(bundle, device="gpu")
    with pytest.raises(InputError, match="give some with --prompt"):
        search(make_bundle(tmp_path / "silent"))


def test_other_ways_to_compute_are_tried(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "computes", ("fp32", "bf16", "auto"))
    listed = [setup for setup, _ in setups.setups(Bundle.open(bundle))]
    assert {(each.build, each.compute) for each in listed} == {
        (f"fake-{precision}", compute)
        for precision in ("fp32", "int8", "int4", "w8a8")
        for compute in (None, "auto")
    }


def test_threads_are_tried_once_per_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "thread_counts", lambda: [3])
    found = search(bundle)
    tried = {trial.setup.build for trial in found.trials if trial.setup.threads == 3}
    assert len(tried) == 1


@pytest.mark.parametrize(("seconds", "static"), [(1.02, False), (1.04, True)])
def test_any_size_wins_where_it_is_as_fast(bundle: Path, seconds: float, static: bool) -> None:
    made = Search(Bundle.open(bundle), Budget(60), complete(TuneArguments, {}))
    fixed = Setup("fake-int8", "fake", "cpu")
    made._add(Trial(fixed, {}, 1.0, Fidelity(50.0)))
    made._add(Trial(replace(fixed, static=False), {}, seconds, Fidelity(40.0)))
    made._add(Trial(replace(fixed, build="fake-int4"), {}, 0.5, Fidelity(29.0)))
    assert made._winner(LIMITS["faithful"]).setup == replace(fixed, static=static)
    assert made._winner(LIMITS["balanced"]).setup.build == "fake-int4"


def test_kinds_of_step() -> None:
    yes, no = True, False
    assert kinds([yes] * 3) == [(yes, yes)] * 3
    assert kinds([yes, yes, yes, yes], 3) == [(yes, yes), (yes, no), (yes, no), (yes, yes)]
    # Guidance ends in the middle of an interval: the features are of other rows.
    assert kinds([yes, yes, no, no], 3) == [(yes, yes), (yes, no), (no, yes), (no, no)]
    times = Times(1.0, 2.0, {(yes, yes): 10.0, (yes, no): 4.0})
    assert times.image(kinds([yes] * 4, 3)) == 1 + 2 + 10 + 4 + 4 + 10
    assert times.image(kinds([yes, no])) is None


class Stub:
    """A pipeline that takes made-up times for each kind of step."""

    TOOK: ClassVar = {(1, 1): 0.08, (1, 0): 0.04, (0, 1): 0.02, (0, 0): 0.01}

    def __init__(self) -> None:
        self.encoded = Encoded()

    def stream(self, **call: Any) -> Any:
        total = 40
        stop = int(call.get("guidance_stop", 1) * total)
        guided = [index < stop for index in range(total)]
        timings = Timings(tokenize=0.5, encode=0.25)

        class Stepping:
            num_timesteps = total

            def __iter__(self) -> Iterator[Any]:
                for index, kind in enumerate(kinds(guided, call.get("cache_interval", 1))):
                    warming = 1.0 if index == 0 else 0.0
                    timings.steps.append(Stub.TOOK[kind] + warming)
                    yield SimpleNamespace(index=index, latents=None)

            def close(self) -> None:
                pass

        made: Any = Stepping()
        made.timings, made.guided = timings, lambda: guided
        return made

    def decode(self, latents: Any) -> None:
        pass


def test_every_kind_of_step_is_measured() -> None:
    pipe: Any = Stub()
    every = {(bool(guided), bool(whole)): took for (guided, whole), took in Stub.TOOK.items()}
    for window in (False, True):
        for caching in (False, True):
            times = measure(pipe, {}, None, window, caching)
            assert times is not None
            assert times.encode == 0.75
            assert times.decode < 0.1
            wanted = {(g, w) for g in {True, not window} for w in {True, not caching}}
            assert times.steps == pytest.approx({kind: every[kind] for kind in wanted})
    assert measure(pipe, {}, 0.07) is None
    assert measure(pipe, {}, 0.09) is not None


def test_combinations_with_step_caching(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Search(Bundle.open(bundle), Budget(60), complete(TuneArguments, {}))
    monkeypatch.setattr(made, "_complete_kinds", lambda *_, **__: None)
    base = Setup("fake-int8", "fake", "cpu")
    found = list(made._combinations(base, ("guidance_stop", "cache_interval")))
    assert len(found) == len(tune.STARTS) * len(tune.STOPS) * len(tune.INTERVALS) - 1
    assert ({"cache_interval": 2}, True) in [(given, each.static) for each, given in found]
    assert all(each.static == (not {"guidance_start", "guidance_stop"} & {*a}) for each, a in found)
    assert not list(made._combinations(base, ()))
    assert cuts_more({"guidance_stop": 0.4, "cache_interval": 3}, {"guidance_stop": 0.6})
    assert not cuts_more({"guidance_stop": 0.4}, {"cache_interval": 2})


def test_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tune", str(bundle), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert {*found["winners"]} == {*found["limits"]} == {*LIMITS}
    assert found["num_inference_steps"] == 4
    assert "timing fake-fp32 on fake" in captured.err
    assert Path(found["record"]).is_file()
    with load(bundle, preset="faithful") as pipe:
        assert pipe.build.name == found["winners"]["faithful"]["setup"]["build"] == "fake-int8"
    assert cli.run(["tune", str(bundle), "--backend", "x"]) == 2


def test_the_command_with_a_cache_that_cannot_be_written(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(
        "latentc.runtimes.storage.outputs.check_folder", lambda *_: None
    )  # as it was before
    assert cli.run(["tune", str(bundle)]) == 0
    captured = capsys.readouterr()
    assert "warning: cannot keep what was found" in captured.err
    assert "faithful" in captured.out
    with pytest.warns(UserWarning, match="latentc tune"):
        load(bundle, preset="fast").close()
