"""Engines are built as they are asked for, and everything is checked before the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import BuildRequest, Built, SessionOptions
from latentc.runtimes.building.engines import build_engines
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import DeviceUnavailable, InputError
from tests.support.fakes import FakeBackend, make_bundle

COMPONENTS = ["text_encoder", "denoiser", "decoder"]


class Builder(FakeBackend):
    """A backend that writes down what it is to build."""

    name: ClassVar[str] = "builder"
    targets: ClassVar[tuple[str, ...]] = ("built",)
    builds: ClassVar[bool] = True
    requests: ClassVar[list[tuple[str, SessionOptions, BuildRequest]]] = []

    def build(
        self,
        entry: Path,
        component: Component,
        device: str | None = None,
        options: SessionOptions | None = None,
        request: BuildRequest | None = None,
    ) -> Built:
        assert options is not None
        assert request is not None
        self.requests.append((component.name, options, request))
        return Built(entry, 1.0)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with a build that needs engines, and one that needs none."""
    folder = make_bundle(tmp_path / "bundle")
    manifest = Manifest.load(folder)
    other = msgspec.structs.replace(manifest.builds[0], name="built-fp32", target="built")
    builds = (*manifest.builds, other)
    (folder / MANIFEST).write_bytes(msgspec.structs.replace(manifest, builds=builds).encode())
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "BACKENDS", {"builder": f"{__name__}:Builder"})
    monkeypatch.setattr(engines, "find", lambda name: Builder)
    monkeypatch.setattr(Builder, "requests", [])
    return folder


def test_one_engine_after_another(bundle: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    built = build_engines(
        bundle,
        target="built",
        images="1:2:4",
        workspace=2,
        tf32=False,
        cache=tmp_path / "own",
        report=lines.append,
    )
    assert Builder.requests == []  # nothing is built that nobody asks for
    first = next(built)
    assert (first.build, first.component, first.built.seconds) == ("built-fp32", "text_encoder", 1)
    assert lines == ["built-fp32, text_encoder: building"]
    assert [first.component, *(engine.component for engine in built)] == COMPONENTS
    _, options, request = Builder.requests[1]
    assert options.cache == tmp_path / "own"
    assert len(options.key) == 64
    assert (request.workspace, request.tf32, request.force) == (2 << 30, False, False)
    assert request.profile["batch"] == (1, 4, 8)  # two rows of an image, one without guidance


def test_what_is_not_asked_for_is_the_recipes(bundle: Path) -> None:
    assert [engine.component for engine in build_engines(bundle)] == COMPONENTS
    assert [request for _, _, request in Builder.requests] == [BuildRequest()] * len(COMPONENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "coffee"}, "engines are built for the targets built; the bundle has: .*fake"),
        ({"imagse": "1"}, "unknown argument 'imagse'; did you mean 'images'"),
        ({"height": 512}, "'height' must be a text, not 512"),
        ({"height": "1:x:2"}, "--height '1:x:2': expected MIN:OPT:MAX"),
        ({"num_frames": "3"}, "no num_frames; leave --num-frames out"),
        ({"workspace": 0}, "'workspace' must be above 0, not 0"),
        ({"report": 3}, "'report' must be a function, not 3: Called with a line"),
    ],
)
def test_what_is_refused_before_anything_is_built(
    bundle: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_engines(bundle, **arguments)


def test_a_device_that_there_is_not(bundle: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="no device 'npu'"):
        build_engines(bundle, device="npu")
