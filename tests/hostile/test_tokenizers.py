"""Tokenizers that would kill or hang the process, each tried in a process of its own kind."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentc.runtimes.bundle.manifest import MANIFEST
from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.pipeline.pipeline import load
from latentc.runtimes.texts.prompt_weights import unweighted
from latentc.runtimes.texts.regular_expressions import read_pattern
from latentc.runtimes.texts.tokenizer import TextTokenizer
from latentc.runtimes.texts.tokenizer_rules import LONGEST_TEXT
from tests.support.fakes import MAX_LENGTH, WORDS, FakeBackend, make_bundle, word_tokenizer

Document = dict[str, Any]
DEEP = 200_000

# What is run elsewhere: the old reader did not come back from some of these.
TRY = f"""
import sys
from pathlib import Path
from latentc.runtimes.errors import BundleError
from latentc.runtimes.texts.tokenizer import TextTokenizer
for path in sys.argv[1:]:
    try:
        TextTokenizer.load(Path(path), {MAX_LENGTH}).encode(["a red circle " * 20, "a" * 400])
        print(Path(path).name, "taken", flush=True)
    except BundleError:
        print(Path(path).name, "refused", flush=True)
"""


def good() -> Document:
    """Return the document of a tokenizer of words."""
    made: Document = json.loads(word_tokenizer().to_str())
    return made


def replace(content: str, **pattern: str) -> Document:
    """Return a normalizer that replaces."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: Document, inner: str = "normalizers") -> Document:
    """Return several parts as one."""
    return {"type": "Sequence", inner: list(parts)}


def nested(depth: int) -> Document:
    """Return parts in one another."""
    made: Document = {"type": "NFC"}
    for _ in range(depth):
        made = sequence(made)
    return made


def split(pattern: str) -> Document:
    """Return a pre-tokenizer that splits at a pattern."""
    made = {"type": "Split", "pattern": {"Regex": pattern}}
    return made | {"behavior": "Isolated", "invert": False}


def template(sequences: int, ids: int) -> Document:
    """Return what puts a text several times, and ids, into the result."""
    single: list[Document] = [{"Sequence": {"id": "A", "type_id": 0}}] * sequences
    single.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    tokens = {"id": "</s>", "ids": [2] * ids, "tokens": ["</s>"] * ids}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    made = {"type": "TemplateProcessing", "single": single, "pair": pair}
    return made | {"special_tokens": {"</s>": tokens}}


def charsmap(longest: int) -> str:
    """Return a map of characters in which one becomes so many."""
    return base64.b64encode(b"\0" * 4 + b"a\0" + b"x" * longest + b"\0").decode()


def unigram(longest: int) -> Document:
    """Return a model whose tokens begin with one another."""
    vocabulary = [["<unk>", 0.0], *(["a" * n, -float(n)] for n in range(1, longest))]
    return {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False}


