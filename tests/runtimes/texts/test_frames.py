"""A tokenizer puts around a text what the manifest says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.errors import BundleError
from latentc.runtimes.pipeline.pipeline import load
from latentc.runtimes.texts.prompt_weights import unweighted
from latentc.runtimes.texts.tokenizer import Frame, TextTokenizer, frame_of
from tests.support.fakes import MAX_LENGTH, WORDS, FakeBackend, make_bundle, word_tokenizer

BEGIN, END, PAD = 1, 2, 0


def like_clip() -> Any:
    """Return a tokenizer that fills rows with the id that ends a text, as CLIP's does."""
    made = word_tokenizer()
    made.enable_padding(length=MAX_LENGTH, pad_id=END, pad_token="</s>")
    return made


def like_t5() -> Any:
    """Return a tokenizer that puts nothing before a text, as T5's does."""
    from tokenizers import processors

    made = word_tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    return made


def bare() -> Any:
    """Return a tokenizer that puts nothing around a text."""
    from tokenizers import processors

    made = word_tokenizer()
    made.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return made


KINDS: dict[str, tuple[Callable[[], Any], Frame]] = {
    "words": (word_tokenizer, Frame((BEGIN,), (END,), PAD)),
    "CLIP": (like_clip, Frame((BEGIN,), (END,), END)),
    "T5": (like_t5, Frame((), (END,), PAD)),
    "bare": (bare, Frame((), (), PAD)),
}
TEXTS = (
    "",
    "a",
    "a red circle",
    "a large red circle a large blue square",
    "unknown words </s> <s>",
)


def rows(tokenizer: Any, text: str) -> list[tuple[list[int], int]]:
    """Return the ids of each chunk of a text, and how many of them are no filling."""
    encoding = tokenizer.encode(text)
    pieces = [encoding, *encoding.overflowing]
    return [(piece.ids, sum(piece.attention_mask)) for piece in pieces]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_tokenizer_puts_around_a_text(name: str) -> None:
    make, frame = KINDS[name]
    assert frame_of(make()) == frame


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", KINDS)
def test_every_row_is_in_its_frame(name: str, text: str) -> None:
    make, frame = KINDS[name]
    for ids, used in rows(make(), text):
        assert frame.holds(ids, used)


@pytest.mark.parametrize("name", KINDS)
def test_every_row_of_a_text_is_in_no_other_frame(name: str) -> None:
    make, frame = KINDS[name]
    others = [
        Frame((3, *frame.before), frame.after, frame.pad),
        Frame(frame.before, (*frame.after, 3), frame.pad),
        Frame(frame.before, frame.after, 3),
        Frame((3,) * MAX_LENGTH, (3,) * MAX_LENGTH, frame.pad),
    ]
    ((ids, used),) = rows(make(), "a")
    assert used < MAX_LENGTH
    assert not any(other.holds(ids, used) for other in others)


@pytest.mark.parametrize(
    ("ids", "used", "holds"),
    [
        ((1, 4, 2, 2, 2, 2), 3, True),
        ((1, 2, 2, 2, 2, 2), 2, True),  # no text at all
        ((1, 4, 4, 4, 4, 2), 6, True),  # no filling at all
        ((1, 4, 2, 2, 2, 0), 3, False),
        ((1, 4, 2, 2, 2, 2), 2, False),  # ends before its end
        ((2, 4, 2, 2, 2, 2), 3, False),
        ((1, 2, 2, 2, 2, 2), 1, False),  # one id cannot both begin and end a text
        ((1, 2, 2, 2, 2, 2), 0, False),
    ],
)
def test_rows_that_are_filled_with_what_ends_a_text(
    ids: tuple[int, ...], used: int, holds: bool
) -> None:
    assert Frame((BEGIN,), (END,), END).holds(ids, used) is holds


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_is_loaded_with_its_own_frame(name: str, tmp_path: Path) -> None:
    make, frame = KINDS[name]
    make().save(str(tmp_path / "tokenizer.json"))
    for kind, (_, other) in KINDS.items():
        if other.before > frame.before or other.after > frame.after or other.pad != frame.pad:
            with pytest.raises(BundleError, match="frames or fills a text otherwise"):
                TextTokenizer.load(
                    tmp_path / "tokenizer.json", MAX_LENGTH, vocabulary=len(WORDS), frame=other
                )
        elif kind == name:
            made = TextTokenizer.load(
                tmp_path / "tokenizer.json", MAX_LENGTH, vocabulary=len(WORDS), frame=frame
            )
            for text in TEXTS:
                assert made.chunks(unweighted(text), most=3)


@pytest.mark.parametrize(
    "change", [{"before": [3]}, {"after": [3]}, {"pad": 3}, {"before": [1, 1]}], ids=str
)
def test_a_bundle_whose_tokenizer_frames_otherwise(tmp_path: Path, change: dict[str, Any]) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["tokenizers"][0] |= change
    (bundle / MANIFEST).write_text(json.dumps(document))
    Manifest.load(bundle)
    with pytest.raises(BundleError, match="frames or fills a text otherwise than the manifest"):
        load(bundle, FakeBackend())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"before": [1] * 7}, "at most 6 ids before and after"),
        ({"before": [1] * 4, "after": [2] * 3}, "at most 6 ids before and after"),
        ({"before": [len(WORDS)]}, f"all below {len(WORDS)}"),
        ({"after": [-1]}, f"all below {len(WORDS)}"),
        ({"pad": len(WORDS)}, f"all below {len(WORDS)}"),
        ({"vocabulary": None, "pad": 1 << 31}, "all below 2147483648"),
        ({"before": [0.5]}, "Expected `int`"),
        ({"max_length": 0}, "a length from 1"),
        ({"max_length": 1 << 17, "before": [1] * 9}, "a length from 1 to 65536"),
        ({"vocabulary": 0}, "vocabulary must be from 1"),
        ({"name": "other"}, "no tokenizer 'tokenizer'"),
        ({"max_length": 5}, "its tokenizer gives 5 ids"),
    ],
)
def test_tokenizers_that_a_manifest_may_not_describe(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["tokenizers"][0] |= change
    (bundle / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=says):
        Manifest.load(bundle)


@pytest.mark.parametrize("part", ["before", "after"])
def test_a_frame_that_the_manifest_leaves_out(part: str, tmp_path: Path) -> None:
    """Ids that stand around each text, of which the manifest says nothing."""
    bundle = make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["tokenizers"][0][part] = []
    (bundle / MANIFEST).write_bytes(json.dumps(document).encode())
    with pytest.raises(BundleError, match="frames or fills a text otherwise"):
        load(bundle, FakeBackend())
