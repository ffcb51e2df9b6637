"""transformers tokenizer → one tokenizer.json that pads and truncates by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtimes.errors import ExportError

_PROBES = (
    "",
    "a large red circle",
    "A Photo of an ASTRONAUT, riding a horse!!  8k,   (masterpiece:1.2)",
    "Ünïcödé — ソフトウェア 🚀 <|endoftext|> don't",
    " ".join(["very"] * 200),
)


def save(tokenizer: Any, path: Path) -> None:
    """Write `path` and check that the `tokenizers` library alone gives the same ids.

    Raises:
        ExportError: the tokenizer has no fast form, or the ids differ.
    """
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json form")
    length = tokenizer.model_max_length
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.enable_truncation(length)
    plain.enable_padding(
        length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    for text in _PROBES:
        wanted = tokenizer(text, padding="max_length", max_length=length, truncation=True)
        if plain.encode(text).ids != list(wanted.input_ids):
            raise ExportError(f"{type(tokenizer).__name__}: tokenizer.json gives other ids")
    plain.save(str(path), pretty=False)