GROWING = sequence(*(replace("a" * 16, String="a") for _ in range(9)))
GROWTH = "rules that replace grow a text without a bound"
PADDING = "padding and truncation to lengths that no memory holds"
PATTERNS = "patterns that take exponential time"
PARTS = "parts of a tokenizer that are too many, too deep or not known"
CHANGES: dict[str, tuple[str, Document]] = {
    "padding of fixed length": (PADDING, {"padding/strategy": {"Fixed": 10**9}}),
    "padding to a multiple": (PADDING, {"padding/pad_to_multiple_of": 10**9}),
    "no padding": (PADDING, {"padding": None}),
    "no truncation": (PADDING, {"truncation": None}),
    "another truncation": (PADDING, {"truncation/max_length": 10**9}),
    "short pieces": (PADDING, {"truncation/max_length": 3}),
    "a stride": (PADDING, {"truncation/stride": 3}),
    "a negative length": (PADDING, {"truncation/max_length": -1}),
    "nine that grow": (GROWTH, {"normalizer": GROWING}),
    "a long replacement": (GROWTH, {"normalizer": replace("b" * 1000, String="a")}),
    "replacing nothing": (GROWTH, {"normalizer": replace("b" * 100, Regex="x*")}),
    "an empty pattern": (GROWTH, {"normalizer": replace("b", String="")}),
    "bytes of bytes": (GROWTH, {"normalizer": sequence(*[{"type": "ByteLevel"}] * 20)}),
    "bytes in parts": (
        GROWTH,
        {"pre_tokenizer": sequence(*[split("a")] * 40, inner="pretokenizers")},
    ),
    "a long beginning": (GROWTH, {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}),
    "a map of characters": (
        GROWTH,
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(1000)}},
    ),
    "a damaged map": (
        PARTS,
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA!"}},
    ),
    "texts in a template": (GROWTH, {"post_processor": template(100, 1)}),
    "ids in a template": (GROWTH, {"post_processor": template(1, 10**4)}),
    "exponential": (PATTERNS, {"pre_tokenizer": split("(a+)+$")}),
    "exponential when replacing": (PATTERNS, {"normalizer": replace(" ", Regex="(a|a)*b")}),
    "choices": (PATTERNS, {"pre_tokenizer": split("(?:a|a)" * 30 + "b")}),
    "optional parts": (PATTERNS, {"pre_tokenizer": split("a?" * 30 + "a" * 30)}),
    "polynomial": (PATTERNS, {"pre_tokenizer": split("a*a*a*a*a*b")}),
    "back references": (PATTERNS, {"pre_tokenizer": split(r"(a*)\1*b")}),
    "an unknown part": (PARTS, {"normalizer": {"type": "Odd"}}),
    "many parts": (PARTS, {"normalizer": sequence(*[{"type": "NFC"}] * 1000)}),
    "parts in one another": (PARTS, {"normalizer": nested(30)}),
    "a part without a kind": (PARTS, {"normalizer": {"pattern": {"String": "a"}}}),
    "tokens that begin with one another": (PARTS, {"model": unigram(2000)}),
    "merges at random": (
        PARTS,
        {"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}},
    ),
    "long words": (
        PARTS,
        {
            "model": {
                **{"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
                **{"max_input_chars_per_word": 10**9, "vocab": {"[UNK]": 0, "a": 1}},
            }
        },
    ),
    "many patterns that go back": (
        "patterns that take long, one after the other",
        {
            "normalizer": sequence(*[replace("", Regex=r"\p{L}*\d")] * 16),
            "pre_tokenizer": split(r"\p{L}*\d"),
        },
    ),
    "long added words": (
        PARTS,
        {
            "added_tokens": [
                {
                    **{"id": 10, "content": "a" * 10**5, "single_word": False, "lstrip": False},
                    **{"rstrip": False, "normalized": True, "special": False},
                }
            ]
        },
    ),
}


def changed(changes: Document) -> Document:
    """Return the document with some of its parts, by their ways, replaced."""
    made = copy.deepcopy(good())
    for way, value in changes.items():
        *parents, last = way.split("/")
        place = made
        for name in parents:
            place = place[name]
        place[last] = value
    return made


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what became of each file, in one process that has a minute for all."""
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = []
    for name, (_, changes) in CHANGES.items():
        paths.append(folder / name)
        paths[-1].write_text(json.dumps(changed(changes)))
    deep = folder / "deep"
    deep.write_text(json.dumps(good()).replace('"normalizer": ', '"normalizer": ' + "[" * DEEP, 1))
    command = [sys.executable, "-c", TRY, *map(str, [*paths, deep])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        lines = done.stdout
    except subprocess.TimeoutExpired as expired:
        lines = (expired.stdout or b"").decode()
    return dict(line.rsplit(" ", 1) for line in lines.splitlines())


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(n, marks=pytest.mark.fault("1.5", c)) for n, (c, _) in CHANGES.items()),
        "deep",
    ],
)
def test_it_is_refused(outcomes: dict[str, str], name: str) -> None:
    assert outcomes.get(name) == "refused"


def test_the_good_one_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(good()))
    ids = TextTokenizer.load(path, MAX_LENGTH).encode(["a red circle"])
    assert ids.tolist() == [word_tokenizer().encode("a red circle").ids]


@pytest.mark.parametrize(
    "change",
    [
        {
            "normalizer": sequence(
                {"type": "NFC"}, replace(" ", Regex=r"\s+"), {"type": "Lowercase"}
            )
        },
        {
            "normalizer": sequence(
                {"type": "Precompiled", "precompiled_charsmap": charsmap(18)},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                replace("\u2581", Regex=" {2,}"),
            )
        },
        {"pre_tokenizer": split(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")},
        {"pre_tokenizer": split(r"[\r\n]|\s?[A-Za-zµ]+|\s?[^\s\w]+|[一-龥]{1,16}")},
    ],
    ids=["CLIP", "T5", "letters", "others"],
)
def test_what_well_known_tokenizers_do_is_taken(tmp_path: Path, change: Document) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed(change)))
    if "Precompiled" not in path.read_text():  # the map here has no index
        TextTokenizer.load(path, MAX_LENGTH)
    else:
        from latentc.runtimes.texts.tokenizer_rules import checked

        checked(path.read_bytes(), MAX_LENGTH)


@pytest.mark.fault("1.5", "texts of any length")
@pytest.mark.parametrize("text", ["a" * (LONGEST_TEXT + 1), "<a> " * (LONGEST_TEXT // 4)])
def test_texts_have_a_largest_length(text: str) -> None:
    tokenizer = TextTokenizer(word_tokenizer(), MAX_LENGTH, "words", {"<a>": "b " * 10_000})
    with pytest.raises(InputError, match=f"at most {LONGEST_TEXT} can be read"):
        tokenizer.chunks(unweighted(text))


@pytest.mark.fault("1.5", "ids beyond any vocabulary")
def test_ids_beyond_any_vocabulary(tmp_path: Path) -> None:
    document = good()
    document["model"]["vocab"]["red"] = (1 << 32) - 1
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match="gives the id 4294967295, and the text encoder has"):
        TextTokenizer.load(path, MAX_LENGTH).encode(["a red circle"])


@pytest.mark.fault("1.5", "ids beyond the text encoder's embeddings")
@pytest.mark.parametrize("rows", [len(WORDS) - 1, len(WORDS)])
def test_ids_beyond_the_embeddings(tmp_path: Path, rows: int) -> None:
    """Engines take such an id for another row, or for zeros, without a word."""
    bundle = make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["tokenizers"][0]["vocabulary"] = rows
    (bundle / MANIFEST).write_text(json.dumps(document))
    with load(bundle, FakeBackend()) as pipe:
        pipe("a red circle", num_inference_steps=2)
        if rows == len(WORDS):
            pipe(WORDS[-1], num_inference_steps=2)
            return
        with pytest.raises(BundleError, match=f"gives the id {rows}, .* has {rows} embeddings"):
            pipe(WORDS[-1], num_inference_steps=2)


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        *(("a", 1), ("ab?", 1), ("a*", 0), (r"\s+", 1), ("a|bcd", 1), (r"\bab", 2), ("(ab){2}", 4)),
        *((r"\s+(?!\S)", 1), (r"[a-z\]]+", 1), (r"\p{L}{2,3}", 2), ("(?:a|)", 0), ("", 0)),
    ],
)
def test_how_much_a_pattern_matches_at_least(pattern: str, least: int) -> None:
    assert read_pattern(pattern).least == least


@given(st.text(alphabet=r"ab()[]{}|*+?\^$,12p:=!", max_size=12))
def test_patterns_that_are_taken_take_little_time(pattern: str) -> None:
    """Python's engine goes back as the library's does: whatever is taken ends on a long text."""
    import re

    try:
        read_pattern(pattern)
        compiled = re.compile(pattern)
    except (ValueError, re.error, OverflowError):
        return
    sum(1 for _ in compiled.finditer("a" * 300 + "c"))
