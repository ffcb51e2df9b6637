"""A bundle is refused, with one BundleError, unless every file is what the manifest says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.choosing import choose_build
from latentc.runtimes.bundle import trust
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.bundle.trust import HashCache
from latentc.runtimes.errors import (
    BackendUnavailable,
    BundleError,
    InputError,
    LatentcError,
)
from latentc.runtimes.pipeline.pipeline import load
from tests.support.fakes import FakeBackend, make_bundle

GRAPH = "fake-fp32/denoiser/graph.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def age(folder: Path) -> None:
    """Make files look old enough for their digests to be remembered."""
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))


def edit(bundle: Path, change: Callable[[Any], None]) -> None:
    document = json.loads((bundle / MANIFEST).read_bytes())
    change(document)
    (bundle / MANIFEST).write_text(json.dumps(document))


def test_a_whole_bundle_passes(bundle: Path) -> None:
    assert Bundle.open(bundle).check() > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text('{"graph": "decoder_"}'), "expected SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, found"),
        (lambda path: path.write_bytes(path.read_bytes() + b" "), "bytes, found"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to(path.name)), "symbolic links"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(
    bundle: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(bundle / GRAPH)
    with pytest.raises(BundleError, match=message):
        load(bundle, FakeBackend())


def test_a_symlink_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    (bundle / GRAPH).rename(outside)
    (bundle / GRAPH).symlink_to(outside)
    with pytest.raises(BundleError, match="symlink leads out"):
        load(bundle, FakeBackend())


def test_a_folder_that_is_a_symlink_out_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "fake-fp32").rename(tmp_path / "elsewhere")
    (bundle / "fake-fp32").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symlink leads out"):
        load(bundle, FakeBackend())


def test_symlinks_within_and_to_the_bundle_are_fine(bundle: Path, tmp_path: Path) -> None:
    (bundle / GRAPH).rename(bundle / "real.json")
    (bundle / GRAPH).symlink_to(bundle / "real.json")
    (tmp_path / "link").symlink_to(bundle)
    load(tmp_path / "link", FakeBackend()).close()


@pytest.mark.parametrize(
    "path", ["../outside.json", "/etc/passwd", "fake-fp32/../../x", "a\\..\\b", "C:/x", ".", "a\0"]
)
def test_an_escaping_path_is_refused(bundle: Path, path: str) -> None:
    def change(document: Any) -> None:
        document["builds"][0]["artifacts"]["denoiser"]["entry"] = path
        document["builds"][0]["artifacts"]["denoiser"]["files"][0]["path"] = path

    edit(bundle, change)
    with pytest.raises(BundleError, match="leaves the bundle or is not a plain"):
        Bundle.open(bundle)


def test_only_what_is_loaded_is_checked(bundle: Path) -> None:
    (bundle / "schedules/noisy.json").unlink()
    with load(bundle, FakeBackend()) as pipe:
        pipe("a red circle", num_inference_steps=1, output_type="latent")
        with pytest.raises(BundleError, match=r"noisy\.json: is missing"):
            pipe("a red circle", scheduler="noisy")
    with pytest.raises(BundleError, match=r"noisy\.json: is missing"):
        Bundle.open(bundle).check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"format_version": 1}'])
def test_a_broken_manifest_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"'text_encoder' takes \[\], not \['input_ids'\]"),
        (
            {"ids": {"dtype": "int64", "shape": ["batch", 6]}},
            r"'text_encoder' takes \['ids'\], not \['input_ids'\]",
        ),
        ({"input_ids": {"dtype": "int64", "shape": []}}, r"takes int64 \[\] as 'input_ids'"),
        (
            {"input_ids": {"dtype": "int64", "shape": ["batch", 6, 1]}},
            r"takes int64 \['batch', 6, 1\] as 'input_ids'",
        ),
        (
            {"input_ids": {"dtype": "int64", "shape": ["batch", 7]}},
            r"text_encoder.input_ids is \['batch', 7\], and its tokenizer gives 6 ids",
        ),
        (
            {"input_ids": {"dtype": "int64", "shape": ["batch", "length"]}},
            r"takes int64 \['batch', 'length'\] as 'input_ids'",
        ),
        (
            {"input_ids": {"dtype": "float32", "shape": ["batch", 6]}},
            r"takes float32 \['batch', 6\] as 'input_ids'",
        ),
    ],
)
def test_an_encoder_that_nothing_can_feed(
    bundle: Path, inputs: dict[str, Any], message: str
) -> None:
    edit(bundle, lambda document: document["components"][0].update(inputs=inputs, positions={}))
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({"nothing": {"input_ids": 2}}, "bad positions of 'nothing'"),
        ({"encoder_hidden_states": {}}, "bad positions of 'encoder_hidden_states'"),
        ({"encoder_hidden_states": {"nothing": 2}}, "bad positions of 'encoder_hidden_states'"),
        ({"encoder_hidden_states": {"input_ids": 0}}, "bad positions of 'encoder_hidden_states'"),
        ({"encoder_hidden_states": {"input_ids": -2}}, "bad positions"),
        ({"encoder_hidden_states": {"input_ids": 3}}, r"do not make \['batch', 6, 2\]"),
        ({"encoder_hidden_states": {"input_ids": 1.5}}, "Expected `int`"),
    ],
)
def test_positions_that_an_encoder_cannot_have(
    bundle: Path, positions: dict[str, Any], message: str
) -> None:
    edit(bundle, lambda document: document["components"][0].update(positions=positions))
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_an_unknown_version_says_what_to_do(bundle: Path) -> None:
    edit(bundle, lambda document: document.update(format_version=99))
    with pytest.raises(BundleError, match=r"format_version 99.*upgrade latentc"):
        Bundle.open(bundle)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)


# --- hashes once per machine -------------------------------------------------------------


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    real = trust.sha256

    def counting(path: str) -> str:
        hashed.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(trust, "sha256", counting)
    return hashed


def test_a_file_is_hashed_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(bundle)
    hashed = count_hashes(monkeypatch)
    load(bundle, FakeBackend()).close()
    assert len(hashed) == 4  # three graphs and the tokenizer
    load(bundle, FakeBackend()).close()
    assert len(hashed) == 4
    load(bundle, FakeBackend(), verify=True).close()
    assert len(hashed) == 8


def test_a_remembered_file_that_changes_is_hashed_again(bundle: Path) -> None:
    age(bundle)
    load(bundle, FakeBackend()).close()
    altered = (bundle / GRAPH).read_bytes().replace(b"denoiser", b"decoders")
    (bundle / GRAPH).write_bytes(altered)
    os.utime(bundle / GRAPH, (1e9, 1e9))  # the change time tells all the same
    with pytest.raises(BundleError, match="expected SHA-256"):
        load(bundle, FakeBackend())


def test_a_young_file_is_not_remembered(bundle: Path, cache: Path) -> None:
    load(bundle, FakeBackend()).close()
    assert not (cache / "hashes.json").exists()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": 1}', "\x00", "[" * 100_000])
def test_a_broken_cache_counts_as_empty(bundle: Path, cache: Path, content: str) -> None:
    age(bundle)
    cache.mkdir()
    (cache / "hashes.json").write_text(content)
    load(bundle, FakeBackend()).close()
    assert GRAPH in (cache / "hashes.json").read_text()


def test_odd_cache_entries_are_ignored(bundle: Path, cache: Path) -> None:
    age(bundle)
    real = os.path.realpath(bundle / GRAPH)
    cache.mkdir()
    for entry in (None, [], {}, [1], "x"):
        (cache / "hashes.json").write_text(json.dumps({real: entry}))
        load(bundle, FakeBackend()).close()


def test_an_unwritable_cache_is_no_obstacle(bundle: Path, cache: Path) -> None:
    age(bundle)
    cache.write_text("a file where the folder should be")
    load(bundle, FakeBackend()).close()


def test_the_cache_forgets_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_MAX_ENTRIES", 3)
    cache = HashCache(tmp_path)
    old = tmp_path / "old"
    old.write_text("x")
    os.utime(old, (1e9, 1e9))
    for index in range(5):
        cache.put(str(index), os.stat(old), str(index))
    cache.save()
    again = HashCache(tmp_path)
    assert [again.get(str(index), os.stat(old)) for index in range(5)] == [
        *(None, None), "2", "3", "4",
    ]  # fmt: skip


# --- choosing a build --------------------------------------------------------------------


class Both(FakeBackend):
    name = "both"
    targets = ("better", "fake")


class Missing(FakeBackend):
    name = "missing"
    install = "pip install missing"

    def __init__(self) -> None:
        raise ImportError("No module named 'missing'")


@pytest.fixture
def manifest(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Builds fake-fp32, fake-fp16 and better-fp16; backends missing, fake and both."""
    table = {
        "missing": f"{__name__}:Missing",
        "fake": "tests.support.fakes:FakeBackend",
        "both": f"{__name__}:Both",
    }
    classes = {"missing": Missing, "fake": FakeBackend, "both": Both}
    monkeypatch.setattr(engines, "BACKENDS", table)
    real = engines.find
    monkeypatch.setattr(engines, "find", lambda name: classes.get(name) or real(name))
    manifest = Manifest.load(bundle)
    (build,) = manifest.builds
    more = (
        msgspec.structs.replace(build, name="fake-fp16", precision="fp16"),
        build,
        msgspec.structs.replace(build, name="better-fp16", target="better", precision="fp16"),
    )
    return msgspec.structs.replace(manifest, builds=more)


