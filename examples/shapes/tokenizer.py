"""A real CLIP byte-pair tokenizer whose merges are learnt from the caption language.

Each caption word becomes one token; every byte has a token too, so any text can be encoded.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from latentc.benchmarks.shapes.captions import all_words

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77  # tokens, as in Stable Diffusion
_WORD_END = "</w>"


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for bytes in a CLIP vocabulary, in CLIP's
    order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, most frequent pair first, until each word is a single symbol."""
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in pieces):
        pairs: Counter[tuple[str, str]] = Counter()
        for parts in pieces:
            pairs.update(pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(parts, best) for parts in pieces]
    return merges


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write ``vocab.json`` and ``merges.txt`` into ``folder`` and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(all_words())
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols)]
    tokens += [left + right for left, right in merges] + [START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)
    return tokenizer


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
