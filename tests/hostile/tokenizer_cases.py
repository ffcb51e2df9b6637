"""Tokenizers that are broken, or that kill or hang the process that loads or uses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.hostile.bad_bundle import BadBundle, case


def _edit(bad: BadBundle, change: Callable[[Any], object]) -> None:
    path = bad.tokenizer()
    document = json.loads(bad.read(path))
    change(document)
    bad.put(path, json.dumps(document).encode())


@case("tokenizer", "tokenizer")
def tokenizer_not_json(bad: BadBundle) -> None:
    """The tokenizer's file is no JSON."""
    bad.put(bad.tokenizer(), b"\0\1\2 no tokenizer")


@case("tokenizer", "tokenizer")
def tokenizer_empty(bad: BadBundle) -> None:
    """The tokenizer's file is an empty object."""
    bad.put(bad.tokenizer(), b"{}")


@case("tokenizer", "tokenizer")
def tokenizer_deep(bad: BadBundle) -> None:
    """The tokenizer's file is 200,000 arrays, each in the one before."""
    bad.put(bad.tokenizer(), b"[" * 200_000 + b"]" * 200_000)


@case("tokenizer", "tokenizer")
def tokenizer_padding_of_a_billion(bad: BadBundle) -> None:
    """Every text is padded to 10^9 ids, which aborts the process."""
    _edit(bad, lambda document: document["padding"].update(strategy={"Fixed": 10**9}))


@case("tokenizer", "tokenizer")
def tokenizer_padding_to_a_multiple_of_a_billion(bad: BadBundle) -> None:
    """Every text is padded to a multiple of 10^9 ids."""
    _edit(bad, lambda document: document["padding"].update(pad_to_multiple_of=10**9))


def _replacing(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


@case("tokenizer", "tokenizer")
def tokenizer_growing_text(bad: BadBundle) -> None:
    """Nine normalisers, each of which makes sixteen letters of one."""
    steps = [_replacing("a", "a" * 16) for _ in range(9)]
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a"}, *steps]}
    _edit(bad, lambda document: document.update(normalizer=normalizer))


@case("tokenizer", "tokenizer")
def tokenizer_growing_empty_text(bad: BadBundle) -> None:
    """A normaliser that puts a mebibyte wherever nothing stands."""
    step = {"type": "Replace", "pattern": {"Regex": "^"}, "content": "a" * (1 << 20)}
    normalizer = {"type": "Sequence", "normalizers": [step, _replacing("a", "a" * 4096)]}
    _edit(bad, lambda document: document.update(normalizer=normalizer))


@case("tokenizer", "tokenizer")
def tokenizer_of_another_length(bad: BadBundle) -> None:
    """The tokenizer pads and cuts to other lengths than the manifest says."""

    def change(document: Any) -> None:
        document["padding"]["strategy"] = {"Fixed": 12}
        document["truncation"]["max_length"] = 12

    _edit(bad, change)


@case("tokenizer", "tokenizer")
def tokenizer_without_truncation(bad: BadBundle) -> None:
    """The tokenizer does not cut: long texts have more ids than the encoder takes."""
    _edit(bad, lambda document: document.update(truncation=None))


@case("tokenizer", "tokenizer")
def tokenizer_truncation_of_nothing(bad: BadBundle) -> None:
    """The tokenizer cuts texts to no ids at all, framed by two."""

    def change(document: Any) -> None:
        document["truncation"].update(max_length=1, stride=5)

    _edit(bad, change)


@case("tokenizer", "tokenizer")
def tokenizer_ids_beyond_the_vocabulary(bad: BadBundle) -> None:
    """An id of the tokenizer is no row of the text encoder's table."""

    _edit(bad, lambda document: document["padding"].update(pad_id=10**6))


@case("tokenizer", "tokenizer")
def tokenizer_id_just_beyond_the_vocabulary(bad: BadBundle) -> None:
    """An id of the tokenizer is the number of rows of the text encoder's table."""
    words = bad.document()["tokenizers"][0]["vocabulary"]
    _edit(bad, lambda document: document["padding"].update(pad_id=words))


@case("manifest", "vocabulary")
def manifest_vocabulary_of_nothing(bad: BadBundle) -> None:
    """The encoder has embeddings for no id."""
    bad.set("tokenizers.0.vocabulary", 0)
