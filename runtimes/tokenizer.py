"""Text to token ids, by the tokenizer.json of a bundle."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtimes.errors import BundleError
from runtimes.session import first_line

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


class PromptTruncatedWarning(UserWarning):
    """A text was longer than the model can read, and its end was cut off."""


class TextTokenizer:
    """A tokenizer.json whose settings pad and truncate every text to `max_length` ids.

    `expansions`: words that stand for several; see `runtimes.manifest.Tokenizer`.
    Safe to use from several threads.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        label: str,
        expansions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._tokenizer = tokenizer
        self._label = label
        self._expansions = expansions
        # The longest first: "<cat>_1" is a word of its own, not "<cat>" and something more.
        words = {*expansions, *(word for each in expansions.values() for word in each.split())}
        self._words = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
        self.max_length = max_length

    @classmethod
    def load(
        cls, path: Path, max_length: int, expansions: Mapping[str, str] = MappingProxyType({})
    ) -> TextTokenizer:
        """Read a tokenizer.json.

        Raises:
            BundleError: it is damaged or does not give `max_length` ids for a text.
        """
        from tokenizers import Tokenizer

        label = f"{path.parent.name}/{path.name}"
        loaded = _guarded(label, Tokenizer.from_file, str(path))
        made = cls(loaded, max_length, label, expansions)
        made._ids("")
        return made

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids, int64 [number of texts, max_length].

        An over-long text is cut, and a `PromptTruncatedWarning` quotes what was left out.
        """
        ids = [self._ids(self._expanded(text)) for text in texts]
        return np.array(ids, np.int64).reshape(-1, self.max_length)

    def _expanded(self, text: str) -> str:
        if not self._expansions:
            return text
        return self._words.sub(lambda word: self._expansions.get(word[0], word[0]), text)

    def _ids(self, text: str) -> list[int]:
        # One by one: encode_batch would start a pool of threads for a handful of texts.
        encoding: Encoding = _guarded(self._label, self._tokenizer.encode, text)
        ids: list[int] = encoding.ids
        if len(ids) != self.max_length:
            raise BundleError(
                f"{self._label}: gives {len(ids)} ids for a text where the manifest says "
                f"{self.max_length}"
            )
        if encoding.overflowing:
            self._warn(text, encoding.overflowing[0])
        return ids

    def _warn(self, text: str, beyond: Encoding) -> None:
        special = beyond.special_tokens_mask
        starts = [
            begin for (begin, _), mask in zip(beyond.offsets, special, strict=True) if not mask
        ]
        if not starts:
            return
        warnings.warn(
            "The following part of your input was truncated because this model can only handle "
            f"sequences up to {self.max_length} tokens: {[text[starts[0] :]]}",
            PromptTruncatedWarning,
            stacklevel=2,
        )


def _guarded(label: str, function: Any, *arguments: Any) -> Any:
    """Call into the tokenizers library; whatever it raises is the file's fault."""
    try:
        return function(*arguments)
    except Exception as error:
        raise BundleError(f"{label}: not a usable tokenizer: {first_line(error)}") from error
    except BaseException as error:
        # A panic of the Rust code derives from BaseException, like a Ctrl-C.
        if type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{label}: not a usable tokenizer: {first_line(error)}") from error
