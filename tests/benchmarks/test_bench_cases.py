"""Cases from files and flags, and everything that is refused before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from latentc.benchmarks.bench import cases, plan
from latentc.benchmarks.bench.cases import Case, Group, with_baselines
from latentc.benchmarks.bench.model import Settings
from latentc.benchmarks.bench.requested_plan import requested_plan
from latentc.cli import run as latentc
from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.errors import InputError
from tests.support.bench_reports import install_backend
from tests.support.fakes import make_bundle

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = Settings(
    prompt="a red circle", negative_prompt=None, guidance_scale=None, seed=0,
    scenarios=["end_to_end"], rounds=1, repeats=1, timeout=60.0, memory_limit=0,
)  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_backend(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return make_bundle(tmp_path / "bundle")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cases.toml"
    path.write_text(text)
    return path


def test_a_file_is_a_product_of_its_lists(tmp_path: Path) -> None:
    found = cases.read(
        write(
            tmp_path,
            """
            scenarios = ["denoiser_step", "end_to_end"]
            rounds = 7
            baseline = "torch"

            [[case]]
            build = ["onnx-fp32", "openvino-fp16"]
            batch = [1, 4, 16]
            size = ["64x32"]
            threads = [1, 2]
            options = { mode = "x", level = 3 }
            call = { cache_interval = 3, guidance_stop = 0.5 }
            low_memory = true
            no_cache = true

            [[case]]
            torch = "torch-compile"

            [[case]]
            peer = "optimum-onnx"
            settings = ["default", "best"]
            """,
        )
    )
    assert (found.rounds, found.repeats, found.baselines) == (7, None, ("torch",))
    made = [case for group in found.groups for case in group.cases()]
    assert len(made) == 2 * 3 * 2 + 1 + 2
    assert len({case.id for case in made}) == len(made)
    first = made[0]
    assert (first.variant, first.width, first.height, first.threads) == ("onnx-fp32", 64, 32, 1)
    assert first.options == {"mode": "x", "level": "3"}
    assert first.call == {"cache_interval": 3, "guidance_stop": 0.5}
    assert first.name.endswith("cache_interval 3, guidance_stop 0.5")
    assert first.low_memory
    assert "low memory, no cache" in first.name
    assert [case.settings for case in made if case.engine == "peer"] == ["default", "best"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[case]]\nbiuld = 'a'", r"\[\[case\]\] 1: unknown key 'biuld'; did you mean 'build'"),
        ("runds = 3", "unknown key 'runds'; did you mean 'rounds'"),
        ("[[case]]\nbuild = 3", "build must be a text"),
        ("[[case]]\nbuild = 'a'\nbatch = [0]", "batch must be positive"),
        ("[[case]]\nbuild = 'a'\nbatch = true", "batch must be a whole number"),
        ("[[case]]\nbuild = 'a'\npeer = 'b'", "give one of build, torch and peer"),
        ("[[case]]\nbuild = 'a'\nsize = '64'", "expected WIDTHxHEIGHT"),
        ("[[case]]\npeer = 'b'", "no peer 'b'; there are: optimum-onnx"),
        ("[[case]]\ntorch = 'jax'", "no torch 'jax'; there are: torch"),
        ("[[case]]\nbuild = 'a'\nstatic = 1", "static must be true or false"),
        ("[[case]]\nbuild = 'a'\ncall = {cache_interval = '3'}", "arguments that are numbers"),
        ("rounds = 0", "rounds must be a positive"),
        ("baseline = 'jax'", "no baseline 'jax'; there are: torch, .*, none"),
        ("[case]\nbuild = 'a'", r"cases are written as \[\[case\]\]"),
        ("[[case", "cases.toml"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cases.read(write(tmp_path, text))


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.toml")), ids=lambda path: path.stem)
def test_the_files_of_the_reports(path: Path) -> None:
    """Each can be read, and names the command that it is for."""
    found = cases.read(path)
    assert all(list(group.cases()) for group in found.groups)
    assert set(found.baselines or ()) <= {*cases.BASELINES, "none"}
    assert f"--cases benchmarks/{path.name}" in path.read_text("utf-8")


def test_the_documents_file_of_cases_is_one(tmp_path: Path) -> None:
    page = ROOT / "docs" / "benchmarking.md"
    (text,) = re.findall(r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    found = cases.read(write(tmp_path, text))
    assert len([case for group in found.groups for case in group.cases()]) == 14


def test_baselines_stand_at_every_point_once() -> None:
    asked = Group(builds=("a", "b"), batches=(1, 4)).cases()
    made, baseline_of = with_baselines(asked, ["torch", "torch-compile"])
    assert [c.variant for c in made] == [*["torch", "torch-compile"] * 2, "a", "b", "a", "b"]
    by_id = {case.id: case for case in made}
    for case in made:
        if case.variant == "torch":
            assert case.id not in baseline_of
        else:
            base = by_id[baseline_of[case.id]]
            assert (base.variant, base.point) == ("torch", case.point)


def test_a_gpu_is_compared_with_pytorch_on_it() -> None:
    made, baseline_of = with_baselines(
        [Case("latentc", "a", device="cuda"), Case("latentc", "b", device="GPU")], ["torch"]
    )
    bases = {case.id: case.device for case in made if case.engine == "torch"}
    assert [bases[base] for base in baseline_of.values()] == ["cuda", ""]


def make(bundle: Path, *groups: Group, baselines: tuple[str, ...] = (), **rest: Any) -> plan.Plan:
    return plan.make(bundle, groups, baselines, SETTINGS, **rest)


def test_the_default_is_every_build_that_runs_here(bundle: Path) -> None:
    (case,) = make(bundle).cases
    assert (case.variant, case.backend, case.height, case.steps) == ("fake-fp32", "moded", 16, 4)


def test_slow_engines_are_left_out_and_said_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "slow", True)
    with pytest.raises(InputError, match="fake-fp32 is left out: only moded loads it here"):
        make(bundle)
    (case,) = make(bundle, Group(backends=("moded",))).cases
    assert case.backend == "moded"


def test_from_keywords(bundle: Path, tmp_path: Path) -> None:
    """One value may stand for a list; what a file says holds where no argument does."""
    file = write(tmp_path, "rounds = 7\nbaseline = 'none'\nscenarios = 'load'")
    made = requested_plan(
        bundle, batches=[1, 2], sizes="16x8", call={"guidance_stop": 0.5}, cases=file, repeats=1
    )
    assert [(case.batch, case.width, case.height) for case in made.cases] == [
        (1, 16, 8),
        (2, 16, 8),
    ]
    assert {case.call["guidance_stop"] for case in made.cases} == {0.5}
    assert (made.settings.rounds, made.settings.repeats) == (7, 1)
    assert (made.settings.scenarios, made.settings.timeout) == (["load"], 1800)
    assert made.baseline_of == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 2}, "unknown argument 'batch'; did you mean 'batches'"),
        ({"batches": [1, 0]}, "'batches' must be at least 1, not 0"),
        ({"baselines": "jax"}, "'baselines' must be one of torch, "),
        ({"peers": ["other"]}, "'peers' must be one of optimum-onnx, "),
        ({"scenarios": "warm_start"}, "no scenario 'warm_start'"),
    ],
)
def test_bad_keywords_are_refused(bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        requested_plan(bundle, **{"baselines": "none", **arguments})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--build", "coreml-fp16"], 2, "no build 'coreml-fp16'; it has: fake-fp32"),
        (["--steps", "77"], 2, "no sampling plan for 77 steps; there are plans for 1"),
        (["--size", "17x16"], 2, "width 17 is not a multiple of 4"),
        (["--size", "big"], 2, "expected WIDTHxHEIGHT"),
        (["--scenario", "warm_start"], 2, "no scenario 'warm_start'; there are: cold_start"),
        (["--device", "npu"], 5, "no device 'npu'"),
        (["--peer", "other"], 2, "'peers' must be one of optimum-onnx"),
        (["--cases", "nowhere.toml"], 2, "nowhere.toml"),
    ],
)
@pytest.mark.usefixtures("no_exporter")
def test_bad_flags_are_refused(
    bundle: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "report"
    flags = ["--baseline", "none", *arguments, "-o", str(out)]
    assert latentc(["bench", str(bundle), *flags]) == code
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_peer_without_environment_names_the_command(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LATENTC_PEERS", str(tmp_path / "none"))
    flags = ["--baseline", "none", "--peer", "optimum-onnx", "-o", str(tmp_path / "out")]
    assert latentc(["bench", str(bundle), *flags]) == 5
    assert "python -m latentc.benchmarks.peers create optimum-onnx" in capsys.readouterr().err


def test_a_source_that_moved_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentc.exporter.cli import builtin_folder

    flags = ["--source", str(builtin_folder()), "-o", str(tmp_path / "out")]
    assert latentc(["bench", str(bundle), *flags]) == 3
    assert "baseline source moved" in capsys.readouterr().err
    assert latentc(["bench", str(bundle), "-o", str(tmp_path / "out")]) == 3
    assert "--source" in capsys.readouterr().err
    assert latentc(["bench", str(tmp_path / "nothing"), "-o", str(tmp_path / "out")]) == 4


def test_what_the_report_needs_is_asked_for_first(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "skimage" else real(name)
    )
    assert latentc(["bench", str(bundle), "-o", str(tmp_path / "out")]) == 1
    assert "pip install 'latentc[bench]'" in capsys.readouterr().err
