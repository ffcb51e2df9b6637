"""Text to token ids, by the tokenizer.json of a bundle."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser, parsing
from latentc.runtimes.texts.prompt_weights import Weighted, unweighted
from latentc.runtimes.texts.tokenizer_rules import LONGEST_TEXT, checked

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


_WHAT = "a usable tokenizer"
_MOST_IDS = 1 << 31  # graphs may take them as int32
_MOST_WORDS = 1 << 12  # that stand for others


class PromptTruncatedWarning(UserWarning):
    """A text was longer than the model can read, and its end was cut off."""


@dataclass(frozen=True)
class Chunk:
    """A chunk holds as many tokens as an encoder takes at once.

    It has their ids, how many of them are no filling, and the weight of each where any is not 1.
    """

    ids: tuple[int, ...]
    used: int
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Frame:
    """The ids `before` and `after` those of a text, and the one that fills a row up."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int

    def holds(self, ids: Sequence[int], used: int) -> bool:
        """Return whether a row is a text in this frame; `used` counts what is no filling."""
        count, end = len(self.before), used - len(self.after)
        return (
            end >= count
            and tuple(ids[:count]) == self.before
            and tuple(ids[end:used]) == self.after
            and all(number == self.pad for number in ids[used:])
        )


class TextTokenizer:
    """A tokenizer.json whose settings pad and truncate every text to `max_length` ids.

    `expansions`: words that stand for several; `vocabulary`: what ids must be below; `frame`: what
    every row must have around its text; `unescape`: whether character references of HTML are
    written out; see `latentc.runtimes.bundle.structures.Tokenizer`. Safe to use from several
    threads.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        label: str,
        expansions: Mapping[str, str] = MappingProxyType({}),
        vocabulary: int | None = None,
        frame: Frame | None = None,
        unescape: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._label = label
        self._expansions = expansions
        # The longest first: "<cat>_1" is a word of its own, not "<cat>" and something more.
        words = {
            *expansions,
            *(word for expansion in expansions.values() for word in expansion.split()),
        }
        if len(words) > _MOST_WORDS:
            raise BundleError(f"{label}: {len(words)} words of expansions, at most {_MOST_WORDS}")
        self._words = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
        self.max_length = max_length
        self._ids = _MOST_IDS if vocabulary is None else vocabulary
        self._frame = frame
        self._unescape = unescape

    @classmethod
    @parser(BundleError, "path", _WHAT)
    def load(
        cls,
        path: Path,
        max_length: int,
        expansions: Mapping[str, str] = MappingProxyType({}),
        vocabulary: int | None = None,
        frame: Frame | None = None,
        unescape: bool = False,
    ) -> TextTokenizer:
        """Read a tokenizer.json.

        Raises:
            BundleError: it is damaged, or does not give `max_length` ids below `vocabulary` for a
                text.
        """
        from tokenizers import Tokenizer

        label = f"{path.parent.name}/{path.name}"
        data = read_regular(path, LARGEST_DOCUMENT)
        loaded = Tokenizer.from_buffer(checked(data, max_length))
        made = cls(loaded, max_length, label, expansions, vocabulary, frame, unescape)
        made.chunks(unweighted(""))
        if frame is not None and made.frame() != frame:
            raise made._framed_otherwise()
        return made

    def _framed_otherwise(self) -> BundleError:
        return BundleError(
            f"{self._label}: frames or fills a text otherwise than the manifest says; export the "
            "bundle again"
        )

    def frame(self) -> Frame:
        """Return what the file puts around a text."""
        return frame_of(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return token ids, int64 [number of texts, max_length].

        An over-long text is cut, and a `PromptTruncatedWarning` quotes what was left out.
        """
        ids = [self.chunks(unweighted(text))[0].ids for text in texts]
        return np.array(ids, np.int64).reshape(-1, self.max_length)

    def chunks(self, text: Weighted, most: int = 1, hint: str = "", ending: int = 0) -> list[Chunk]:
        """Return the text in chunks of `max_length` ids, `most` of them at most.

        Each is framed and filled up as the file says for a text of its own.

        A token has the weight of its first character that is no space; those that frame and fill
        have 1. What is beyond the last chunk is cut, and a `PromptTruncatedWarning` quotes it and
        ends in `hint`; the last `ending` characters are not quoted, and may be cut without it.
        """
        _check_length(len(text.text))
        text = self._expanded(_unescaped(text) if self._unescape else text)
        quoted = text.text[: len(text.text) - ending]
        # One by one: encode_batch would start a pool of threads for a handful of texts.
        with parsing(self._label, BundleError, _WHAT):
            encoding: Encoding = self._tokenizer.encode(text.text)
        # The tokenizers library has cut the text already: what did not fit stands in `overflowing`,
        # piece by piece, each framed and padded.
        pieces = [encoding, *encoding.overflowing]
        if len(pieces) > most:
            self._warn(quoted, pieces[most], most, hint)
        return [self._chunk(piece, text) for piece in pieces[:most]]

    def _expanded(self, text: Weighted) -> Weighted:
        """Return the text with words that stand for several written out.

        What is written has the weight of the word.
        """
        if not self._expansions:
            return text
        written: list[str] = []
        weights: list[float] = []
        end = 0
        for word in self._words.finditer(text.text):
            stands_for = self._expansions.get(word[0], word[0])
            written += [text.text[end : word.start()], stands_for]
            weights += text.weights[end : word.start()]
            weights += [text.weights[word.start()]] * len(stands_for)
            end = word.end()
            _check_length(len(weights))
        return Weighted("".join([*written, text.text[end:]]), (*weights, *text.weights[end:]))

    def _chunk(self, piece: Encoding, text: Weighted) -> Chunk:
        ids = tuple(piece.ids)
        if len(ids) != self.max_length:
            raise BundleError(
                f"{self._label}: gives {len(ids)} ids for a text where the manifest says "
                f"{self.max_length}"
            )
        if max(ids) >= self._ids:  # engines read elsewhere, or take zeros without a word
            raise BundleError(
                f"{self._label}: gives the id {max(ids)}, and the text encoder has {self._ids} "
                "embeddings; the tokenizer is another model's, export the bundle again"
            )
        used = sum(piece.attention_mask)
        if self._frame is not None and not self._frame.holds(ids, used):
            raise self._framed_otherwise()
        if text.plain:
            return Chunk(ids, used)
        tokens = zip(piece.offsets, piece.special_tokens_mask, strict=True)
        weights = tuple(1.0 if special else _weight(text, *at) for at, special in tokens)
        return Chunk(ids, used, weights)

    def _warn(self, text: str, beyond: Encoding, chunks: int, hint: str) -> None:
        special = beyond.special_tokens_mask
        starts = [
            begin for (begin, _), mask in zip(beyond.offsets, special, strict=True) if not mask
        ]
        if not starts or starts[0] >= len(text):
            return
        handled = f"{chunks} × {self.max_length}" if chunks > 1 else str(self.max_length)
        warnings.warn(
            "The following part of your input was truncated because this model can only handle "
            f"sequences up to {handled} tokens: {[text[starts[0] :]]}{hint}",
            PromptTruncatedWarning,
            stacklevel=2,
        )


