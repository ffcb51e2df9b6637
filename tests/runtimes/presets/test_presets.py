"""Presets: limits, records and whom they fit, choices without a record, calls with arguments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest

from latentc import cli
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.backends.onnxruntime import OnnxRuntimeBackend
from latentc.runtimes.backends.openvino import OpenVinoBackend
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import JudgeProbe
from latentc.runtimes.commands.generate import generate
from latentc.runtimes.commands.tune import tune
from latentc.runtimes.errors import InputError
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from latentc.runtimes.presets import records as tuning_records
from latentc.runtimes.presets.preset import LIMITS, content, expected_rank
from latentc.runtimes.presets.records import Choice, Record, machine, save
from tests.support.fakes import FakeBackend, add_build, add_probes, make_bundle

CHOICE = Choice(
    *("fake-int8", "fake", "1.0", "cpu", None, 0, False),
    arguments={"guidance_stop": 0.5},
    seconds=1.0,
    image_psnr=31.0,
    points=None,
)


class Other(FakeBackend):
    name = "other"


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, type[Backend]] = {"fake": FakeBackend, "other": Other}
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "BACKENDS", dict.fromkeys(kinds, "x:X"))
    real = engines.find
    monkeypatch.setattr(engines, "find", lambda name: kinds.get(name) or real(name))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "bundle")
    add_build(folder, "int8", "denoiser")
    return folder


def record(bundle: Path, **changes: Any) -> Record:
    """A record of this machine that has the same choice for every preset."""
    here = changes.pop("machine", machine())
    digest = content(Manifest.load(bundle))
    choice = msgspec.structs.replace(CHOICE, **changes)
    chosen = dict.fromkeys(LIMITS, choice)
    return Record(digest, str(bundle), here, "2026-11-21T00:00:00+00:00", 4, chosen)


def quiet(bundle: Path, preset: str, **how: Any) -> Pipeline:
    """Load, and let nothing be warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(bundle, preset=preset, **how)


def test_limits() -> None:
    assert [*LIMITS] == ["faithful", "balanced", "fast"]
    assert LIMITS["faithful"].allow(30.0, 0.0)
    assert not LIMITS["faithful"].allow(29.9, 0.0)
    assert not LIMITS["faithful"].allow(99.0, 0.1)
    assert LIMITS["balanced"].allow(20.0, 2.0)
    assert not LIMITS["balanced"].allow(99.0, 2.1)
    assert LIMITS["fast"].allow(12.0, None)
    assert not LIMITS["fast"].allow(11.9, -3.0)


def test_limits_are_told_as_they_are() -> None:
    """By the help of the command and by the documentation."""
    text = " ".join((tune.help or "").split())
    page = (Path(__file__).resolve().parents[3] / "docs" / "presets.md").read_text("utf-8")
    for name, limits in LIMITS.items():
        assert f"{name} {limits.image_psnr:g} dB and " in text
        assert f"| `{name}` | {limits.image_psnr:g} dB | {limits.points:g} |" in page
        assert name in str(next(each for each in generate.params if each.name == "preset").help)


def test_untuned_bundles_cost_no_search(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(record(bundle))
    add_build(bundle, "fp16", "denoiser")
    monkeypatch.setattr(tuning_records, "_all", lambda: pytest.fail("read all records"))
    quiet(bundle, "auto").close()


def test_what_is_expected_to_be_faster() -> None:
    ranks = [
        expected_rank(OpenVinoBackend, "w8a8+downsampled-attention"),
        expected_rank(OpenVinoBackend, "fp32,denoiser=w8a8"),
        expected_rank(OpenVinoBackend, "bf16"),
        expected_rank(OpenVinoBackend, "fp32"),
        expected_rank(OnnxRuntimeBackend, "fp32"),
        expected_rank(FakeBackend, "fp32"),
    ]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)


def test_a_record_is_used(bundle: Path) -> None:
    save(record(bundle, threads=1))
    with quiet(bundle, "fast") as pipe:
        assert pipe.build.name == "fake-int8"
        result = pipe("a", seed=1)
    expected = {"preset": "fast", "guidance_stop": 0.5, "threads": 1, "static": False}
    assert expected.items() <= result.settings.items()
    with load(bundle) as pipe:  # programs get what they always got
        assert pipe.build.name == "fake-fp32"
        assert "preset" not in pipe.settings()