@pytest.mark.parametrize(
    ("asked", "build", "backend"),
    [
        ({}, "fake-fp32", "fake"),
        ({"backend": "both"}, "better-fp16", "both"),
        ({"backend": "both", "precision": "fp32"}, "fake-fp32", "both"),
        ({"precision": "fp16"}, "fake-fp16", "fake"),
        ({"build": "better-fp16"}, "better-fp16", "both"),
        ({"build": "fake-fp16", "backend": "both"}, "fake-fp16", "both"),
    ],
)
def test_choice(manifest: Manifest, asked: dict[str, str], build: str, backend: str) -> None:
    chosen, engine = choose_build(manifest, **asked)  # type: ignore[arg-type]
    assert (chosen.name, engine.name) == (build, backend)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"build": "nope"}, "no build 'nope'; it has: fake-fp16 .fake, fp16., fake-fp32"),
        ({"precision": "int4"}, "no precision 'int4'; it has: fake-fp16"),
        ({"backend": "fake", "build": "better-fp16"}, "backend 'fake' loads builds for fake, but"),
        ({"backend": "nope"}, "no backend named 'nope'; there are: missing, fake, both"),
    ],
)
def test_a_choice_that_does_not_exist(
    manifest: Manifest, asked: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose_build(manifest, **asked)  # type: ignore[arg-type]


def test_a_backend_that_is_not_installed(manifest: Manifest) -> None:
    with pytest.raises(BackendUnavailable, match="pip install missing"):
        choose_build(manifest, "missing")


def test_no_backend_installed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BACKENDS", {"missing": "x:Missing"})
    with pytest.raises(BackendUnavailable, match="pip install missing"):
        choose_build(manifest)


def test_no_backend_known(bundle: Path) -> None:
    with pytest.raises(InputError, match="no known backend loads any"):
        choose_build(Manifest.load(bundle))


def test_a_broken_third_party_backend_is_passed_over(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"broken": "no.such.module:X", **engines.BACKENDS}
    monkeypatch.setattr(engines, "BACKENDS", table)
    assert choose_build(manifest)[1].name == "fake"


def test_a_build_with_passes_is_never_chosen_unasked(manifest: Manifest) -> None:
    """Not even if the first backend can load nothing else."""
    replace = msgspec.structs.replace
    first, *rest = manifest.builds
    fewer = replace(first, name="fewer", target="fake", precision="fp32+fewer")
    others = [replace(build, target="better") for build in rest]
    mixed = replace(manifest, builds=(fewer, *others))
    assert choose_build(mixed)[0].target == "better"
    assert choose_build(mixed, precision="fp32+fewer")[0].name == "fewer"
    assert choose_build(mixed, build="fewer")[0].name == "fewer"
    with pytest.raises(InputError, match=r"no precision 'fp32'; did you mean 'fp32.fewer'"):
        choose_build(replace(manifest, builds=(fewer,)), precision="fp32")
    with pytest.raises(InputError, match=r"ask for one by its name or precision; it has: fewer"):
        choose_build(replace(manifest, builds=(fewer,)))
    assert choose_build(replace(manifest, builds=(fewer,)), passes=True)[0].name == "fewer"


def test_a_bundle_without_builds(manifest: Manifest) -> None:
    builds: tuple[Build, ...] = ()
    with pytest.raises(InputError, match="no builds; it has: none"):
        choose_build(msgspec.structs.replace(manifest, builds=builds))


# --- hostile manifests -------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        [
            *("", "a", "batch", "0*height", "latents", "sample", "é", "..", "1e9", "x" * 99),
            *("prompt", "_image", "noise", "loop", "numbers", "guidance_scale", "-height"),
        ]
    ),
)
LISTS = st.lists(SCALARS, max_size=3)
VALUES = st.one_of(SCALARS, LISTS, st.dictionaries(st.text(max_size=5), SCALARS, max_size=2))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON document can be edited."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            found += places(inner, (*path, key))
    return found


