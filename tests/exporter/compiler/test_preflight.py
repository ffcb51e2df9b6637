"""An export says before what it will need, and is refused where that cannot fit."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from latentc.benchmarks.models import MODELS
from latentc.cli import cli
from latentc.exporter.compiler import preflight
from latentc.exporter.compiler.export import export
from latentc.exporter.compiler.export import preflight as preflight_of
from latentc.exporter.compiler.preflight import GIB, Need, Weights, available_memory, need, refuse
from latentc.runtimes.errors import ExportError

SD15 = {
    "text_encoder": Weights(123_060_480, 4),
    "denoiser": Weights(859_520_964, 4),
    "vae_decoder": Weights(83_653_863, 4),
}
NAMES = tuple(SD15)
Usage = namedtuple("Usage", "total used free")


def asked(target: str = "onnx", precision: str = "fp16") -> dict[tuple[str, str], tuple[str, ...]]:
    return {(target, precision): NAMES}


@pytest.mark.parametrize("target", ["onnx", "openvino", "torch", "coreml", "tensorrt"])
@pytest.mark.parametrize("verify", [True, False])
def test_more_weights_need_more(target: str, verify: bool) -> None:
    larger = {name: Weights(each.count * 3 // 2, each.stored) for name, each in SD15.items()}
    small = need(SD15, asked(target), verify)
    large = need(larger, asked(target), verify)
    assert large.memory > small.memory
    assert large.disk > 1.4 * small.disk
    assert large.seconds > small.seconds


def test_more_builds_need_more() -> None:
    one = need(SD15, asked(), True)
    two = need(SD15, {**asked(), **asked("openvino")}, True)
    unverified = need(SD15, asked(), False)
    assert two.disk > one.disk
    assert two.seconds > one.seconds > unverified.seconds
    assert two.memory >= one.memory > unverified.memory
    loaded = {name: Weights(each.count, each.stored, True) for name, each in SD15.items()}
    assert need(loaded, asked(), False).memory > unverified.memory + 4e9


def test_onnx_runtime_leaves_large_components_in_their_files() -> None:
    sdxl = {name: Weights(3 * each.count, 2) for name, each in SD15.items()}
    assert need(sdxl, asked("onnx", "fp16"), True).memory < 3 * GIB
    assert need(sdxl, asked("openvino", "fp16"), True).memory > 8 * GIB


def test_smaller_precisions_need_less_disk() -> None:
    sizes = [need(SD15, asked("onnx", each), False).disk for each in ("fp32", "fp16", "int8")]
    assert sizes == sorted(sizes, reverse=True)
    mixed = need(SD15, asked("onnx", "denoiser=int8,vae_decoder=fp16"), False).disk
    assert sizes[2] < mixed < sizes[0]


def test_what_is_there_already_needs_no_disk() -> None:
    nothing: dict[tuple[str, str], tuple[str, ...]] = {("onnx", "fp16"): ()}
    assert need(SD15, nothing, False).disk < 0.1 * GIB


def test_weights_that_no_file_holds_in_their_type_are_written_twice() -> None:
    same = need(SD15, asked("openvino", "fp32"), False).disk
    other = need(SD15, asked("openvino", "fp16"), False).disk
    assert same == pytest.approx(4 * 1.066e9, rel=0.05)
    assert other == pytest.approx(2 * 1.066e9 + 2 * 0.86e9, rel=0.05)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """12 GiB of memory and 100 GiB of disk."""
    memory = namedtuple("memory", "available")(12 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(200 * GIB, 100 * GIB, 100 * GIB))
    monkeypatch.setattr(preflight, "_left", lambda _: [])
    return tmp_path


def test_what_fits_is_let_through(large: Path) -> None:
    refuse(Need(11 * GIB, 99 * GIB, 1.0, "denoiser"), large / "not" / "yet" / "there")


def test_too_little_memory(large: Path) -> None:
    said = r"13\.0 GiB of memory \(denoiser\), and 12\.0 GiB are available; .*--no-preflight"
    with pytest.raises(ExportError, match=said):
        refuse(Need(13 * GIB, 1, 1.0, "denoiser"), large / "bundle")


def test_too_little_disk(large: Path) -> None:
    said = r"101\.0 GiB of disk at .*bundle, and 100\.0 GiB are free; .*another disk"
    with pytest.raises(ExportError, match=said):
        refuse(Need(1, 101 * GIB, 1.0, ""), large / "bundle")


def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path("/proc/self/cgroup")
    if not own.exists():
        pytest.skip("no control groups here")
    lines = own.read_text().splitlines()
    group = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    free = available_memory(tmp_path)  # a folder that says nothing
    assert free is not None
    folder = tmp_path / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{GIB}\n")
    (folder / "memory.current").write_text(f"{GIB // 2}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 8}\nactive_file 0\n")
    assert available_memory(tmp_path) == GIB // 2 + GIB // 8
    (folder / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == pytest.approx(free, rel=0.5)


def test_sizes_come_from_the_headers(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(pipeline_folder("sd"), tmp_path / "source"))
    before = preflight_of(source, tmp_path / "bundle")
    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    more = load_file(path)
    more["extra"] = next(iter(more.values())).repeat(4_000_000)[: 25 << 20].astype("float32")
    save_file(more, path)
    after = preflight_of(source, tmp_path / "bundle")
    assert after.disk - before.disk == 4 * (25 << 20)
    assert not (tmp_path / "bundle").exists()


def test_an_export_that_cannot_fit_leaves_nothing_behind(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 20, 0, 1 << 20))
    with pytest.raises(ExportError, match="choose an output on another disk"):
        export(pipeline_folder("unconditional"), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_command_line(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", str(pipeline_folder("unconditional")), "-o", str(tmp_path / "bundle")]
    found = CliRunner().invoke(cli, [*command, "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "GiB of memory" in found.output
    assert "GiB of disk" in found.output
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(preflight, "available_memory", lambda: 1)
    quick = ["--no-verify", "--steps", "2", "--scheduler", "ddim"]
    refused = CliRunner().invoke(cli, [*command, *quick])
    assert isinstance(refused.exception, ExportError)
    made = CliRunner().invoke(cli, [*command, *quick, "--no-preflight"])
    assert made.exit_code == 0, made.output
    again = preflight_of(
        pipeline_folder("unconditional"),
        tmp_path / "bundle",
        steps=[2],
        schedulers=["ddim"],
        verify=False,
    )
    assert again.disk < need({}, {}, False).disk + 1


def test_the_full_sizes_are_those_of_the_models() -> None:
    assert SD15["denoiser"].count == MODELS["sd15"].networks["unet"].parameters