def test_arguments_of_the_call_win(bundle: Path) -> None:
    save(record(bundle, arguments={"guidance_start": 0.25, "guidance_stop": 0.5}))
    with quiet(bundle, "balanced") as pipe:

        def window(**arguments: Any) -> tuple[float, float]:
            request = pipe.stream("a", **arguments).request
            return request.number("guidance_start"), request.number("guidance_stop")

        assert window() == (0.25, 0.5)
        assert window(guidance_stop=0.75) == (0.0, 0.75)
        assert window(guidance_start=0.75) == (0.75, 1.0)
        assert window(num_inference_steps=4) == (0.25, 0.5)
        assert window(num_inference_steps=2) == (0.0, 1.0)  # fewer steps than were looked at


def test_other_sizes_than_the_preset_was_loaded_for(bundle: Path) -> None:
    save(record(bundle, arguments={}, static=True))
    with quiet(bundle, "faithful") as pipe, load(bundle, build="fake-int8") as plain:
        usual = pipe("a", seed=1, output_type="np")
        assert usual.settings["static"] is True
        large = pipe("a", seed=1, height=32, output_type="np")
        assert large.settings["static"] is False
        assert large.images.shape == (1, 32, 16, 3)
        same = plain("a", seed=1, height=32, output_type="np")
        assert (large.images == same.images).all()
        assert pipe("a", seed=1, num_images_per_prompt=2).settings["static"] is False
    with pytest.raises(InputError, match="closed"):
        pipe("a", height=32)


def test_who_asks_for_one_size_gets_one(bundle: Path) -> None:
    with (
        load(bundle, static={}) as pipe,
        pytest.raises(InputError, match="without static"),
    ):
        pipe("a", height=32)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"build": "fake-fp32"}, "build 'fake-int8'"),
        ({"precision": "fp32"}, "precision 'int8'"),
        ({"compute": "bf16"}, "compute None"),
        ({"threads": 3}, "threads 0"),
        ({"compile": True}, "compile False"),
    ],
)
def test_contradictions(bundle: Path, asked: dict[str, Any], message: str) -> None:
    save(record(bundle))
    with pytest.raises(InputError, match=message):
        load(bundle, preset="fast", **asked)


def test_static_contradicts_what_is_for_any_size(bundle: Path) -> None:
    save(record(bundle))
    with pytest.raises(InputError, match="static False"):
        load(bundle, preset="fast", static={})


def test_what_agrees_is_no_contradiction(bundle: Path) -> None:
    save(record(bundle, arguments={}, static=True))
    agreed: dict[str, Any] = {"build": "fake-int8", "precision": "int8", "device": "CPU"}
    with quiet(bundle, "fast", backend="fake", static={"height": 32}, **agreed) as pipe:
        assert pipe("a", height=32).settings["static"] is True
    with quiet(bundle, "fast", backend=FakeBackend()) as pipe:
        assert pipe.build.name == "fake-int8"


def test_unknown_preset(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"'fastest'.*did you mean 'fast'"):
        load(bundle, preset="fastest")


def test_records_of_one_engine_are_their_own(bundle: Path) -> None:
    save(record(bundle))
    save(record(bundle, backend="other", build="fake-fp32"), "other")
    with quiet(bundle, "fast", backend="other") as pipe:
        assert (pipe.backend.name, pipe.build.name) == ("other", "fake-fp32")
    with quiet(bundle, "fast") as pipe:
        assert pipe.backend.name == "fake"


