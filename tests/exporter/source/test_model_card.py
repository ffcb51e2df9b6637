"""A bundle holds what a source says of itself, which never stops or changes an export."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from msgspec import structs
from safetensors.numpy import save_file

from latentc.exporter.compiler.export import export
from latentc.exporter.source import model_card
from latentc.exporter.source import resolving as source
from latentc.exporter.source.model_card import CARD, Card, of_checkpoint, of_folder
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.rules import LONGEST_SAID, MOST_BASE_MODELS
from latentc.runtimes.errors import BundleError
from tests.conftest import Run
from tests.support import fakes

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
NOTHING = Card()
SAYS_NOTHING = "the bundle may lack the licence, author and base model"


@contextmanager
def silently() -> Iterator[None]:
    """Inside, a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def card(folder: Path, text: str) -> Path:
    (folder / CARD).write_text(text, encoding="utf-8")
    return folder


def said(folder: Path, metadata: str) -> Card:
    """Return what a card with a block of YAML says, without a warning."""
    with silently():
        return of_folder(card(folder, f"---\n{metadata}\n---\n# A model\n\nIts text.\n"))


CARDS = {
    "license: mit\nauthor: Ada\nbase_model: owner/base": Card("mit", "Ada", ("owner/base",)),
    "license: [mit, apache-2.0]\nauthors: [Ada, Bob]": Card("mit, apache-2.0", "Ada, Bob"),
    "base_model:\n- a/one\n- b/two": Card(base_model=("a/one", "b/two")),
    "license: other\nlicense_name: own\nlicense_link: https://a.b/c?d=1&e=2": Card(
        "own (https://a.b/c?d=1&e=2)"
    ),
    "license: other\nlicense_name: own": Card("own"),
    "license: other\nlicense_link: LICENSE.md": Card("other (LICENSE.md)"),
    f"license: other\nlicense_name: own\nlicense_link: {'x' * 300}": Card("own"),
    "license: mit\nlicense_name: own": Card("mit"),
    "license: ' a\n\n  b '": Card("a b"),
    "license: no\nauthor: 5\nbase_model: {a: b}": NOTHING,
    "license:\nauthor: ''\nbase_model: [1, null, '']": NOTHING,
    "tags: [a, b]\nmodel-index: nonsense\neval_results: 3": NOTHING,
    'license: "\\ud800x"': Card("?x"),
}


@pytest.mark.parametrize("metadata", CARDS)
def test_what_a_card_says(metadata: str, tmp_path: Path) -> None:
    assert said(tmp_path, metadata) == CARDS[metadata]


@pytest.mark.parametrize(
    "text", ["", "# A model\n", "---\nlicense: mit\n", "text\n---\nlicense: mit\n---\n"]
)
def test_a_card_without_metadata(text: str, tmp_path: Path) -> None:
    with silently():
        assert of_folder(card(tmp_path, text)) == NOTHING


def test_no_card(tmp_path: Path) -> None:
    with silently():
        assert of_folder(tmp_path) == NOTHING
        assert of_folder(tmp_path, "owner") == Card(author="owner")


def test_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\ntext\r\n")
    with silently():
        assert of_folder(tmp_path) == Card("mit")


def test_texts_are_bounded(tmp_path: Path) -> None:
    models = "".join(f"\n- {'m' * 300}{i}" for i in range(40))
    found = said(tmp_path, f"license: {'x' * 300}\nauthor: {'y' * 200}\nbase_model:{models}")
    assert found.licence == "x" * (LONGEST_SAID - 1) + "…"
    assert found.author == "y" * LONGEST_SAID
    assert [len(each) for each in found.base_model] == [LONGEST_SAID] * MOST_BASE_MODELS


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_gigabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def holding(data: bytes) -> Callable[[Path], None]:
    """Return a function that writes a card with this as its metadata."""

    def make(path: Path) -> None:
        path.write_bytes(b"---\n" + data + b"\n---\n")

    return make


