"""A whole bundle is checked: its files, then each build on each engine that loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.errors import BackendError, InputError, VerificationError
from latentc.runtimes.verification.whole_bundle import verify
from tests.support.fakes import FakeBackend, add_build, add_probes, make_bundle


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "BACKENDS", {"fake": "x:FakeBackend"})
    real = engines.find
    monkeypatch.setattr(engines, "find", lambda name: FakeBackend if name == "fake" else real(name))
    folder = make_bundle(tmp_path / "bundle")
    add_probes(folder)
    return folder


def test_what_passes(bundle: Path) -> None:
    lines: list[str] = []
    verified = verify(bundle, report=lines.append)
    verified.refuse()
    assert [(build.name, figures.passed) for build, figures in verified.measured] == [
        ("fake-fp32", True)
    ]
    assert lines[0].startswith(f"{bundle}: all files are as the manifest says, ")
    assert lines[1:] == [
        f"fake-fp32 on fake: {what}"
        for what in ("text_encoder", "denoiser", "decoder", "whole loop")
    ]


def test_files_only(bundle: Path) -> None:
    verified = verify(bundle, files_only=True)
    assert (verified.measured, verified.failures) == ((), ())
    verified.refuse()


def test_an_engine_that_fails_keeps_no_other_from_being_tried(bundle: Path) -> None:
    add_build(bundle, "int8", "broken")
    lines: list[str] = []
    verified = verify(bundle, report=lines.append)
    assert [build.name for build, _ in verified.measured] == ["fake-fp32"]
    (failure,) = verified.failures
    assert failure[:2] == ("fake-int8", "fake")
    assert any(line.startswith("fake-int8 on fake: failed: ") for line in lines)
    with pytest.raises(BackendError, match=r"^fake-int8 on fake failed: .*exploded"):
        verified.refuse()


def test_one_build_of_several(bundle: Path) -> None:
    add_build(bundle, "int8", "broken")
    assert not verify(bundle, build="fake-fp32", backend="fake", device="cpu").failures


def test_what_misses(bundle: Path) -> None:
    add_probes(bundle, 0.01)
    with pytest.raises(VerificationError, match="does not reproduce PyTorch: fake-fp32 on fake"):
        verify(bundle).refuse()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bild": "fake-fp32"}, "unknown argument 'bild'; did you mean 'build'"),
        ({"device": "cpu"}, "give --backend too"),
        ({"backend": "coffee"}, "no backend named 'coffee'"),
        ({"files_only": 1}, "'files_only' must be True or False, not 1"),
    ],
)
def test_what_is_refused(bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(bundle, **arguments)
