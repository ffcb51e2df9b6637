"""Exports: atomic, resumable, content-addressed, verified, and nothing left behind on failure."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.compiler.run import Exported
from latentc.exporter.progress import Event
from latentc.exporter.targets.onnx import lowering as onnx_target
from latentc.exporter.verification import reference
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import (
    ExportError,
    InputError,
    LatentcError,
    SourceError,
    UnsupportedPipeline,
    VerificationError,
)
from tests.conftest import KEPT, Run
from tests.docs.markdown import ROOT
from tests.support import tiny_configurations as tiny

WEIGHTS = (".data", ".bin")
SMALL: dict[str, Any] = {"steps": (4,), "schedulers": ()}


@pytest.fixture
def source(smallest_unconditional: Path, tmp_path: Path) -> Path:
    """The pipeline that is the quickest to export."""
    return Path(shutil.copytree(smallest_unconditional, tmp_path / "source"))


@pytest.fixture
def graphs(smallest_unconditional_bundle: Path) -> dict[str, Any]:
    """Options of an export of it whose graphs need not be made anew."""
    return {"share_with": smallest_unconditional_bundle}


@pytest.fixture
def sd_source(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder("sd"), tmp_path / "source"))


@pytest.fixture
def text_source(smallest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smallest, tmp_path / "source"))


def quick(source: Path, output: Path, **options: Any) -> Exported:
    return export(source, output, **(SMALL | options))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "source")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, component: str, error: BaseException) -> None:
    lower = onnx_target.lower

    def failing(program: Any, spec: Any, folder: Path) -> str:
        if spec.name == component:
            (folder / "half-written").write_bytes(b"x")
            raise error
        return lower(program, spec, folder)

    monkeypatch.setattr(onnx_target, "lower", failing)


def test_export_and_its_files(source: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = quick(source, tmp_path / "bundle", report=events.append)
    manifest = Manifest.load(result.bundle)
    assert left_in(tmp_path) == ["bundle"]
    assert {file.path for file in manifest.files()} | {"manifest.json"} == {
        path.relative_to(result.bundle).as_posix()
        for path in result.bundle.rglob("*")
        if path.is_file()
    }
    build = manifest.builds[0]
    assert build.verification is not None
    assert build.verification.passed
    assert build.verification.loop is not None
    assert {check.probe for check in build.verification.checks} >= {"random", "trajectory-0"}
    ended = [event for event in events if event.seconds is not None]
    assert {event.subject for event in ended} >= {"denoiser", "decoder", "onnx-fp32", "bundle"}
    assert any(event.size for event in ended)


@pytest.mark.fault("1.9", "builds name the folders of the machine that exported them")
@pytest.mark.parametrize("name", ["sd_bundle", "coreml_bundle", "tensorrt_bundle"])
def test_no_file_names_a_folder_of_this_machine(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(name)
    places = (ROOT, Path(torch.__file__).parents[2], Path.home(), KEPT)
    for path in bundle.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        named = [place for place in places if f"{place}/".encode() in content]
        assert not named, path


def test_onnx_files(sd_bundle: Path, tmp_path: Path) -> None:
    # The onnx package refuses files with several hard links, as bundles that share files have.
    bundle = Path(shutil.copytree(sd_bundle, tmp_path / "bundle"))
    import onnx

    for component in ("text_encoder", "denoiser", "vae_decoder"):
        folder = bundle / "onnx-fp32" / component
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data"}
        onnx.checker.check_model(folder / "model.onnx", full_check=True)
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    model = onnx.load(bundle / "onnx-fp32/denoiser/model.onnx", load_external_data=False)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "sample": ["batch", 4, "height", "width"],
        "timestep": ["batch"],
        "encoder_hidden_states": ["batch", "sequence", 32],
        "prediction": ["batch", 4, "height", "width"],
    }


def test_unchanged_export_does_nothing(
    source: Path, graphs: dict[str, Any], tmp_path: Path
) -> None:
    bundle = quick(source, tmp_path / "bundle", **graphs).bundle
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    again = quick(source, tmp_path / "bundle")
    assert again.made == ()
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


def test_another_target_keeps_the_builds_that_are_there(
    source: Path, graphs: dict[str, Any], tmp_path: Path
) -> None:
    quick(source, tmp_path / "bundle", **graphs)
    graph = tmp_path / "bundle/onnx-fp32/denoiser/model.onnx"
    inode = graph.stat().st_ino
    result = quick(source, tmp_path / "bundle", **graphs, targets=("torch",))
    assert {build.name for build in result.manifest.builds} == {"onnx-fp32", "torch-fp32"}
    assert graph.stat().st_ino == inode
    assert all(build.verification for build in result.manifest.builds)
    for build in ("onnx-fp32", "torch-fp32"):
        with latentc.load(tmp_path / "bundle", build=build, verify=True) as pipe:
            assert len(pipe(num_inference_steps=4, seed=1).images) == 1


def test_added_plans_survive_the_next_export(
    source: Path, graphs: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    bundle = quick(source, tmp_path / "bundle", **graphs, verify=False).bundle
    assert run("schedule", bundle, "--scheduler", "ddpm", "--steps", 7)[0] == 0
    assert run("schedule", bundle, "--scheduler", "ddim", "--steps", 5)[0] == 0
    result = quick(source, tmp_path / "bundle", **graphs, targets=("torch",), verify=False)
    steps = {schedule.name: schedule.steps for schedule in result.manifest.schedules}
    assert steps == {"ddpm": (4, 7), "ddim": (5,)}
    with latentc.load(bundle, build="onnx-fp32", verify=True) as pipe:
        assert len(pipe(num_inference_steps=7, seed=1).images) == 1


def test_a_bundle_that_was_moved_aside_comes_back(
    source: Path, graphs: dict[str, Any], tmp_path: Path
) -> None:
    bundle = quick(source, tmp_path / "bundle", **graphs, verify=False).bundle
    bundle.rename(tmp_path / ".bundle.old")
    assert quick(source, tmp_path / "bundle", verify=False).made == ()
    assert left_in(tmp_path) == ["bundle"]


def test_a_changed_weight_rebuilds_what_depends_on_it(
    text_source: Path, smallest_bundle: Path, tmp_path: Path
) -> None:
    first = quick(text_source, tmp_path / "bundle", share_with=smallest_bundle)
    before = first.manifest.builds[0].artifacts
    weights = text_source / "vae/diffusion_pytorch_model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + np.float32(0.1)
    save_file(tensors, weights, metadata={"format": "pt"})
    result = quick(text_source, tmp_path / "bundle")
    after = result.manifest.builds[0].artifacts
    assert after["vae_decoder"].key != before["vae_decoder"].key
    assert after["denoiser"].files == before["denoiser"].files
    assert after["text_encoder"].files == before["text_encoder"].files
    probes = result.manifest.probes
    assert probes is not None
    known = {artifact.key for artifact in after.values()} | {probes.key}
    known |= {schedule.key for schedule in result.manifest.schedules}
    assert known & set(result.made) == {after["vae_decoder"].key, probes.key}


def test_a_changed_length_of_texts_rebuilds_what_depends_on_it(
    text_source: Path, smallest_bundle: Path, tmp_path: Path
) -> None:
    """It stands in the tokenizer's folder, of which no graph is made."""
    first = quick(text_source, tmp_path / "bundle", share_with=smallest_bundle)
    before = first.manifest.builds[0].artifacts
    config = text_source / "tokenizer/tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "model_max_length": 20}))
    result = quick(text_source, tmp_path / "bundle")
    after = result.manifest.builds[0].artifacts
    assert {after[name].key for name in ("text_encoder", "denoiser")} <= set(result.made)
    assert after["text_encoder"].files != before["text_encoder"].files
    with latentc.load(result.bundle) as pipe:
        assert pipe.encode_prompt("red")["prompt_embeds"].shape == (1, 20, 32)


