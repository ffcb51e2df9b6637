"""Weights & Biases in offline mode: what was logged, read back from the run's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import latentc
from latentc.runtimes.pipeline import observe
from latentc.wandb import COLUMNS, Autolog, chain
from tests.docs.markdown import ROOT, blocks
from tests.support.wandb_file import Read, read, records

wandb = pytest.importorskip("wandb", reason="needs pip install 'latentc[wandb]'")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No network, nothing outside of one folder; wandb asks its environment only once."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        wandb.teardown()
        yield folder
        wandb.teardown()


@pytest.fixture(autouse=True)
def runs(offline: Path) -> Iterator[Callable[[], list[Path]]]:
    """A function: the files of the runs that this test has made."""
    before = {*offline.rglob("*.wandb")}
    yield lambda: [path for path in offline.rglob("*.wandb") if path not in before]
    latentc.wandb.autolog.disable()
    if wandb.run is not None:
        wandb.finish()


@pytest.fixture
def the_run(runs: Callable[[], list[Path]]) -> Callable[[], Read]:
    """A function: the only run of this test, read back."""

    def one() -> Read:
        (path,) = runs()
        return read(path)

    return one


@pytest.fixture(scope="module")
def pipe(sd_bundle: Path) -> Iterator[latentc.Pipeline]:
    with latentc.load(sd_bundle, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture
def log(the_run: Callable[[], Read]) -> Callable[..., Read]:
    """A function: what to do while logging → the run, read back."""

    def record(work: Callable[[], Any], **arguments: Any) -> Read:
        with latentc.wandb.autolog(init={"project": "tests"}, **arguments):
            work()
        return the_run()

    return record


def pixels(run: Read, row: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(run.artifact_file(row["Generated-Image"]["path"])))


def test_a_row_per_image(pipe: latentc.Pipeline, log: Callable[..., Read]) -> None:
    made: list[latentc.Result] = []

    def work() -> None:
        made.append(
            pipe(
                ["a red circle", "a blue square"],
                negative_prompt=["fog", "rain"],
                num_images_per_prompt=2,
                num_inference_steps=2,
                guidance_scale=3.0,
                scheduler="euler",
                seed=[1, 2, 3, 4],
            )
        )
        made.append(pipe("a star", num_inference_steps=1, seed=7, output_type="np"))

    run = log(work)
    assert run.ended
    rows = run.table("Result-Table")
    assert [row["Prompt"] for row in rows] == [
        *["a red circle"] * 2, *["a blue square"] * 2, "a star",
    ]  # fmt: skip
    assert [row["Negative-Prompt"] for row in rows] == ["fog", "fog", "rain", "rain", ""]
    assert [row["Seed"] for row in rows] == [1, 2, 3, 4, 7]
    assert [row["Image"] for row in rows] == [0, 1, 2, 3, 0]
    assert [row["Pipeline-Call"] for row in rows] == [1, 1, 1, 1, 2]
    assert {*rows[0]} == {*COLUMNS}
    first = rows[0]
    assert (first["Scheduler"], first["Steps"], first["Guidance-Scale"]) == ("euler", 2, 3.0)
    assert (first["Height"], first["Width"]) == made[0].images[0].size[::-1]
    assert first["Backend"].startswith("onnxruntime ")
    assert (first["Device"], first["Build"]) == ("cpu", pipe.build.name)
    assert first["Seconds"] == pytest.approx(made[0].timings.total)
    for row, image in zip(rows, made[0].images, strict=False):
        assert (pixels(run, row) == np.asarray(image)).all()
    assert np.abs(pixels(run, rows[4]) - made[1].images[0] * 255).max() <= 0.5

    shown = run.values("Generated-Image")
    assert [each["count"] for each in shown] == [4, 1]
    assert shown[0]["captions"] == [row["Prompt"] for row in rows[:4]]
    assert all((run.files / name).exists() for name in shown[0]["filenames"])
    assert run.values("Seconds/total") == pytest.approx([each.timings.total for each in made])


def test_a_file_that_is_still_written_to_reads_up_to_there(
    pipe: latentc.Pipeline, log: Callable[..., Read], runs: Callable[[], list[Path]]
) -> None:
    log(lambda: pipe("a star", num_inference_steps=1))
    (path,) = runs()
    whole = path.read_bytes()
    every = list(records(whole))
    for length in range(4, len(whole), 101):
        found = list(records(whole[:length]))
        assert found == every[: len(found)]
    assert len(found) < len(every)


def test_configuration(pipe: latentc.Pipeline, log: Callable[..., Read]) -> None:
    run = log(lambda: pipe("a star", num_inference_steps=1, seed=7))
    assert run.config["latentc"] == latentc.__version__
    (call,) = run.config["workflow"]
    assert call["stage"] == "Pipeline-Call-1"
    assert call["pipeline"] == {**pipe.settings(), "pipeline-name": "StableDiffusionPipeline"}
    assert call["params"]["prompt"] == "a star"
    assert call["params"]["num_inference_steps"] == 1
    assert call["params"]["seed"] == 7


def test_chains(pipe: latentc.Pipeline, log: Callable[..., Read]) -> None:
    def work() -> None:
        arguments: dict[str, Any] = {"num_inference_steps": 1, "seed": 1}
        base = pipe("base", output_type="latent", **arguments)
        pipe("alone", **arguments)
        refined = pipe("refined", latents=base.images, **arguments)
        pipe("third", latents=np.array(refined.latents).astype(np.float64), **arguments)
        with chain():
            scaled = pipe("first of the block", output_type="latent", **arguments)
            pipe("second of the block", latents=scaled.latents * 0.5, **arguments)
        two = pipe(["x", "y"], num_inference_steps=1, seed=3)
        pipe("one of two", latents=two.latents[1:], **arguments)

    run = log(work)
    rows = {row["Prompt"]: (row["Chain"], row["Stage"]) for row in run.table("Result-Table")}
    assert rows == {
        "base": (1, 1),
        "alone": (2, 1),
        "refined": (1, 2),
        "third": (1, 3),
        "first of the block": (5, 1),
        "second of the block": (5, 2),
        "x": (7, 1),
        "y": (7, 1),
        "one of two": (7, 2),
    }
    assert [call["chain"] for call in run.config["workflow"]] == [1, 2, 1, 1, 5, 5, 7, 7]


def test_base_and_refiner_are_two_pipelines(
    pipe: latentc.Pipeline, sd_bundle: Path, log: Callable[..., Read]
) -> None:
    """Latents that were never decoded are shown all the same, unless one says no."""
    with latentc.load(sd_bundle, backend="onnxruntime") as refiner:

        def work() -> None:
            base = pipe("a star", num_inference_steps=2, seed=1, output_type="latent")
            refiner("a star", num_inference_steps=1, latents=base.latents, seed=2)

        run = log(work)
    rows = run.table("Result-Table")
    assert [(row["Chain"], row["Stage"]) for row in rows] == [(1, 1), (1, 2)]
    assert pixels(run, rows[0]).shape == pixels(run, rows[1]).shape
    assert [call["params"]["output_type"] for call in run.config["workflow"]] == ["latent", "pil"]


def test_latents_are_not_decoded_if_not_wanted(
    pipe: latentc.Pipeline, log: Callable[..., Read]
) -> None:
    run = log(
        lambda: pipe("a star", num_inference_steps=1, seed=1, output_type="latent"),
        decode_latents=False,
    )
    (row,) = run.table("Result-Table")
    assert row["Generated-Image"] is None
    assert not run.values("Generated-Image")


def test_without_text(unconditional_bundle: Path, log: Callable[..., Read]) -> None:
    with latentc.load(unconditional_bundle, backend="onnxruntime") as loaded:
        run = log(lambda: loaded(batch_size=2, num_inference_steps=1, seed=1, scheduler="ddim"))
    rows = run.table("Result-Table")
    assert [(row["Prompt"], row["Guidance-Scale"]) for row in rows] == [("", None)] * 2


def test_second_prompts(sdxl_bundle: Path, log: Callable[..., Read]) -> None:
    with latentc.load(sdxl_bundle, backend="onnxruntime") as loaded:
        run = log(
            lambda: loaded("a star", prompt_2="in oil", num_inference_steps=1, seed=1)
        )  # fmt: skip
    (row,) = run.table("Result-Table")
    assert row["Prompt"] == "a star"
    assert json.loads(row["Arguments"])["prompt_2"] == "in oil"


def test_streams_are_logged_and_unfinished_runs_are_not(
    pipe: latentc.Pipeline, log: Callable[..., Read]
) -> None:
    def work() -> None:
        pipe.stream("left", num_inference_steps=2, seed=1).close()
        pipe.stream("finished", num_inference_steps=2, seed=1).finish()

    assert [row["Prompt"] for row in log(work).table("Result-Table")] == ["finished"]


def test_calls_of_several_threads(pipe: latentc.Pipeline, log: Callable[..., Read]) -> None:
    def work() -> None:
        threads = [
            threading.Thread(target=pipe, args=(f"{i}",), kwargs={"num_inference_steps": 1})
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    rows = log(work).table("Result-Table")
    assert sorted(row["Prompt"] for row in rows) == ["0", "1", "2", "3"]
    assert sorted(row["Pipeline-Call"] for row in rows) == [1, 2, 3, 4]


def test_the_result_is_the_same(pipe: latentc.Pipeline, log: Callable[..., Read]) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "seed": 5}
    alone = pipe("a star", **arguments)
    logged: list[latentc.Result] = []
    log(lambda: logged.append(pipe("a star", **arguments)))
    assert (alone.latents == logged[0].latents).all()
    assert (np.asarray(alone.images[0]) == np.asarray(logged[0].images[0])).all()
    assert alone.settings == logged[0].settings


def test_switched_off(pipe: latentc.Pipeline, runs: Callable[[], list[Path]]) -> None:
    before = [*observe._observers]
    latentc.wandb.autolog("a-project")
    assert latentc.wandb.autolog.enabled
    latentc.wandb.autolog("a-project")  # again: the first one ends
    assert len(observe._observers) == len(before) + 1
    latentc.wandb.autolog.disable()
    latentc.wandb.autolog.disable()
    assert not latentc.wandb.autolog.enabled
    assert observe._observers == before
    assert wandb.run is None
    pipe("a star", num_inference_steps=1)
    assert len(runs()) == 2


def test_a_run_of_the_users_own_goes_on(
    pipe: latentc.Pipeline, the_run: Callable[[], Read]
) -> None:
    with wandb.init(project="mine") as mine:
        with latentc.wandb.autolog():
            pipe("a star", num_inference_steps=1, seed=1)
        mine.log({"after": 1})
    run = the_run()
    assert [row["Prompt"] for row in run.table("Result-Table")] == ["a star"]
    assert run.values("after") == [1]


def test_a_generation_outlives_its_log(pipe: latentc.Pipeline) -> None:
    with latentc.wandb.autolog("a-project"):
        wandb.finish()
        with pytest.warns(UserWarning, match="images are made all the same"):
            assert pipe("a star", num_inference_steps=1).images
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            assert pipe("a star", num_inference_steps=1).images


def test_a_run_that_cannot_start_is_a_warning(
    pipe: latentc.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(UserWarning, match="No API key"):
        latentc.wandb.autolog("p")
    assert not latentc.wandb.autolog.enabled
    assert pipe("a star", num_inference_steps=1).images


def test_without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(latentc.LatentcError, match=r"pip install 'latentc\[wandb\]'"):
        Autolog()()


def test_importing_latentc_does_not_import_wandb() -> None:
    code = (
        "import sys, latentc; latentc.wandb.autolog.disable(); "
        "sys.exit(bool({'wandb', 'torch'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


REPORT = {
    "machine": {"cpu": "a processor", "cores": 2},
    "steps": 25,
    "rows": [
        {
            "name": "latentc onnx-fp32",
            "image": "images/a.png",
            "seconds": {"median": 1.5, "all": [1.4, 1.5]},
            "agrees": True,
        },
        {"name": "peer/x", "seconds": {"median": 2.5}, "memory": 100, "error": None},
    ],
    "prompts": ["a star"],
    "curves": [{"batch": 1, "seconds": 2.0}, {"batch": 2, "seconds": 3.5}],
}


def test_a_report(tmp_path: Path, the_run: Callable[[], Read]) -> None:
    folder = tmp_path / "report"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "a.png")
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "report.html").write_text("<p>report</p>")
    assert latentc.wandb.log_report(REPORT, folder)
    assert wandb.run is None
    run = the_run()
    assert run.config["machine"] == REPORT["machine"]
    assert run.config["prompts"] == ["a star"]
    (step,) = run.history
    assert step["latentc onnx-fp32/seconds.median"] == 1.5
    assert step["peer-x/memory"] == 100
    assert "latentc onnx-fp32/agrees" not in step
    rows = run.table("rows")
    assert [row["seconds.median"] for row in rows] == [1.5, 2.5]
    assert [row["seconds.all"] for row in rows] == ["[1.4, 1.5]", None]
    assert [row["batch"] for row in run.table("curves")] == [1, 2]
    (image,) = run.table("images")
    assert image["name"] == "a"
    assert "benchmark-report" in run.artifact_types.values()
    assert run.artifact_file("report.html").read_text() == "<p>report</p>"
    assert run.artifact_file("images/a.png").exists()


@pytest.mark.fault("1.4", "a report's link out of its folder is published")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["notes.txt", "images/a.png", "b.png"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_report_has_its_own_files_only(tmp_path: Path, name: str, kind: str) -> None:
    secret = tmp_path / "secret"
    Image.new("RGB", (8, 8)).save(secret, "PNG")
    folder = tmp_path / "report"
    (folder / "images").mkdir(parents=True)
    if kind == "link":
        (folder / name).symlink_to(secret)
    else:
        os.mkfifo(folder / name)
    with pytest.raises(latentc.LatentcError, match=f"{folder / name}: no file of a report"):
        latentc.wandb.log_report(REPORT, folder)


def test_a_report_joins_the_run_that_there_is(tmp_path: Path, the_run: Callable[[], Read]) -> None:
    with wandb.init(project="mine"):
        latentc.wandb.log_report({"rows": [{"seconds": 1.0}, {"seconds": 2.0}]}, tmp_path / "no")
        assert wandb.run is not None
    (step,) = [step for step in the_run().history if "row-0/seconds" in step]
    assert step["row-1/seconds"] == 2.0


def test_documentation(sd_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python example of docs/wandb.md, in order, in one program."""
    (tmp_path / "shapes").symlink_to(sd_bundle)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(REPORT))
    monkeypatch.chdir(tmp_path)
    found = [b.text for b in blocks(ROOT / "docs" / "wandb.md") if b.language == "python"]
    assert len(found) >= 4
    for text in found:
        exec(compile(text, "docs/wandb.md", "exec"), {"__name__": "__main__"})
