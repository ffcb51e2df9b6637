"""These tests check what --precision accepts, which layers a fidelity floor keeps, and exports that
use both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentc.cli import run
from latentc.exporter.calibration_prompts import PROMPTS, read_prompts
from latentc.exporter.compiler.export import export
from latentc.exporter.lowering.layer_ranking import Layer, fewest, kept, promised
from latentc.exporter.options import check, export_options
from latentc.runtimes.backends.choosing import choose_build
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.precision import (
    build_name,
    canonical,
    check_components,
    of_component,
    with_passes,
)
from latentc.runtimes.errors import InputError, VerificationError
from tests.support.fakes import FakeBackend, make_bundle

NAMES = st.sampled_from(["denoiser", "vae_decoder", "text_encoder"])
PRECISIONS = st.sampled_from(["fp32", "fp16", "int8", "int4", "w8a8"])


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("fp16", "fp16"),
        ("denoiser=int8", "fp32,denoiser=int8"),
        ("vae_decoder=fp16, denoiser=int8", "fp32,denoiser=int8,vae_decoder=fp16"),
        ("denoiser=int8,fp16", "fp16,denoiser=int8"),
        ("int8,denoiser=int8", "int8"),
        ("int4,vae_decoder=int8", "int4"),
        ("w8a8+b+a", "w8a8+a+b"),
        ("fp32+a,denoiser=int8", "fp32,denoiser=int8+a"),
        ("int8+a,denoiser=int8", "int8+a"),
    ],
)
def test_one_spelling(text: str, one: str) -> None:
    assert canonical(text) == one
    assert canonical(one) == one


@given(PRECISIONS, st.dictionaries(NAMES, PRECISIONS))
def test_every_spelling_means_the_same(base: str, own: dict[str, str]) -> None:
    text = ",".join([*(f"{name}={value}" for name, value in own.items()), base])
    for name in ("denoiser", "vae_decoder", "text_encoder"):
        assert of_component(canonical(text), name) == of_component(text, name)
        if name in own:
            assert of_component(text, name) == own[name]
    assert not set(build_name("onnx", canonical(text))) & set("=,/\\: ")


def test_the_denoiser_only() -> None:
    assert of_component("w8a8", "denoiser") == "w8a8"
    assert of_component("w8a8", "vae_decoder") == "int8"
    assert of_component("int4,text_encoder=int4", "text_encoder") == "int4"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a precision such as fp16"),
        ("denoiser=", "expected a precision such as fp16"),
        ("fp16,,int8", "expected a precision such as fp16"),
        ("fp16,int8", "two precisions for all components"),
        ("denoiser=int8,denoiser=fp16", "two precisions for denoiser"),
        ("fp16+", "expected a precision such as fp16"),
        ("+a", "expected a precision such as fp16"),
        ("vae_decoder=fp16+a", "only the denoiser has passes"),
    ],
)
def test_bad_precisions(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        canonical(text)


def test_passes_are_about_the_denoiser() -> None:
    assert of_component("w8a8+b+a", "denoiser") == "w8a8+a+b"
    assert of_component("w8a8+a", "vae_decoder") == "int8"
    assert of_component("fp32,denoiser=int8+a", "denoiser") == "int8+a"
    assert build_name("onnx", canonical("w8a8+b+a")) == "onnx-w8a8-a-b"
    assert with_passes("fp32,denoiser=int8+b", ["a", "b"]) == "fp32,denoiser=int8+a+b"


def test_unknown_component() -> None:
    with pytest.raises(InputError, match="no component 'unet'; it has: denoiser, vae_decoder"):
        check_components("unet=int8", ["denoiser", "vae_decoder"])


LAYERS = [Layer("denoiser" if i % 3 else "vae_decoder", f"w{i}", 1 / (i + 1)) for i in range(40)]


@pytest.mark.parametrize("wanted", [1, 2, 7, 17, 38, 39, 40])
def test_fewest_layers(wanted: int) -> None:
    asked: list[int] = []

    def measure(count: int) -> float:
        asked.append(count)
        return 20.0 + count

    found = fewest(20.0 + wanted, 20.0, LAYERS, measure)
    assert wanted <= found <= wanted + max(0, wanted // 8)
    assert len(asked) <= 12
    assert sum(len(names) for names in kept(LAYERS, found).values()) == found


def test_layers_that_keep_their_promise_are_found_at_once() -> None:
    """Independent noises: every layer kept takes its own share of the error away."""

    def measure(count: int) -> float:
        asked.append(count)
        return 20 - 10 * math.log10(sum(layer.error**2 for layer in LAYERS[count:]) / whole)

    whole = sum(layer.error**2 for layer in LAYERS)
    for gain in (1.0, 3.0, 10.0, 14.0):
        asked: list[int] = []
        count = fewest(20 + gain, 20.0, LAYERS, measure)
        assert count == promised(gain, LAYERS)
        assert measure(count) >= 20 + gain > measure(count - 1)
        assert len(asked) <= 5


def test_floor_out_of_reach() -> None:
    with pytest.raises(VerificationError, match=r"with all 40 layers kept .* has 60.0 dB"):
        fewest(61.0, 20.0, LAYERS, lambda count: 20.0 + count)


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  two cats \n", encoding="utf-8")
    assert read_prompts(path) == ("a red circle", "two cats")
    assert len(PROMPTS) == len(set(PROMPTS)) > 8


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty; expected one prompt a line"),
        (b" \n\n", "empty; expected one prompt a line"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a text file in UTF-8"),
        (b"a\0b", "not a text file"),
        (None, "No such file"),
    ],
)
def test_bad_prompts(
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    says: str,
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    source, output = str(pipeline_folder("sd")), tmp_path / "bundle"
    arguments = ["export", source, "-o", str(output), "-t", "openvino", "-p", "w8a8"]
    assert run([*arguments, "--calibration-prompts", str(path)]) == 2
    assert says in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-t", "onnx", "-p", "w8a8"], "target 'onnx' has no precision 'w8a8'; there are: onnx:"),
        (["-t", "torch", "-p", "int8"], "torch: fp32, fp16, bf16"),
        (["-p", "unet=int8"], "no component 'unet'; it has"),
        (["--fidelity-floor", "30", "--no-verify"], "drop --no-verify"),
        (["--fidelity-floor", "-3"], "must be above 0"),
        (["-p", "fp32,fp16"], "two precisions for all components"),
    ],
)
def test_bad_input(
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    source, output = str(pipeline_folder("sd")), tmp_path / "bundle"
    assert run(["export", source, "-o", str(output), *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_mixed_build(smallest: Path, smallest_bundle: Path, tmp_path: Path) -> None:
    """Every component has its own precision, is verified by it, and an unchanged export does
    nothing."""
    options = {"targets": ["openvino"], "precision": "denoiser=w8a8,vae_decoder=bf16"}
    prompts = {"calibration_prompts": ["a", "b"], "calibration_samples": 4}
    source = smallest
    settings = {"schedulers": ["ddim"], "steps": [4], "share_with": [smallest_bundle]}
    done = export(source, tmp_path / "b", **options, **prompts, **settings)  # type: ignore[arg-type]
    (build,) = done.manifest.builds
    assert build.name == "openvino-fp32+denoiser.w8a8+vae_decoder.bf16"
    own = {name: artifact.precision for name, artifact in build.artifacts.items()}
    assert own == {"text_encoder": "fp32", "denoiser": "w8a8", "vae_decoder": "bf16"}
    assert build.artifacts["vae_decoder"].compute == "bf16"
    assert build.verification is not None
    limits = {check.subject: check.tolerance for check in build.verification.checks}
    assert limits["text_encoder"] < limits["vae_decoder"] < limits["denoiser"]
    assert Manifest.load(tmp_path / "b") == done.manifest
    again = export(source, tmp_path / "b", **options, **prompts, **settings)  # type: ignore[arg-type]
    assert again.made == ()
    other = export(
        source,
        tmp_path / "b",
        calibration_prompts=["c"],
        calibration_samples=4,
        **options,  # type: ignore[arg-type]
        **settings,  # type: ignore[arg-type]
    )
    keys = {a.key: name for name, a in other.manifest.builds[0].artifacts.items()}
    assert [keys[key] for key in other.made if key in keys] == ["denoiser"]


def test_fidelity_floor(smallest: Path, tmp_path: Path) -> None:
    """Layers are kept for it; which ones stands in the manifest, and the build is verified."""

    def made(floor: float | None) -> tuple[float, set[str]]:
        done = export(
            smallest,
            tmp_path / "b",
            targets=["onnx"],
            precision="int4",
            fidelity_floor=floor,
            schedulers=["ddim"],
            steps=[4],
        )
        (build,) = done.manifest.builds
        assert build.verification is not None
        assert build.verification.loop is not None
        kept = {name for artifact in build.artifacts.values() for name in artifact.kept}
        return build.verification.loop.image_psnr, kept

    without, none = made(None)
    assert not none
    better, kept = made(without + 5)
    assert better >= without + 5
    assert kept
    assert not any(path.name.startswith(".trial") for path in (tmp_path / "b").iterdir())


def test_all_is_each_target_in_each_of_its_precisions() -> None:
    options = export_options(targets=("onnx", "torch"), precision=("int8", "all"))
    assert options.builds() == [
        *[("onnx", "int8"), ("torch", "int8")],
        *[("onnx", name) for name in ("fp32", "fp16", "int4")],
        *[("torch", name) for name in ("fp32", "fp16", "bf16")],
    ]
    with pytest.raises(
        InputError, match="target 'torch' has no precision 'int8'; there are: onnx:"
    ):
        check(options)
    check(export_options(targets="all", precision="all"))


def test_a_precision_is_chosen_in_any_spelling(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    manifest = Manifest.load(folder)
    mixed = msgspec.structs.replace(
        manifest.builds[0], name="mixed", precision="fp32,decoder=fp16,denoiser=int8"
    )
    manifest = msgspec.structs.replace(manifest, builds=(*manifest.builds, mixed))
    chosen, _ = choose_build(manifest, FakeBackend(), precision="denoiser=int8,decoder=fp16")
    assert chosen.name == "mixed"
    with pytest.raises(InputError, match="expected a precision such as"):
        choose_build(manifest, FakeBackend(), precision="denoiser=")