def test_a_changed_scheduler_is_no_unchanged_export(
    source: Path, graphs: dict[str, Any], tmp_path: Path
) -> None:
    before = quick(source, tmp_path / "bundle", **graphs, verify=False).manifest
    config = source / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"clip_sample": true', '"clip_sample": false'))
    after = quick(source, tmp_path / "bundle", verify=False)
    assert after.made
    assert not after.manifest.source.scheduler_config["clip_sample"]
    assert after.manifest.schedules[0].key != before.schedules[0].key
    assert after.manifest.builds == before.builds


def test_a_changed_source_does_not_drop_other_builds(
    source: Path, graphs: dict[str, Any], tmp_path: Path
) -> None:
    quick(source, tmp_path / "bundle", **graphs, verify=False)
    config = source / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"clip_sample": true', '"clip_sample": false'))
    with pytest.raises(ExportError, match="onnx-fp32 would be lost"):
        quick(source, tmp_path / "bundle", targets=("torch",), verify=False)
    assert [b.name for b in Manifest.load(tmp_path / "bundle").builds] == ["onnx-fp32"]


def test_another_source_needs_overwrite(
    source: Path, graphs: dict[str, Any], tmp_path: Path
) -> None:
    quick(source, tmp_path / "bundle", **graphs, verify=False)
    other = source.rename(tmp_path / "other")
    with pytest.raises(ExportError, match="another source"):
        quick(other, tmp_path / "bundle", verify=False)
    quick(other, tmp_path / "bundle", verify=False, overwrite=True)
    assert Manifest.load(tmp_path / "bundle").source.id == "other"


