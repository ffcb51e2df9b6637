"""This module checks what a tokenizer.json asks for before the tokenizers library reads it.

The library does as the file says: it pads to a thousand million ids, lets nine rules of replacing
grow a text a thousand million times, and tries patterns that take longer than the age of the
universe. So every part is one of a known kind, what the file can grow a text by is bounded, and
patterns are those of well-known tokenizers, or plain ones. The library is given what was
checked: the document is written again, vocabularies and merges as they stand.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

from latentc.runtimes.texts.regular_expressions import Pattern, read_pattern

LONGEST_TEXT = 1 << 14  # characters of a prompt
_MOST_GROWTH = 64  # times as long as the text; 18 is what one character can become in Unicode
_GROWTH_BEFORE_PATTERNS = 2  # that may take time in proportion to the square of the text's length
_MOST_GOING_BACK = 2  # such patterns
_MOST_PARTS = 32
_DEEPEST = 4
_MOST_ADDED = 1 << 16
_LONGEST_WORD = 512  # characters of a token
_LONGEST_AFFIX = 64
_MOST_WORD_PIECES = 1000
# What characters and bytes become: of one character at most so many.
_BYTES = 4
_NORMALIZERS = frozenset(
    (
        *("Sequence", "BertNormalizer", "StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Lowercase"),
        *("Strip", "Prepend", "Replace", "Precompiled", "Nmt", "ByteLevel"),
    )
)
_SPLITTERS = frozenset(
    (
        *("Sequence", "BertPreTokenizer", "ByteLevel", "Whitespace", "WhitespaceSplit", "Split"),
        *("Metaspace", "Punctuation", "Digits", "CharDelimiterSplit", "UnicodeScripts"),
    )
)
_FRAMERS = frozenset(
    ("Sequence", "TemplateProcessing", "RobertaProcessing", "BertProcessing", "ByteLevel")
)
_INNER: Mapping[str, str] = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
}
_MODELS = frozenset(("BPE", "Unigram", "WordPiece", "WordLevel"))
_OPTIONS = frozenset(("vocab", "merges"))  # large, and left to the library
# Of CLIP, GPT-2, Llama 3 and Qwen 2: they take time in proportion to a text.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_PATTERNS = frozenset(
    (
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        rf"{_LETTERS}\p{{N}}{{1,3}}{_OTHERS}",
        rf"{_LETTERS}\p{{N}}{_OTHERS}",
    )
)
_Word = Annotated[str, msgspec.Meta(max_length=_LONGEST_WORD)]


class _Added(msgspec.Struct):
    """A word that is a token whatever the model says."""

    id: int
    content: _Word
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Document(msgspec.Struct):
    """A tokenizer.json. The decoder, which makes texts of ids, is not used and left out."""

    model: dict[str, msgspec.Raw]
    version: str | None = None
    truncation: dict[str, Any] | None = None
    padding: dict[str, Any] | None = None
    added_tokens: Annotated[list[_Added], msgspec.Meta(max_length=_MOST_ADDED)] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


def checked(data: bytes, max_length: int) -> bytes:
    """Return the document of a tokenizer that gives `max_length` ids for every text.

    Raises:
        ValueError: it asks for something that is not known or out of bounds.
        msgspec.DecodeError: it is no such document.
    """
    document = msgspec.json.decode(data, type=_Document)
    _check_lengths(document, max_length)
    growth = _check_normalizers(document.normalizer)
    _check_splitters(document.pre_tokenizer, growth)
    _check_effort(document)
    _check_framers(document.post_processor, max_length)
    _check_model(document.model)
    return msgspec.json.encode(document)


def _check_lengths(document: _Document, max_length: int) -> None:
    padding, truncation = document.padding or {}, document.truncation or {}
    if padding.get("strategy") != {"Fixed": max_length} or padding.get("pad_to_multiple_of"):
        raise ValueError(f"its padding must be to {max_length} ids, as the manifest says")
    if truncation.get("max_length") != max_length or truncation.get("stride"):
        raise ValueError(f"its truncation must be to {max_length} ids, without a stride")
    if any(each.get("direction", "Right") != "Right" for each in (padding, truncation)):
        raise ValueError("it must pad and cut texts at their end")


def _check_normalizers(normalizer: dict[str, Any] | None) -> float:
    """Return how many times as long as it was a text can become."""
    growth = 1.0
    for part in _parts(normalizer, "normalizer", _NORMALIZERS):
        match part["type"]:
            case "Replace":
                growth *= _replaced(part, growth)
            case "Precompiled":
                growth *= _mapped(part["precompiled_charsmap"])
            case "ByteLevel":
                growth *= _BYTES
            case "Prepend":
                if len(part["prepend"]) > _LONGEST_AFFIX:
                    raise ValueError(f"it puts {len(part['prepend'])} characters before a text")
        if growth > _MOST_GROWTH:
            raise ValueError(f"its normalizers make a text up to {growth:.0f} times as long")
    return growth


def _replaced(part: dict[str, Any], growth: float) -> float:
    """Return the factor by which a replacement grows a text at most; 1 leaves its length."""
    content, least = str(part["content"]), _check_pattern(part["pattern"], growth)
    return max(1.0, len(content) / least) if least else 1.0 + len(content)


def _mapped(charsmap: str) -> float:
    """Return the factor by which SentencePiece's map of characters grows a text: its longest text.

    After four bytes with the size of its index come the index and the texts, each ended by a NUL.
    """
    data = binascii.a2b_base64(charsmap, strict_mode=True) if charsmap else b"\0" * 4
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(1.0, *(len(each.decode("utf-8", "replace")) for each in texts.split(b"\0")))


def _check_splitters(splitter: dict[str, Any] | None, growth: float) -> None:
    for part in _parts(splitter, "pre_tokenizer", _SPLITTERS):
        if part["type"] == "Split":
            _check_pattern(part["pattern"], growth)
        elif part["type"] == "ByteLevel":
            growth *= _BYTES
        elif part["type"] == "Metaspace" and len(part["replacement"]) != 1:
            raise ValueError("it replaces spaces by more than a character")
        if growth > _BYTES * _MOST_GROWTH:
            raise ValueError(f"its parts make a text up to {growth:.0f} times as long")


def _check_effort(document: _Document) -> None:
    """Bound how many patterns take time in proportion to the square of the text's length."""
    parts = [
        *_parts(document.normalizer, "normalizer", _NORMALIZERS),
        *_parts(document.pre_tokenizer, "pre_tokenizer", _SPLITTERS),
    ]
    texts = [part["pattern"].get("Regex") for part in parts if "pattern" in part]
    read = [read_pattern(text) for text in texts if text and text not in _KNOWN_PATTERNS]
    going_back = sum(pattern.goes_back for pattern in read)
    if going_back > _MOST_GOING_BACK:
        raise ValueError(f"{going_back} patterns that may take long; at most {_MOST_GOING_BACK}")


