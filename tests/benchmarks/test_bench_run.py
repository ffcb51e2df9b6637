"""`latentc bench` itself: real processes on a backend that misbehaves when it is told to."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from latentc.benchmarks.bench import compare, model, peers, plan, runner
from latentc.benchmarks.bench.pages import html
from latentc.benchmarks.measure import Bounds, ChildFailed, run_child
from latentc.cli import run as latentc
from latentc.runtimes.errors import PerformanceRegression
from tests.support.bench_reports import install_backend
from tests.support.fakes import make_bundle

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = ("cold_start", "load", "first_call", "denoiser_step", "text_encode", "vae_decode",
             "end_to_end")  # fmt: skip


@pytest.fixture
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the machine's peaks out: they take seconds and are tested once."""
    monkeypatch.setattr(runner._Bench, "peaks", lambda _: [])


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    install_backend(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    return make_bundle(tmp_path / "bundle")


def bench(bundle: Path, output: Path, *flags: str) -> model.Report:
    common = ["--baseline", "none", "--rounds", "2", "--repeats", "2", "-o", str(output)]
    assert latentc(["bench", str(bundle), *common, *flags]) == 0
    return model.read(output)


@pytest.mark.usefixtures("no_peaks")
def test_arguments_of_the_call(bundle: Path, tmp_path: Path) -> None:
    """Steps differ then: one value for all of them. What no call can have is refused."""
    report = bench(bundle, tmp_path / "a", "--call", "guidance_stop=0.5", "--steps", "4")
    (case,) = report.cases
    assert case.label.endswith("guidance_stop 0.5")
    assert [len(values) for values in case.samples["denoiser_step"]] == [2, 2]  # of its calls
    for call in ("cache_interval=3", "x"):
        assert latentc(["bench", str(bundle), "--call", call, "-o", str(tmp_path / "c")]) == 2
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("no_peaks")
def test_what_fails_hangs_or_eats_memory_is_a_row_and_the_rest_goes_on(
    bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cases.toml"
    modes = ("crash", "abort", "hang", "memory")
    text = "\n".join(
        f'[[case]]\nbuild = "fake-fp32"\noptions = {{ mode = "{mode}" }}' for mode in modes
    )
    file.write_text(f'{text}\n[[case]]\nbuild = "fake-fp32"\n')
    flags = ("--cases", str(file), "--timeout", "15", "--memory-limit", "0.7")
    report = bench(bundle, tmp_path / "report", *flags)
    found = {case.label.partition("mode=")[2]: case for case in report.cases}
    assert {name: case.status for name, case in found.items()} == {
        **{"crash": "failed", "abort": "failed", "hang": "timeout"},
        **{"memory": "out of memory", "": "ok"},
    }  # fmt: skip
    assert "the engine exploded" in found["crash"].message
    assert "still running after 15 s" in found["hang"].message
    assert "0.70 GiB" in found["memory"].message
    assert {row.scenario for row in report.rows} == set(SCENARIOS)
    assert {row.case for row in report.rows} == {found[""].id}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "still running after 15 s" in page


def test_one_measurement_from_end_to_end(bundle: Path, tmp_path: Path) -> None:
    report = bench(bundle, tmp_path / "report", "--batch", "1", "--batch", "2", "--threads", "1")
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    jsonschema.validate(document, model.schema())
    assert sorted(case.batch for case in report.cases) == [1, 2]
    for case in report.cases:
        assert case.status == "ok"
        assert case.version == "moded 1.0"
        assert case.peak_memory
        assert case.file_size
        assert (tmp_path / "report" / str(case.image)).is_file()
        for scenario in SCENARIOS:
            rounds = case.samples[scenario]
            assert len(rounds) == 2
            row = report.row(case.id, scenario)
            assert row is not None
            values = [value for each in rounds for value in each]
            assert row.count == len(values)
            assert min(values) <= row.interval.low <= row.p50 <= row.interval.high <= max(values)
        # two calls of four steps, less the first of each
        assert [len(each) for each in case.samples["denoiser_step"]] == [6, 6]
        assert case.samples["cold_start"][0][0] > case.samples["first_call"][0][0]
    assert {peak.name for peak in report.peaks} >= {"fp32", "memory copy"}
    assert report.command[:2] == ["latentc", "bench"]
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / "report" / name).stat().st_size > 500


@pytest.mark.usefixtures("no_peaks")
def test_a_build_made_slower_on_purpose_is_caught(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--scenario", "denoiser_step", "--scenario", "end_to_end")
    before = bench(bundle, tmp_path / "before", *flags)
    monkeypatch.setenv("BENCH_SLEEP", "0.1")
    after = bench(bundle, tmp_path / "after", *flags)
    found = compare.compare(before, after)
    assert {line.change for line in found.lines} == {"slower"}
    paths = [str(tmp_path / "before"), str(tmp_path / "after")]
    assert latentc(["bench", "compare", *paths]) == PerformanceRegression.exit_code
    assert latentc(["bench", "compare", *reversed(paths)]) == 0


def test_a_child_that_passes_its_bounds_is_ended_with_its_own_children() -> None:
    sleep = "import time; time.sleep(99)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    with pytest.raises(ChildFailed, match="still running after 1 s") as caught:
        run_child(["-c", code], bounds=Bounds(seconds=1))
    assert caught.value.kind == "timeout"
    with pytest.raises(ChildFailed) as caught:
        run_child(["-c", "raise MemoryError"])
    assert caught.value.kind == "out of memory"


PEER = """
import json, sys
from pathlib import Path
from latentc.benchmarks.peers._common import Request
Request.read(Path(sys.argv[1]))  # refuses what the real scripts refuse
request = json.loads(Path(sys.argv[1]).read_text())
if request["prompt"] == "fail":
    result = {"ok": False, "error": "cannot convert", "versions": {}, "settings": {}, "stages": {},
              "peak_memory_bytes": 0, "image": None}
else:
    stages = {"cold_start": {"load": [0.5], "first_image": [1.5]},
              "end_to_end": {"load": [9.0], "end_to_end": [0.4] * request["repeats"]},
              "components": {"denoiser_call": [0.1, 0.2], "vae_decode": [0.3]}}
    image = Path(request["work"]) / "a.png"
    from PIL import Image
    Image.new("RGB", (request["width"], request["height"])).save(image)
    result = {"ok": True, "error": None, "versions": {"other": "1.2"}, "settings": {},
              "stages": stages[request["scenario"]], "peak_memory_bytes": 1000,
              "image": str(image)}
Path(sys.argv[2]).write_text("{" if request["prompt"] == "garble" else json.dumps(result))
sys.exit(0 if result["ok"] else 1)
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> Path:
    """A peer with an environment: this Python."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "optimum_onnx.py").write_text(PEER)
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path / "scripts")
    python = tmp_path / "peers" / "optimum-onnx" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    for module in (peers, plan):
        monkeypatch.setattr(module, "python_of", lambda name: python)
    # The hand-made bundle has no source; a peer needs one.
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(plan, "_source", lambda *_, **__: (tmp_path, False))
    return bundle


@pytest.mark.usefixtures("no_peaks")
@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [("a circle", "ok", ""), ("fail", "failed", "cannot convert"),
     ("garble", "failed", "no result that can be read")],
)  # fmt: skip
def test_a_peer_is_a_case_like_others(
    peer: Path, tmp_path: Path, prompt: str, status: str, message: str
) -> None:
    report = bench(peer, tmp_path / "report", "--peer", "optimum-onnx", "--prompt", prompt)
    (case,) = (case for case in report.cases if case.engine == "peer")
    assert case.status == status
    assert message in case.message
    if status != "ok":
        assert report.rows
        return
    assert case.version == "other 1.2"
    assert case.peak_memory == 1000
    assert case.samples["cold_start"] == [[1.5], [1.5]]
    assert case.samples["load"] == [[0.5], [0.5]]
    assert case.samples["denoiser_step"] == [[0.1, 0.2]] * 2
    assert case.samples["end_to_end"] == [[0.4, 0.4]] * 2
    assert case.image