def edited(document: Any, data: st.DataObject) -> Any:
    document = deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3), "edits")):
        known = places(document)
        path = data.draw(st.sampled_from(known), "path")
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["replace", "delete", "copy", "double"]), "action")
        if action == "replace":
            parent[path[-1]] = data.draw(VALUES, "value")
        elif action == "delete":
            del parent[path[-1]]
        elif action == "copy":
            source = document
            for key in data.draw(st.sampled_from(known), "from"):
                source = source[key]
            parent[path[-1]] = deepcopy(source)
        elif isinstance(parent, list):
            parent.append(deepcopy(parent[path[-1]]))
    return document


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")
    return folder, json.loads((folder / MANIFEST).read_bytes())


@settings(max_examples=400)
@given(data=st.data())
def test_an_edited_manifest_is_refused_or_runs(kept: tuple[Path, Any], data: st.DataObject) -> None:
    """Decoding raises BundleError or nothing; what decodes runs, or raises a LatentcError."""
    folder, document = kept
    text = json.dumps(edited(document, data)).encode()
    try:
        Manifest.decode(text)
    except BundleError:
        return
    (folder / MANIFEST).write_bytes(text)
    try:
        with load(folder, FakeBackend()) as pipe:
            pipe("a red circle", num_inference_steps=1, height=8, width=8)
    except LatentcError:
        return


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_manifest_is_refused(kept: tuple[Path, Any], data: st.DataObject) -> None:
    """Bytes cut, changed or inserted anywhere."""
    content = bytearray(json.dumps(kept[1]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
    try:
        Manifest.decode(bytes(content))
    except BundleError:
        return