MERGED = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i + 1}: &a{i + 1} {{<<: [{f'*a{i},' * 50}]}}" for i in range(9))]
)
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (a_fifo, "expected a regular file, found a FIFO"),
    "a folder": (a_folder, "expected a regular file, found a folder"),
    "a gigabyte": (a_gigabyte, "expected at most 1,048,576 bytes"),
    "no YAML": (holding(b"license: [mit"), "while parsing a flow sequence"),
    "a tag": (holding(b"license: !!python/object/apply:os.getpid []"), "constructor"),
    "no table": (holding(b"- mit"), "should be a dict"),
    "no names": (holding(b"1: 2"), "keywords must be strings"),
    "no text": (holding(b"\xff\xfe"), "decode"),
    "deep": (holding(b"license: " + b"[" * 30_000), "nested too deeply"),
    "long": (holding(b"license: mit\n" + b"x: y\n" * 20_000), "more than 65,536 characters"),
    "merged without end": (holding(MERGED.encode()), "anchors"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_card_is_warned_of(kind: str, tmp_path: Path) -> None:
    make, message = DAMAGED[kind]
    make(tmp_path / CARD)
    with pytest.warns(UserWarning, match=message) as caught:
        assert of_folder(tmp_path, "owner") == Card(author="owner")
    (only,) = caught
    assert str(tmp_path / CARD) in str(only.message)
    assert str(only.message).endswith(SAYS_NOTHING)
    assert "\n" not in str(only.message)


def test_a_checkpoint_of_one_file(tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", {"a": np.zeros(2, np.float32)}
    metadata = {"license": "mit", "author": "Ada", "merged_from": "a/one, b/two,"}
    save_file(tensors, path, {f"modelspec.{name}": text for name, text in metadata.items()})
    with silently():
        assert of_checkpoint(path) == Card("mit", "Ada", ("a/one", "b/two"))
        save_file(tensors, path)
        assert of_checkpoint(path) == NOTHING
        save_file(tensors, path, {"modelspec.license": "x" * 1000})
        assert of_checkpoint(path).licence == "x" * (LONGEST_SAID - 1) + "…"
        assert of_checkpoint(tmp_path / "pickle.ckpt") == NOTHING
    path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=SAYS_NOTHING):
        assert of_checkpoint(path) == NOTHING


def test_the_card_of_a_configuration_is_another_models(smallest: Path, tmp_path: Path) -> None:
    """A checkpoint of one file may be anybody's, whoever made the pipeline that configures it."""
    config = card(Path(shutil.copytree(smallest, tmp_path / "config")), "---\nlicense: mit\n---\n")
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, path, {"modelspec.author": "Ada"})
    assert source.resolve(config).card == Card("mit")
    assert source.resolve(path, config=str(config)).card == Card(author="Ada")


# The Hub, which is not there


def absent(error: type[Exception]) -> Exception:
    made = error.__new__(error)
    made.args = ("no such file",)
    return made