def frame_of(tokenizer: Tokenizer) -> Frame:
    """Return what a tokenizer that pads puts around a text."""
    piece = tokenizer.encode("a")
    used = sum(piece.attention_mask)
    words = [at for at in range(used) if not piece.special_tokens_mask[at]] or [used]
    padding = tokenizer.padding or {}
    before, after = piece.ids[: words[0]], piece.ids[words[-1] + 1 : used]
    return Frame(tuple(before), tuple(after), int(padding.get("pad_id", 0)))


def _unescaped(text: Weighted) -> Weighted:
    """Write out character references of HTML, and those in what comes of it, which then have the
    weight of their first character. A reference in parts of different weights is none."""
    written: list[str] = []
    weights: list[float] = []
    start = 0
    for weight, run in groupby(text.weights):
        end = start + len(tuple(run))
        part = html.unescape(html.unescape(text.text[start:end]))
        written.append(part)
        weights += [weight] * len(part)
        start = end
    return Weighted("".join(written), tuple(weights))


def _check_length(characters: int) -> None:
    if characters > LONGEST_TEXT:
        raise InputError(
            f"a text of {characters} characters or more, at most {LONGEST_TEXT} can be read: "
            "shorten it, models read a few hundred words"
        )


def _weight(text: Weighted, begin: int, end: int) -> float:
    """Return the weight of a token that stands for these characters.

    It is that of the first one that is no space, as some tokenizers count the space before a word
    to it.
    """
    words = (at for at in range(begin, end) if not text.text[at].isspace())
    at = next(words, begin)
    return text.weights[at] if begin < end else 1.0
