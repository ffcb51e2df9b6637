"""Tokenizers hold the vocabulary that their text encoders were trained with."""

from __future__ import annotations

from typing import Any

from runtimes.errors import SourceError

_PAIRS = tuple((f"tokenizer{suffix}", f"text_encoder{suffix}") for suffix in ("", "_2", "_3"))
# So many rows of an embedding may have no word: tables are made longer to be a round number of rows
# for the hardware, T5's of 32,100 words 32,128.
_PADDING = 128


def check(pipe: Any) -> None:
    """Compare the vocabularies of a pipeline's tokenizers with its text encoders' embeddings.

    Without its files a tokenizer of transformers has a few special words and says nothing.

    Raises:
        SourceError: a vocabulary is too small or too large for its encoder.
    """
    for tokenizer_name, encoder_name in _PAIRS:
        tokenizer, encoder = (getattr(pipe, name, None) for name in (tokenizer_name, encoder_name))
        if tokenizer is None or encoder is None:
            continue
        words, rows = len(tokenizer), encoder.get_input_embeddings().weight.shape[0]
        if not rows - _PADDING < words <= rows:
            files = " and ".join(
                sorted(set(type(tokenizer).vocab_files_names.values()) - {"tokenizer.json"})
            )
            raise SourceError(
                f"{tokenizer_name} has a vocabulary of {words} words and {encoder_name} embeddings "
                f"of {rows}: take {files} (or tokenizer.json) from where the text encoder is from"
            )
