"""The document around the programs: its version, what it needs, what readers may leave alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from latentc.runtimes.bundle import manifest as format_2
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.errors import BundleError
from latentc.runtimes.pipeline.pipeline import load
from tests.support.fakes import FakeBackend, make_bundle

# What a later writer may add: readers leave it alone, whatever it is.
OPTIONAL: dict[str, Any] = {
    "latentc.notes": {"author": "somebody", "tags": ["a", "b"], "rating": 4.5},
    "com.example/thumbnail": None,
    "empty": {},
    "numbers": [1, -2, 0.5, True, None, "é", {"deep": [[[]]]}],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", optional=OPTIONAL)


def edited(bundle: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads((bundle / MANIFEST).read_bytes())
    change(document)
    data = json.dumps(document).encode()
    (bundle / MANIFEST).write_bytes(data)
    return data


def test_optional_sections_survive(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.optional == OPTIONAL
    again = Manifest.decode(manifest.checked())
    assert again == manifest
    assert json.loads(manifest.encode())["optional"] == OPTIONAL


def test_bundles_without_a_record_of_programs_are_read(bundle: Path) -> None:
    """Bundles that were written before have none, and those that were not verified an empty one."""
    whole = Manifest.load(bundle)
    edited(bundle, lambda document: document.pop("programs_checked"))
    assert Manifest.load(bundle) == structs.replace(whole, programs_checked=())


def test_optional_sections_change_no_image(bundle: Path, tmp_path: Path) -> None:
    call: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    with load(bundle, FakeBackend()) as pipe:
        found = pipe("a red circle", **call)
    with load(make_bundle(tmp_path / "plain"), FakeBackend()) as pipe:
        assert (pipe("a red circle", **call).latents == found.latents).all()


def test_the_document_says_all_that_it_holds(bundle: Path) -> None:
    document = json.loads((bundle / MANIFEST).read_bytes())
    assert (document["format_version"], document["needs"]) == (2, [])
    gone = {"tasks", "latents", "arguments", "vectors", "guidance", "embeddings"}
    assert not gone & document.keys()
    written = Manifest.load(bundle).encode()
    assert Manifest.decode(written).encode() == written


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        (["video"], "the bundle needs 'video', which this latentc does not know; upgrade latentc"),
        (["sound", "video"], "the bundle needs 'sound', 'video', which this latentc does not know"),
        ([""], "the bundle needs ''"),
        ([1], "Expected `str`"),
        ("video", "Expected `array`"),
        (None, "Expected `array`"),
    ],
)
def test_unknown_needs_are_refused(bundle: Path, needs: Any, says: str) -> None:
    edited(bundle, lambda document: document.update(needs=needs))
    with pytest.raises(BundleError, match=says):
        Manifest.load(bundle)


def test_needs_are_looked_at_before_the_rest(bundle: Path) -> None:
    """A need that only a later reader knows may change any other member, so needs come first."""
    edited(bundle, lambda document: document.update(needs=["video"], programs=7, more=True))
    with pytest.raises(BundleError, match="the bundle needs 'video'"):
        Manifest.load(bundle)


def test_known_needs_are_taken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(bundle, lambda document: document.update(needs=["video"]))
    monkeypatch.setattr(format_2, "NEEDS", ("sound", "video"))
    assert Manifest.load(bundle).needs == ("video",)


def test_many_needs_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(bundle, lambda document: document.update(needs=["video"] * 65))
    monkeypatch.setattr(format_2, "NEEDS", ("video",))
    with pytest.raises(BundleError, match="1 programs and 65 needs"):
        Manifest.load(bundle)


def test_a_bundle_without_needs_or_sections(bundle: Path) -> None:
    """Writers may leave out what is empty."""
    edited(bundle, lambda document: [document.pop(name) for name in ("needs", "optional")])
    assert (Manifest.load(bundle).needs, Manifest.load(bundle).optional) == ((), {})


@pytest.mark.parametrize("rest", [{}, {"tasks": []}, {"programs": []}, {"needs": []}])
def test_format_1_is_refused_with_the_command(bundle: Path, rest: dict[str, Any]) -> None:
    (bundle / MANIFEST).write_text(json.dumps({"format_version": 1, **rest}))
    with pytest.raises(
        BundleError,
        match=r"format_version 1, but this latentc reads 2; bring .*: latentc upgrade \S+$",
    ):
        Manifest.load(bundle)


@pytest.mark.parametrize("version", [0, 3, -1, 99, 2**63])
def test_other_formats_are_refused(bundle: Path, version: int) -> None:
    edited(bundle, lambda document: document.update(format_version=version, later={}))
    with pytest.raises(BundleError, match=rf"format_version {version}, .*; upgrade latentc or exp"):
        Manifest.load(bundle)


@pytest.mark.parametrize("version", [None, "2", 2.5, True, [2], 10**30])
def test_a_version_that_is_no_number(bundle: Path, version: Any) -> None:
    edited(bundle, lambda document: document.update(format_version=version))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.load(bundle)


@pytest.mark.parametrize(
    "name", ["tasks", "latents", "arguments", "vectors", "guidance", "embeddings"]
)
def test_members_of_format_1_are_unknown(bundle: Path, name: str) -> None:
    edited(bundle, lambda document: document.update({name: {}}))
    with pytest.raises(BundleError, match=f"unknown field `{name}`"):
        Manifest.load(bundle)


def test_a_writer_is_told_what_its_readers_refuse(bundle: Path) -> None:
    from msgspec.structs import replace

    manifest = Manifest.load(bundle)
    with pytest.raises(BundleError, match="that was to be written: 0 programs"):
        replace(manifest, programs=()).checked()