def _check_pattern(pattern: dict[str, Any], growth: float) -> int:
    """Return how many characters at least are matched."""
    ((kind, text),) = pattern.items()
    if kind == "String":
        if not text:
            raise ValueError("an empty pattern")
        return len(text)
    if kind != "Regex":
        raise ValueError(f"a pattern of the kind {kind!r:.40}")
    if text in _KNOWN_PATTERNS:
        return 1
    found: Pattern = read_pattern(text)
    if found.goes_back and growth > _GROWTH_BEFORE_PATTERNS:
        raise ValueError(f"the pattern {text!r:.80} for a text that was made longer")
    return found.least


def _check_framers(framer: dict[str, Any] | None, max_length: int) -> None:
    for part in _parts(framer, "post_processor", _FRAMERS):
        if part["type"] != "TemplateProcessing":
            continue
        ids = {name: len(each["ids"]) for name, each in part["special_tokens"].items()}
        for way in ("single", "pair"):
            pieces = part[way]
            special = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
            texts = [each["Sequence"]["id"] for each in pieces if "Sequence" in each]
            if sum(ids[name] for name in special) > max_length or len(texts) != len({*texts}):
                raise ValueError(f"its template {way!r} is longer than {max_length} ids")


def _check_model(model: dict[str, msgspec.Raw]) -> None:
    options = {n: msgspec.json.decode(raw) for n, raw in model.items() if n not in _OPTIONS}
    if options.get("type") not in _MODELS:
        raise ValueError(f"a model of the kind {options.get('type')!r:.40}")
    if options.get("dropout"):
        raise ValueError("its model leaves out merges at random")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(options.get(name) or "") > _LONGEST_AFFIX:
            raise ValueError(f"its {name} is longer than {_LONGEST_AFFIX} characters")
    if (options.get("max_input_chars_per_word") or 0) > _MOST_WORD_PIECES:
        raise ValueError(f"its words have more than {_MOST_WORD_PIECES} characters")
    if options["type"] == "Unigram":  # looks through all tokens that begin at a place
        msgspec.json.decode(model["vocab"], type=list[tuple[_Word, float]])


def _parts(whole: dict[str, Any] | None, role: str, known: frozenset[str]) -> Iterator[Any]:
    """Yield the parts of a role in their order.

    Raises:
        ValueError: one of a kind that is not known, or too many.
    """
    count = 0

    def visit(part: Any, depth: int) -> Iterator[Any]:
        nonlocal count
        count += 1
        if count > _MOST_PARTS or depth > _DEEPEST:
            raise ValueError(f"its {role} has more than {_MOST_PARTS} parts")
        if part["type"] not in known:
            raise ValueError(f"a {role} of the kind {part['type']!r:.40}")
        if part["type"] != "Sequence":
            yield part
            return
        for inner in part[_INNER[role]]:
            yield from visit(inner, depth + 1)

    if whole is not None:
        yield from visit(whole, 0)