@pytest.mark.usefixtures("no_peaks")
def test_wandb_gets_the_report(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    logged: list[Any] = []
    module = types.ModuleType("latentc.wandb")
    module.log_report = lambda *arguments: logged.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "latentc.wandb", module)
    flags = ("--scenario", "load", "--wandb", "--wandb-project", "speed")
    report = bench(bundle, tmp_path / "report", *flags)
    ((document, folder, project),) = logged
    assert document["rows"][0]["p50"] == report.rows[0].p50
    assert (folder, project) == (tmp_path / "report", "speed")


@pytest.mark.combinations
def test_the_built_in_model_against_pytorch(
    builtin_bundle: Path, builtin_folder: Path, tmp_path: Path
) -> None:
    """The real thing, small: fidelity, score, limits and a baseline, and a page that agrees."""
    from tests.benchmarks_pages import Page, check_figures

    output, file = tmp_path / "report", tmp_path / "cases.toml"
    case = '[[case]]\nbuild = "onnx-fp32"\nsteps = 4\n'
    file.write_text(f"{case}{case}static = true\n")
    flags = ["--cases", str(file), "--short", "--rounds", "1", "--score", "2"]
    flags += ["--source", str(builtin_folder)]
    assert latentc(["bench", str(builtin_bundle), *flags, "-o", str(output)]) == 0
    report = model.read(output)
    torch, onnx, fixed = report.cases
    assert (torch.variant, onnx.variant) == ("torch", "onnx-fp32")
    assert onnx.baseline == torch.id
    assert onnx.fidelity is not None
    assert onnx.fidelity.psnr > 60
    assert onnx.fidelity.ssim > 0.999
    assert onnx.fidelity.latents_relative_l2 is not None
    assert onnx.fidelity.latents_relative_l2 < 1e-4
    assert onnx.score == fixed.score == torch.score
    assert onnx.computed_in == "fp32"
    row = report.row(onnx.id, "denoiser_step")
    assert row is not None
    assert row.speedup is not None
    assert row.limit is not None
    assert 0 < row.limit.fraction < 2
    assert {work.component for work in report.operations} == {
        "text_encode", "denoiser_step", "vae_decode", "end_to_end",
    }  # fmt: skip
    whole = {work.component: work.operations for work in report.operations}
    parts = whole["text_encode"] + 4 * whole["denoiser_step"] + whole["vae_decode"]
    assert whole["end_to_end"] == pytest.approx(parts, rel=1e-6)
    page = (output / "report.html").read_text()
    assert page == html.page(report, output)
    check_figures(report, Page(page))