def test_an_interrupted_export_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "decoder", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quick(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    result = quick(source, tmp_path / "bundle")
    artifacts = result.manifest.builds[0].artifacts
    assert artifacts["decoder"].key in result.made
    assert artifacts["denoiser"].key not in result.made
    assert left_in(tmp_path) == ["bundle"]
    assert not list(result.bundle.rglob("half-written"))


def test_a_staged_file_that_was_altered_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "decoder", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quick(source, tmp_path / "bundle")
    staged = tmp_path / ".bundle.partial/onnx-fp32/denoiser/model.onnx.data"
    data = bytearray(staged.read_bytes())
    data[100] ^= 0xFF
    staged.write_bytes(data)
    result = quick(source, tmp_path / "bundle")
    assert result.manifest.builds[0].artifacts["denoiser"].key in result.made


def test_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, "decoder", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ExportError, match="disk is full") as caught:
        quick(source, tmp_path / "bundle")
    assert caught.value.exit_code == 7
    assert left_in(tmp_path) == []


def test_a_full_disk_leaves_the_old_bundle(
    source: Path, graphs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quick(source, tmp_path / "bundle", **graphs, verify=False).bundle
    before = (bundle / "manifest.json").read_bytes()
    interrupt_at(monkeypatch, "decoder", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ExportError, match="disk is full"):
        quick(source, tmp_path / "bundle", precision="fp16", verify=False)
    assert (bundle / "manifest.json").read_bytes() == before
    assert left_in(tmp_path) == ["bundle"]


def test_a_failed_lowering_names_the_component(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, "denoiser", RuntimeError("no such operator\nand a long trace"))
    with pytest.raises(ExportError, match=r"denoiser: lowering to onnx failed: no such operator$"):
        quick(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("subject", ["denoiser", "loop"])
def test_a_miss_leaves_nothing(
    subject: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = reference.reference

    def wrong(*arguments: Any) -> Any:
        arrays, probe = true(*arguments)
        for name in arrays[subject]:
            if "/out/" in name or name == "latents":
                arrays[subject][name] = arrays[subject][name] * np.float32(1.01)
        return arrays, probe

    monkeypatch.setattr(reference, "reference", wrong)
    with pytest.raises(VerificationError, match="does not reproduce PyTorch") as caught:
        quick(source, tmp_path / "bundle")
    assert caught.value.exit_code == 6
    assert left_in(tmp_path) == []


def test_fp16_weights(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.unconditional(source, tiny.Configuration({**tiny.ONE_BLOCK, "block_out_channels": (64,)}))
    result = quick(
        source, tmp_path / "bundle", targets=("onnx", "openvino"), precision=("fp32", "fp16")
    )
    sizes = {
        build.name: max(
            file.size for file in build.artifacts["denoiser"].files if file.path.endswith(WEIGHTS)
        )
        for build in result.manifest.builds
    }
    assert sizes["onnx-fp16"] < 0.7 * sizes["onnx-fp32"]
    assert sizes["openvino-fp16"] < 0.7 * sizes["openvino-fp32"]
    for build in result.manifest.builds:
        assert build.verification is not None
        worst = max(check.relative_l2 for check in build.verification.checks)
        assert worst <= (2e-3 if build.precision == "fp16" else 1e-5)
        if build.precision == "fp16":
            assert worst > 1e-5  # it is really half precision


def test_a_fixed_size(text_source: Path, tmp_path: Path) -> None:
    bundle = quick(text_source, tmp_path / "bundle", height=32, width=48).bundle
    denoiser = Manifest.load(bundle).component("denoiser")
    assert denoiser.inputs["sample"].shape == ("batch", 4, 32, 48)
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        result = pipe("red", num_inference_steps=4, seed=1, output_type="np")
        assert result.images.shape == (1, 32, 48, 3)
        with pytest.raises(InputError, match="32"):
            pipe("red", num_inference_steps=4, height=64, width=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("coffee",)}, "unknown target 'coffee'"),
        ({"targets": ()}, "no target"),
        (
            {"precision": "fp3"},
            "target 'onnx' has no precision 'fp3'; did you mean 'fp32'?",
        ),
        ({"height": 32}, "both height and width"),
        ({"height": 33, "width": 32}, "height 33 is not a multiple of"),
        ({"steps": (0,)}, "'steps' must be at least 1, not 0"),
        ({"schedulers": ("coffee",)}, "unknown scheduler 'coffee'"),
    ],
)
def test_bad_options(
    options: dict[str, Any], message: str, sd_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(LatentcError, match=message):
        quick(sd_source, tmp_path / "bundle", verify=False, **options)
    assert not (tmp_path / "bundle").exists()


def test_other_files_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/thesis.txt").write_text("the only copy")
    with pytest.raises(InputError, match="is not a bundle"):
        quick(source, tmp_path / "bundle", overwrite=True)
    assert (tmp_path / "bundle/thesis.txt").read_text() == "the only copy"


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_keys(path: Path, prefix: str) -> None:
    from safetensors.numpy import load_file, save_file

    kept = {f"{prefix}{name}": value for name, value in load_file(path).items()}
    save_file(kept, path, metadata={"format": "pt"})


def break_source(source: Path, how: str) -> None:
    if how == "no index":
        (source / "model_index.json").unlink()
    elif how == "broken index":
        truncate(source / "model_index.json", 30)
    elif how == "unsupported class":
        index = source / "model_index.json"
        index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    elif how == "cut short":
        truncate(source / "unet/diffusion_pytorch_model.safetensors", 5000)
    elif how == "other keys":
        drop_keys(source / "text_encoder/model.safetensors", "somewhere.else.")
    elif how == "missing folder":
        shutil.rmtree(source / "vae")
    elif how == "broken config":
        truncate(source / "unet/config.json", 50)
    elif how == "no weights":
        (source / "unet/diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no index", "it has no model_index.json"),
        ("broken index", "model_index.json"),
        ("unsupported class", "'KandinskyPipeline' is not supported; supported: StableDiffusion"),
        ("cut short", "diffusion_pytorch_model.safetensors: not a whole file of weights"),
        ("other keys", "text_encoder: the weights do not fit the model, .* missing"),
        ("missing folder", "names 'vae', but there is no such folder"),
        ("broken config", "unet"),
        ("no weights", "unet"),
    ],
)
def test_bad_sources(how: str, message: str, sd_source: Path, tmp_path: Path) -> None:
    break_source(sd_source, how)
    with pytest.raises(SourceError, match=message) as caught:
        quick(sd_source, tmp_path / "bundle")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
    assert (how == "unsupported class") == isinstance(caught.value, UnsupportedPipeline)


