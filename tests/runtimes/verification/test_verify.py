"""Probes: a build that computes something else is told from one that does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.precisions import PRECISIONS
from latentc.runtimes.bundle.structures import Build, Verification
from latentc.runtimes.errors import BundleError, VerificationError
from latentc.runtimes.verification import verify
from latentc.runtimes.verification.verify import check_build, psnr, relative_l2
from tests.support.fakes import FakeBackend, add_probes, file_of, make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def check(bundle: Path, manifest: Manifest, **options: Any) -> Verification:
    return check_build(bundle, manifest, manifest.builds[0], FakeBackend(), **options)


def test_the_same_passes(bundle: Path) -> None:
    manifest = add_probes(bundle)
    told: list[str] = []
    found = check(bundle, manifest, report=told.append)
    assert found.passed
    assert (found.backend, found.version, found.device) == ("fake", "1.0", "cpu")
    assert [(c.subject, c.probe) for c in found.checks] == [
        (component, probe)
        for component in ("text_encoder", "denoiser", "decoder")
        for probe in ("random", "other")
    ]
    assert max(c.relative_l2 for c in found.checks) == 0
    assert found.loop is not None
    assert (found.loop.image_max_difference, found.loop.image_psnr) == (0, 99.0)
    assert told == ["text_encoder", "denoiser", "decoder", "whole loop"]


def test_the_manifest_need_not_be_saved(bundle: Path) -> None:
    manifest = add_probes(bundle)
    (bundle / MANIFEST).unlink()
    assert check(bundle, manifest).passed


@pytest.mark.parametrize(("error", "passed"), [(5e-5, True), (2e-4, False)])
def test_components_have_a_tolerance(bundle: Path, error: float, passed: bool) -> None:
    found = check(bundle, add_probes(bundle, error))
    assert all(c.passed == passed for c in found.checks)
    assert [c.relative_l2 for c in found.checks] == pytest.approx([error] * 6, rel=0.02)
    assert found.passed == passed
    assert found.loop is not None
    assert found.loop.passed  # 1e-3 are allowed there


def test_the_loop_has_a_tolerance(bundle: Path) -> None:
    found = check(bundle, add_probes(bundle, 2e-3))
    assert found.loop is not None
    assert not found.loop.passed


def test_single_values_may_jump_after_some_components(bundle: Path) -> None:
    manifest = add_probes(bundle)
    tolerances = [PRECISIONS["fp32"].tolerance]
    assert verify._allowed(manifest, tolerances) == tolerances[0]
    last = msgspec.structs.replace(manifest.components[-1], jumps=True)
    manifest = msgspec.structs.replace(manifest, components=(*manifest.components[:-1], last))
    assert verify._allowed(manifest, tolerances) == replace(tolerances[0], image_difference=255)


def test_fp16_has_its_own(bundle: Path) -> None:
    manifest = add_probes(bundle, 2e-3)
    build = manifest.builds[0]

    def of(precision: str) -> Build:
        made = {
            name: msgspec.structs.replace(artifact, precision=precision)
            for name, artifact in build.artifacts.items()
        }
        return msgspec.structs.replace(build, artifacts=made)

    assert check_build(bundle, manifest, of("fp16"), FakeBackend()).passed
    odd = of("int3")
    with pytest.raises(VerificationError, match="no tolerance is known for precision 'int3'"):
        check_build(bundle, manifest, odd, FakeBackend())


@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "decoder"])
def test_nan_is_a_miss(tmp_path: Path, component: str) -> None:
    manifest = add_probes(make_bundle(tmp_path / "good"))
    broken = make_bundle(tmp_path / "broken", graphs={component: f"nan_{component}"})
    (tmp_path / "good/probes").rename(broken / "probes")
    manifest = msgspec.structs.replace(Manifest.load(broken), probes=manifest.probes)
    found = check(broken, manifest)
    assert {c.subject for c in found.checks if not c.passed} == {component}
    assert max(c.relative_l2 for c in found.checks) == verify.NOT_COMPARABLE
    assert found.loop is not None
    assert not found.loop.passed
    json.loads(msgspec.json.encode(found))  # expressible
    assert Manifest.decode(
        msgspec.structs.replace(
            manifest,
            builds=(msgspec.structs.replace(manifest.builds[0], verification=found),),
        ).encode()
    )


def test_no_probes(bundle: Path) -> None:
    with pytest.raises(VerificationError, match="holds no probes"):
        check(bundle, Manifest.load(bundle))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sample": np.zeros(1)}, "unexpected array 'sample'"),
        ({"one/in/sample": np.zeros(1)}, "does not fit 'denoiser'"),
        ({"one/between/sample": np.zeros(1)}, "unexpected array"),
        ({"one/in/sample": np.array([{}])}, r"has dtype |an unusual .npy header"),
        (b"PK\x03\x04", "denoiser.npz: not a .npz file"),
    ],
)
def test_odd_probe_files(bundle: Path, arrays: Any, message: str) -> None:
    manifest = add_probes(bundle)
    path = bundle / "probes/denoiser.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    else:
        np.savez(path, **arrays)
    assert manifest.probes is not None
    files = manifest.probes.files | {"denoiser": file_of(bundle, "probes/denoiser.npz")}
    probes = msgspec.structs.replace(manifest.probes, files=files)
    with pytest.raises(BundleError, match=message):
        check(bundle, msgspec.structs.replace(manifest, probes=probes))


def test_figures() -> None:
    one = np.array([3.0, 4.0], np.float32)
    assert relative_l2(one, one) == 0
    assert relative_l2(one + np.float32(5), one) == pytest.approx(np.sqrt(2))
    assert relative_l2(np.zeros(2), np.zeros(2)) == 0
    assert relative_l2(one, np.zeros(2)) == verify.NOT_COMPARABLE
    assert relative_l2(one[:1], one) == verify.NOT_COMPARABLE
    assert relative_l2(one * np.inf, one) == verify.NOT_COMPARABLE
    grey = np.full((1, 2, 2, 3), 100, np.uint8)
    assert psnr(grey, grey) == verify.MAX_PSNR
    assert psnr(grey + 1, grey) == pytest.approx(48.13, abs=0.01)