def from_hub(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, got: str | Exception
) -> Card:
    """Return what a pipeline on the Hub says whose card is the text `got`, or cannot be had."""
    folder = Path(shutil.copytree(smallest, tmp_path / "snapshots" / "abc"))
    asked: list[Any] = []

    def download(place: str, filename: str, **options: Any) -> str:
        if filename != CARD:
            return str(folder / filename)
        asked.append((place, options.get("revision")))
        if isinstance(got, Exception):
            raise got
        if options.get("dry_run"):
            raise ConnectionError("nobody says how large it is")
        card(folder, got)
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: folder)
    found = source.resolve("owner/name").card
    assert set(asked) == {("owner/name", "abc")}
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n", Card("mit", "owner")),
        ("---\nauthor: Ada\n---\n", Card(None, "Ada")),
        ("# A model\n", Card(author="owner")),
    ],
)
def test_a_card_on_the_hub(
    text: str, expected: Card, smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silently():
        assert from_hub(smallest, tmp_path, monkeypatch, text) == expected


def test_no_card_on_the_hub(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silently():
        found = from_hub(smallest, tmp_path, monkeypatch, absent(RemoteEntryNotFoundError))
    assert found == Card(author="owner")


@pytest.mark.parametrize("error", [ConnectionError, LocalEntryNotFoundError])
def test_a_card_that_cannot_be_had(
    error: type[Exception], smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="the model card of owner/name could not be had: no such"):
        found = from_hub(smallest, tmp_path, monkeypatch, absent(error))
    assert found == Card(author="owner")


# Exports and manifests


def test_a_changed_card_makes_another_manifest_alone(
    smallest: Path, smallest_bundle: Path, tmp_path: Path, run: Run
) -> None:
    """The bundle's files stay as they are, and nothing is refused as a changed source."""
    folder, bundle = Path(shutil.copytree(smallest, tmp_path / "model")), tmp_path / "bundle"
    card(folder, "---\nlicense: mit\nbase_model: a/b\n---\n")
    settings: dict[str, Any] = {"schedulers": ("ddim",), "steps": (2,), "verify": False}
    first = export(folder, bundle, **settings, share_with=smallest_bundle)
    assert first.made
    recorded = first.manifest.source
    assert (recorded.licence, recorded.author, recorded.base_model) == ("mit", None, ("a/b",))

    before = files_of(bundle)
    assert export(folder, bundle, **settings).manifest == first.manifest
    assert files_of(bundle) == before

    card(folder, "---\nlicense: apache-2.0\nauthor: Ada\n---\n")
    again = export(folder, bundle, **settings)
    assert not again.made
    changed = structs.replace(recorded, licence="apache-2.0", author="Ada", base_model=())
    assert again.manifest == structs.replace(first.manifest, source=changed)
    assert Manifest.load(bundle) == again.manifest
    after = files_of(bundle)
    assert {name for name in before if after[name] != before[name]} == {MANIFEST}
    assert after.keys() == before.keys()

    (folder / CARD).unlink()
    os.mkfifo(folder / CARD)
    more = ("--no-verify", "--steps", "2", "--scheduler", "ddim", "-q")
    code, out, errors = run("export", folder, "-o", bundle, *more)
    assert code == 0, errors
    assert "is up to date" in out + errors
    assert len([line for line in errors.splitlines() if SAYS_NOTHING in line]) == 1
    assert Manifest.load(bundle).source.licence is None


def files_of(bundle: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of each file."""
    return {
        path.relative_to(bundle).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in bundle.rglob("*")
        if path.is_file()
    }


def with_card(folder: Path, said: Card) -> Path:
    """A bundle whose source says this of itself."""
    bundle = fakes.make_bundle(folder)
    manifest = Manifest.load(bundle)
    source = structs.replace(
        manifest.source, licence=said.licence, author=said.author, base_model=said.base_model
    )
    (bundle / MANIFEST).write_bytes(structs.replace(manifest, source=source).encode())
    return bundle


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    said = Card("x" * LONGEST_SAID, "Ada\x1b", ("a/b",) * MOST_BASE_MODELS)
    source = Manifest.load(with_card(tmp_path / "bundle", said)).source
    assert Card(source.licence, source.author, source.base_model) == said


def test_a_manifest_of_before_says_nothing(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / MANIFEST).read_bytes())
    for name in ("licence", "author", "base_model"):
        del document["source"][name]
    (bundle / MANIFEST).write_text(json.dumps(document))
    source = Manifest.load(bundle).source
    assert (source.licence, source.author, source.base_model) == (None, None, ())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Card("x" * 201), "source.licence has 201 characters, more than 200"),
        (Card(author="x" * 201), "source.author has 201 characters, more than 200"),
        (Card(base_model=("a", "x" * 201)), "source.base_model has 201 characters"),
        (Card(base_model=("a",) * 33), "source.base_model names 33, more than 32"),
    ],
)
def test_a_manifest_that_says_too_much(said: Card, message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.load(with_card(tmp_path / "bundle", said))


def test_inspect_shows_what_is_known(tmp_path: Path, run: Run) -> None:
    bundle = with_card(tmp_path / "whole", Card("own (LICENSE.md)", "Ada", ("a/one", "b/two")))
    _, out, _ = run("inspect", bundle)
    for row in (r"Licence +own \(LICENSE.md\)", "Author +Ada", "Base model +a/one, b/two"):
        assert re.search(row, out), row
    _, out, _ = run("inspect", bundle, "--json")
    assert json.loads(out)["source"]["base_model"] == ["a/one", "b/two"]
    _, out, _ = run("inspect", fakes.make_bundle(tmp_path / "silent"))
    assert not re.search("Licence|Author|Base model", out)


def test_escape_sequences_of_a_card_reach_no_terminal(tmp_path: Path, run: Run) -> None:
    hostile = r'"\e]0;title\a\e[2Jmit\u202e\nerror: x"'
    found = said(tmp_path, f"license: {hostile}\nauthor: {hostile}\nbase_model: [{hostile}]")
    assert "\x1b" in (found.licence or "")
    for more in ((), ("--json",)):
        code, out, errors = run("inspect", with_card(tmp_path / "bundle", found), *more)
        assert code == 0, errors
        assert not STEERING.search(out)
        assert "mit" in out
        assert not re.search(r"^\s*error:", out, re.MULTILINE)


def test_the_card_changes_no_digest(smallest: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    before = source.resolve(folder)
    after = source.resolve(card(folder, "---\nlicense: mit\n---\n"))
    assert before.card == NOTHING != after.card
    assert model_card.CARD not in after.digests
    assert (before.fingerprint, before.digests) == (after.fingerprint, after.digests)