def test_missing_source_on_the_command_line(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("export", tmp_path / "nowhere", "-o", tmp_path / "bundle")
    assert code == 3
    assert errors.strip().splitlines()[-1].startswith("error: no such folder")
    assert "Traceback" not in errors
    assert left_in(tmp_path) == []


def test_ctrl_c(source: Path, tmp_path: Path) -> None:
    command: Sequence[str] = [
        *(sys.executable, "-m", "latentc", "export", str(source)),
        *("-o", str(tmp_path / "bundle"), "--steps", "4"),
    ]
    # A test run in the background ignores SIGINT, and so would what it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    staging = tmp_path / ".bundle.partial/.done"
    while process.poll() is None and not (staging.is_dir() and any(staging.iterdir())):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("no_exporter")
def test_adding_plans(source: Path, graphs: dict[str, Any], tmp_path: Path, run: Run) -> None:
    bundle = quick(source, tmp_path / "bundle", **graphs, verify=False).bundle
    with pytest.raises(InputError, match="latentc schedule"):
        latentc.load(bundle)(num_inference_steps=7)
    added = run("schedule", bundle, "--scheduler", "ddpm", "--steps", 7, "--steps", 9)
    assert added[:2] == (0, "ddpm: 4, 7, 9 steps\n"), added[2]
    with latentc.load(bundle, verify=True) as pipe:
        assert len(pipe(num_inference_steps=7, seed=1).images) == 1
    assert len(list((bundle / "schedules").iterdir())) == 1
    code, _, errors = run("schedule", bundle, "--scheduler", "lcm", "--steps", 100)
    assert code == 7
    assert "LCMScheduler refuses 100 steps" in errors
    code, _, errors = run("schedule", bundle, "--scheduler", "coffee")
    assert code == 2
    assert "unknown scheduler 'coffee'" in errors


def test_a_build_that_lives_in_anothers_folder_survives_its_being_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds share components, which stand in the folder of the first of them."""
    output, mixed = tmp_path / "bundle", "fp32,decoder=fp16"
    before = quick(source, output, targets=["onnx"], precision=["fp32", mixed]).manifest
    lower = onnx_target.lower

    def otherwise(program: Any, spec: Any, folder: Path, *args: Any, **kwargs: Any) -> str:
        entry = lower(program, spec, folder, *args, **kwargs)
        model = onnx.load(folder / entry, load_external_data=False)
        model.producer_name = "another exporter"
        onnx.save(model, folder / entry)
        return entry

    monkeypatch.setattr(onnx_target, "lower", otherwise)
    monkeypatch.setattr("latentc.exporter.options.code", lambda *_: "changed")
    after = quick(source, output, targets=["onnx"], precision="fp32").manifest
    kept, made = (
        {build.precision: build for build in after.builds}[each] for each in (mixed, "fp32")
    )
    old = {build.precision: build for build in before.builds}[mixed]
    for name, artifact in kept.artifacts.items():
        assert artifact.key == old.artifacts[name].key
        assert {f.sha256 for f in artifact.files} == {f.sha256 for f in old.artifacts[name].files}
        assert not {f.path for f in artifact.files} & {f.path for f in made.artifacts[name].files}
    for build in (kept, made):
        with latentc.load(output, build=build.name, verify=True) as pipe:
            pipe(num_inference_steps=4)
    assert quick(source, output, targets=["onnx"], precision=["fp32", mixed]).manifest.builds
    listed = {file.path for file in Manifest.load(output).files()} | {"manifest.json"}
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert found == listed