def test_a_record_of_one_engine_is_not_for_all(bundle: Path) -> None:
    save(record(bundle), "fake")
    with pytest.warns(UserWarning, match="for another engine or device only"):
        load(bundle, preset="fast").close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": machine() | {"processor": "abacus"}}, "processor was abacus, is "),
        ({"machine": machine() | {"cores": "512"}}, "cores was 512"),
        ({"version": "0.9"}, "fake was 0.9, is 1.0"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"backend": "gone"}, "no backend named 'gone'"),
        ({"build": "fake-int2"}, "damaged"),
        ({"arguments": {"turbo": 1}}, "damaged"),
        ({"arguments": {"guidance_stop": 7}}, "damaged"),
        ({"arguments": {"guidance_stop": 10**400}}, "damaged"),
        ({"seconds": -1.0, "threads": -1}, "damaged"),
    ],
)
def test_a_record_that_does_not_fit(bundle: Path, changes: dict[str, Any], message: str) -> None:
    save(record(bundle, **changes))
    with pytest.warns(UserWarning, match=message):
        pipe = load(bundle, preset="auto")
    assert pipe.build.name == "fake-fp32"
    with pytest.warns(UserWarning, match=f"{message}.*latentc tune"):
        load(bundle, preset="fast").close()


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
@pytest.mark.parametrize("junk", [b"", b"\xff\x00", b"[" * 2000])
def test_a_damaged_record_counts_as_none(bundle: Path, cut: int, junk: bytes) -> None:
    path = save(record(bundle))
    data = path.read_bytes()
    path.write_bytes(data[: cut % len(data) - 1 if cut else 0] + junk)
    with pytest.warns(UserWarning, match=r"damaged.*latentc tune"):
        load(bundle, preset="auto").close()


def test_a_bundle_with_other_builds(bundle: Path) -> None:
    save(record(bundle))
    add_build(bundle, "fp16", "denoiser")
    with pytest.warns(UserWarning, match="builds are others now"):
        load(bundle, preset="fast").close()


def test_auto_without_a_record_or_with_wishes_is_as_without_a_preset(bundle: Path) -> None:
    with quiet(bundle, "auto") as pipe:
        assert pipe.build.name == "fake-fp32"
    save(record(bundle))
    with quiet(bundle, "auto", precision="fp32") as pipe:
        assert pipe.build.name == "fake-fp32"
        assert "preset" not in pipe.settings()
    with quiet(bundle, "auto") as pipe:
        assert pipe.settings()["preset"] == "faithful"


@pytest.mark.parametrize(
    ("preset", "build"),
    [("faithful", "fake-bf16"), ("balanced", "fake-int8"), ("fast", "fake-int4")],
)
def test_without_a_record_the_manifest_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, build: str
) -> None:
    folder = make_bundle(tmp_path / "bundle")
    manifest = add_probes(folder)
    assert manifest.probes is not None
    judged = JudgeProbe({}, "plain", 2, 7, 16, 8, "even", tuple("ab" * 25), 48)
    probes = msgspec.structs.replace(manifest.probes, judged=judged)
    (folder / MANIFEST).write_bytes(msgspec.structs.replace(manifest, probes=probes).encode())
    monkeypatch.setattr(FakeBackend, "places", {"int4": 0, "int8": 1, "bf16": 2, "fp32": 3})
    add_build(folder, "bf16", "denoiser", 30.0, 48)
    add_build(folder, "int8", "denoiser", 35.0, 47)
    add_build(folder, "int4", "denoiser", 19.0, 46)
    with pytest.warns(UserWarning, match=f"not been tuned.*{build}.*latentc tune"):
        pipe = load(folder, preset=preset)
    assert pipe.build.name == build
    assert pipe.settings()["preset"] == preset
    assert pipe.stream("a").request.number("guidance_stop") == 1.0
    with pytest.warns(UserWarning, match="fake-bf16"):
        load(folder, preset=preset, precision="bf16").close()


def test_builds_without_figures_are_not_guessed_at(bundle: Path) -> None:
    with pytest.warns(UserWarning, match="nearest to fp32"):
        pipe = load(bundle, preset="fast")
    assert pipe.build.name == "fake-fp32"


def test_generate_says_what_it_used(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(record(bundle))
    assert cli.run(["generate", str(bundle), "a", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert "fake-int8, guidance_stop 0.5, preset faithful]" in captured.out
    assert captured.err == ""
    assert cli.run(["generate", str(bundle), "a", "--build", "fake-fp32"]) == 0
    assert "preset" not in capsys.readouterr().out
    assert cli.run(["generate", str(bundle), "a", "--preset", "fast", "--build", "fake-fp32"]) == 2
    assert "error: preset 'fast' is build 'fake-int8'" in capsys.readouterr().err


def test_generate_loads_once_for_its_own_size(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(record(bundle, arguments={}, static=True))
    how = ["--preset", "fast", "--height", "32", "-n", "2", "--json"]
    assert cli.run(["generate", str(bundle), "a", *how]) == 0
    assert '"static": true' in capsys.readouterr().out
