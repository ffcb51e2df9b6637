"""Text to ids: padding, cutting with a warning, and files that are no tokenizers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import latentc
from latentc.runtimes.errors import BundleError
from latentc.runtimes.texts.prompt_weights import escape, parse, unweighted
from latentc.runtimes.texts.tokenizer import PromptTruncatedWarning, TextTokenizer
from tests.support.fakes import MAX_LENGTH, word_tokenizer

_MODEL = Path(latentc.builtin_model()) / "tokenizer" / "tokenizer.json"


def clip() -> TextTokenizer:
    """The built-in model's."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(_MODEL))
    loaded.enable_truncation(77)
    end = loaded.token_to_id("<|endoftext|>")
    loaded.enable_padding(length=77, pad_id=end, pad_token="<|endoftext|>")
    return TextTokenizer(loaded, 77, "clip")


CLIP = clip()
END = CLIP._tokenizer.token_to_id("<|endoftext|>")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer.load(path, MAX_LENGTH)


def test_ids_are_padded(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(["a red circle", "", "nonsense"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [[1, 4, 6, 8, 2, 0], [1, 2, 0, 0, 0, 0], [1, 3, 2, 0, 0, 0]]


def test_no_texts(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode([]).shape[0] == 0


def test_a_long_text_is_cut_with_a_warning(tokenizer: TextTokenizer) -> None:
    text = "a red circle a  LARGE blue\tsquare, and a red circle a red circle"
    with pytest.warns(PromptTruncatedWarning) as caught:
        ids = tokenizer.encode(["a", text])
    assert ids[1].tolist() == [1, 4, 6, 8, 4, 2]
    (warning,) = caught
    assert "can only handle sequences up to 6 tokens" in str(warning.message)
    assert repr(text[text.index("LARGE") :]) in str(warning.message)


def test_a_text_that_just_fits_is_no_reason_to_warn(tokenizer: TextTokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode(["a red circle a"])[0].tolist() == [1, 4, 6, 8, 4, 2]


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "Odd"}}', "\x00\xff"])
def test_a_file_that_is_no_tokenizer(path: Path, content: str) -> None:
    path.write_text(content, "latin-1")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a usable tokenizer"):
        TextTokenizer.load(path, MAX_LENGTH)


def test_a_file_cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BundleError, match="not a usable tokenizer"):
        TextTokenizer.load(path, MAX_LENGTH)


@pytest.mark.parametrize("missing", ["padding", "truncation"])
def test_settings_must_give_the_promised_length(path: Path, missing: str) -> None:
    document = json.loads(path.read_bytes())
    document[missing] = None
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=f"its {missing} must be to 6 ids"):
        TextTokenizer.load(path, MAX_LENGTH).encode(["a red circle a red circle"])


def test_another_length_than_the_manifest_says(path: Path) -> None:
    with pytest.raises(BundleError, match="its padding must be to 7 ids"):
        TextTokenizer.load(path, 7)


def test_a_long_text_in_chunks(tokenizer: TextTokenizer) -> None:
    text = parse("a red circle a (large:2) blue square, a red")
    chunks = tokenizer.chunks(text, most=3)
    assert [chunk.ids for chunk in chunks] == [
        (1, 4, 6, 8, 4, 2),
        (1, 5, 7, 9, 3, 2),
        (1, 4, 6, 2, 0, 0),
    ]
    ones = (1.0,) * 6
    assert [chunk.weights for chunk in chunks] == [ones, (1, 2, 1, 1, 1, 1), ones]
    with pytest.warns(PromptTruncatedWarning, match=r"up to 2 × 6 tokens: \['a red'\] and so on"):
        assert tokenizer.chunks(text, most=2, hint=" and so on") == chunks[:2]
    assert tokenizer.chunks(unweighted("a red"), most=3)[0].weights is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenizer.chunks(unweighted("a red circle a " * 3), most=3)) == 3


@given(
    st.text(max_size=300) | st.text(alphabet="aé̈ß 🚀ﬁ\u200b<|>'", max_size=80),
    st.floats(0.5, 2).map(lambda weight: round(weight, 2)),
)
@example("<|endoftext|> a \u200b\n", 1.5)
def test_a_real_tokenizer(text: str, weight: float) -> None:
    """Marks change no token, whatever the text, and every token of the text has its weight."""
    plain = CLIP.chunks(unweighted(text), most=9)
    weighted = CLIP.chunks(parse(f"({escape(text)}:{weight:f})"), most=9)
    assert [chunk.ids for chunk in weighted] == [chunk.ids for chunk in plain]
    if weight == 1 or not text:
        return
    for chunk in weighted:
        end = chunk.ids.index(END, 1) if END in chunk.ids[1:] else 77
        assert chunk.weights is not None
        assert len(chunk.ids) == len(chunk.weights) == 77
        assert set(chunk.weights) <= {1.0, weight}
        if "<|" not in text:
            assert chunk.weights[1:end] == (weight,) * (end - 1)
            assert {chunk.weights[0], *chunk.weights[end:]} == {1.0}


def test_tokens_that_begin_with_the_space_before_them(tmp_path: Path) -> None:
    """Tokens of SentencePiece begin with the space before them: its weight is not theirs."""
    from tokenizers import pre_tokenizers

    words = word_tokenizer()
    words.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    known = words.get_vocab()
    words.add_tokens([" red", " circle"])
    words.save(str(tmp_path / "tokenizer.json"))
    made = TextTokenizer.load(tmp_path / "tokenizer.json", MAX_LENGTH)
    (chunk,) = made.chunks(parse("a (red:2) circle"))
    assert chunk.ids[1:4] == (known["a"], len(known), len(known) + 1)
    assert chunk.weights == (1, 1, 2, 1, 1, 1)


def test_what_is_written_out_has_the_weight_of_its_word(path: Path) -> None:
    words = {"<cat>": "red circle"}
    made = TextTokenizer.load(path, MAX_LENGTH, words)
    (chunk,) = made.chunks(parse("a (<cat>:2) blue"))
    assert chunk.ids == (1, 4, 6, 8, 7, 2)
    assert chunk.weights == (1, 1, 2, 2, 1, 1)


def test_words_that_stand_for_several(path: Path) -> None:
    words = {"<cat>": "<cat> <cat>_1", "<cat>_x": "<cat>_x <cat>_x_1"}
    plain, made = TextTokenizer.load(path, MAX_LENGTH), TextTokenizer.load(path, MAX_LENGTH, words)
    assert made._expanded(unweighted("a <cat>, <cat>_1 <cat>_x.")).text == (
        "a <cat> <cat>_1, <cat>_1 <cat>_x <cat>_x_1."
    )
    assert plain._expanded(unweighted("a <cat>")).text == "a <cat>"
    assert np.array_equal(made.encode(["a red"]), plain.encode(["a red"]))
