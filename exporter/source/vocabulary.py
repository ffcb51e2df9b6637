"""Tokenizers hold the vocabulary that their text encoders were trained with."""

from __future__ import annotations

import json
from typing import Any

from latentc.runtimes.errors import SourceError

# "bert": of latent diffusion's pipelines, "prior_…" of Kandinsky's, which have no other text
# encoder.
_PAIRS = (
    *((f"tokenizer{suffix}", f"text_encoder{suffix}") for suffix in ("", "_2", "_3")),
    ("tokenizer", "bert"),
    ("prior_tokenizer", "prior_text_encoder"),
)
# So many rows of an embedding may have no word: tables are made longer to be a round number of rows
# for the hardware, T5's of 32,100 words 32,128; or one for every so many rows, as Qwen2.5-VL's has
# 152,064 for 151,665 words.
_PADDING, _ROWS_PER_PADDING = 128, 256


def check(pipe: Any) -> None:
    """Compare the vocabularies of a pipeline's tokenizers with its text encoders' embeddings.

    Without its files a tokenizer of transformers has a few special words and says nothing.

    Raises:
        SourceError: a text encoder has no tokenizer; a vocabulary is too small or too large for its
            encoder, has words that nothing makes, or ids beyond the encoder's.
    """
    for tokenizer_name, encoder_name in _PAIRS:
        tokenizer, encoder = (getattr(pipe, name, None) for name in (tokenizer_name, encoder_name))
        if encoder is None:
            continue
        if tokenizer is None:
            raise SourceError(
                f"{encoder_name} has no {tokenizer_name}, without which diffusers encodes no text "
                f"either: take it from where the text encoder is from, or leave out {encoder_name}"
            )
        words, rows = len(tokenizer), encoder.get_input_embeddings().weight.shape[0]
        if not rows - max(_PADDING, rows // _ROWS_PER_PADDING) < words <= rows:
            files = " and ".join(
                sorted(set(type(tokenizer).vocab_files_names.values()) - {"tokenizer.json"})
            )
            raise SourceError(
                f"{tokenizer_name} has a vocabulary of {words} words and {encoder_name} embeddings "
                f"of {rows}: take {files} (or tokenizer.json) from where the text encoder is from"
            )
        _check_words(tokenizer_name, tokenizer)


def rows(pipe: Any, tokenizer: str) -> int:
    """Return how many ids the text encoder that belongs to a tokenizer has embeddings for."""
    encoders = (getattr(pipe, encoder, None) for name, encoder in _PAIRS if name == tokenizer)
    encoder = next(encoder for encoder in encoders if encoder is not None)
    return int(encoder.get_input_embeddings().weight.shape[0])


def _check_words(name: str, tokenizer: Any) -> None:
    """Raise SourceError if words share an id, ids have gaps, or no merge makes a word of several
    letters: with a cut or empty merges.txt, texts fall into single letters without a word."""
    ids = tokenizer.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))):
        raise SourceError(
            f"{name} has {len(ids)} words with {len(set(ids.values()))} ids up to "
            f"{max(ids.values(), default=0)}; expected one id for each, from 0 on"
        )
    fast = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(fast.to_str()) if fast is not None else {}
    model = described.get("model", {})
    if model.get("type") != "BPE":
        return
    made = {
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1)
        for pair in model["merges"]
    }
    ending = model.get("end_of_word_suffix") or ""
    special = {token["content"] for token in described["added_tokens"]}
    lost = sorted(
        word
        for word in model["vocab"]
        if word not in made and word not in special and len(word.removesuffix(ending)) > 1
    )
    if lost:
        raise SourceError(
            f"{name} has {len(lost)} words that no merge makes, such as {lost[0]!r}: merges.txt is "
            "cut short or another vocabulary's; take it from where the text encoder is from"
        )
