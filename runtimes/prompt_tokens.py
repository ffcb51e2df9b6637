"""Texts → tokens in chunks: what the encoders of a bundle are to be run on.

An encoder takes a certain number of tokens. A longer text is cut there, or, if the call allows more
(`max_embeddings_multiples`), read in chunks, each framed as a text of its own; what the encoder
makes of them is joined along the sequence. Whether that is possible is a matter of shapes: the
denoiser takes sequences of any length (a symbol, where the encoder's output has a number). What has
no sequence, such as a pooled vector, is that of the first chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from runtimes import embeddings, prompt_weights
from runtimes.errors import InputError
from runtimes.manifest import Branch, Component, Manifest
from runtimes.request import Request
from runtimes.session import Array
from runtimes.tokenizer import Chunk, TextTokenizer

# One text per tokenizer; None stands for conditioning that is given, or all zero.
Texts: TypeAlias = tuple[str, ...] | None
Tokenizers: TypeAlias = Mapping[str, TextTokenizer]


@dataclass(frozen=True)
class Tokens:
    """What is to be encoded.

    `ids` and `weights` have a row per chunk of a text, int64 and float32 [chunks, max_length], by
    encoder input; `weights` only what has any. `empty` is the chunk of the empty text (-1 where it
    is not wanted). `rows`, int [branches * prompts, chunks of a row], says which chunks make a row;
    -1 where it has no text.
    """

    ids: Mapping[str, Array]
    weights: Mapping[str, Array]
    empty: int
    rows: Array


def chunked(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The encoders that can read a text in chunks, and their outputs that are sequences."""
    lengths = {each.input: each.max_length for each in manifest.tokenizers}
    found = {}
    for encoder in manifest.encoders():
        sequences = _sequences(manifest, encoder)
        taken = {lengths[name] for name in encoder.inputs}
        if sequences and {encoder.outputs[name].shape[1] for name in sequences} == taken:
            found[encoder.name] = sequences
    return found


def check(manifest: Manifest, request: Request) -> None:
    """Refuse what this bundle cannot do with the texts of a call.

    Raises:
        InputError: texts longer than one chunk are asked for and the denoiser takes one length;
            marks that are no weights, or weights where it is not known which numbers are which
            word's.
    """
    if request.max_embeddings_multiples > 1 and not chunked(manifest):
        raise InputError(
            "this bundle's denoiser takes encoded texts of one length only: leave "
            "max_embeddings_multiples out"
        )
    if not request.prompt_weighting:
        return
    for texts in request.texts.values():
        for text in texts:
            prompt_weights.parse(text)
    for branch in manifest.guidance.branches:
        _check_weights(manifest, request, branch)


def _check_weights(manifest: Manifest, request: Request, branch: Branch) -> None:
    """Refuse weights that cannot act, or not in all that is made of the text."""
    known = {n for each in manifest.embeddings for own in each.inputs.values() for n in own}
    with_sequences = {
        name
        for each in manifest.encoders()
        for name in each.inputs
        if any(len(spec.shape) > 2 for spec in each.outputs.values())
    }
    texts = {each.input: request.text(each, branch.prefix) or () for each in manifest.tokenizers}
    weighted = {text for name in known for text in texts[name]}
    others = {
        name: own
        for name, own in texts.items()
        if name not in known and not all(prompt_weights.parse(text).plain for text in own)
    }
    for name in sorted(others.keys() & with_sequences):
        raise InputError(
            "prompt_weighting: this bundle does not say which numbers of its encoded texts "
            f"({name!r}) are which word's; leave the weights out"
        )
    for name, own in others.items():
        if not weighted.issuperset(own):
            raise InputError(
                f"prompt_weighting: what is made of {name!r} is one vector for the whole text, "
                "in which words have no weights; leave them out of that text"
            )


def tokenize(
    manifest: Manifest, tokenizers: Tokenizers, request: Request, branches: Sequence[Branch]
) -> Tokens:
    """Token ids of the distinct texts of all branches and prompts, in chunks.

    Branches share texts (an empty negative prompt, say): each is encoded once. All rows get as many
    chunks as the longest, the others chunks of the empty text.

    Raises:
        InputError: encoded texts were given, and texts do not get to their length.
    """
    reader = _Reader(manifest, tokenizers, request)
    blank = ("",) * len(tokenizers)
    rows = [row and reader.read(row) for row in _rows(manifest, request, branches)]
    texts = [row for row in rows if row]
    count = max(map(len, texts), default=1)
    if texts:
        count = _as_given(manifest, request, branches, count)
    elif not request.embeddings:
        reader.read(blank)  # only its shape matters, where all rows are zero
    empty = -1
    if reader.weighted or any(len(row) < count for row in texts):
        empty = reader.read(blank)[0]
    filled = [[*row, *[empty] * (count - len(row))] if row else [-1] * count for row in rows]
    return Tokens(*reader.arrays(), empty, np.array(filled, np.intp))


class _Reader:
    """Reads the texts of one call as it says, each once."""

    def __init__(self, manifest: Manifest, tokenizers: Tokenizers, request: Request) -> None:
        longer = chunked(manifest)
        self._longer = {n for e in manifest.encoders() if e.name in longer for n in e.inputs}
        self._tokenizers = tokenizers
        self._most = request.max_embeddings_multiples
        self._weighting = request.prompt_weighting
        self._chunks: list[tuple[Chunk, ...]] = []  # each one per tokenizer
        self._known: dict[tuple[str, ...], list[int]] = {}

    @property
    def weighted(self) -> bool:
        """Whether any token has another weight than 1."""
        return any(each.weights for chunk in self._chunks for each in chunk)

    def read(self, row: tuple[str, ...]) -> list[int]:
        """Which chunks are those of a row, one text per tokenizer."""
        if row not in self._known:
            start = len(self._chunks)
            self._chunks += self._read(row)
            self._known[row] = [*range(start, len(self._chunks))]
        return self._known[row]

    def arrays(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Ids and weights of all chunks, see `Tokens`; nothing where nothing was read."""
        if not self._chunks:
            return {}, {}
        columns = dict(zip(self._tokenizers, zip(*self._chunks, strict=True), strict=True))
        ids: dict[str, Array] = {
            name: np.array([chunk.ids for chunk in column], np.int64)
            for name, column in columns.items()
        }
        weights: dict[str, Array] = {
            name: np.array([each.weights or (1.0,) * len(each.ids) for each in column], np.float32)
            for name, column in columns.items()
            if any(each.weights for each in column)
        }
        return ids, weights

    def _read(self, row: tuple[str, ...]) -> Iterator[tuple[Chunk, ...]]:
        """Where a text has fewer chunks than another tokenizer's, it goes on with the empty one."""
        read = prompt_weights.parse if self._weighting else prompt_weights.unweighted
        parts = []
        for text, (name, tokenizer) in zip(row, self._tokenizers.items(), strict=True):
            most, hint = 1, ""
            if name in self._longer:
                most = self._most
                hint = f" (max_embeddings_multiples={most + 1} would read on)"
            parts.append(tokenizer.chunks(read(text), most, hint))
        longest = max(map(len, parts))
        for part, tokenizer in zip(parts, self._tokenizers.values(), strict=True):
            if len(part) < longest:
                part += tokenizer.chunks(prompt_weights.unweighted("")) * (longest - len(part))
        yield from zip(*parts, strict=True)


def _rows(manifest: Manifest, request: Request, branches: Sequence[Branch]) -> list[Texts]:
    """The texts of every branch and prompt, branch by branch."""
    rows: list[Texts] = []
    for branch in branches:
        found = [request.text(each, branch.prefix) for each in manifest.tokenizers]
        given = embeddings.of_branch(manifest, request.embeddings, branch.prefix)
        if given or (branch.missing == "zeros" and not request.has_text(branch)):
            rows += [None] * request.prompts
        else:
            columns = [texts or ("",) * request.prompts for texts in found]
            rows += zip(*columns, strict=True)
    return rows


def _sequences(manifest: Manifest, encoder: Component) -> tuple[str, ...]:
    taken = manifest.component("denoiser").inputs
    return tuple(
        name
        for name, spec in encoder.outputs.items()
        if name in taken and len(spec.shape) > 1 and len(taken[name].shape) > 1
        if isinstance(spec.shape[1], int) and isinstance(taken[name].shape[1], str)
    )


def _as_given(manifest: Manifest, request: Request, branches: Sequence[Branch], count: int) -> int:
    """How many chunks the texts need to be as long as the encoded texts of other branches."""
    longer = chunked(manifest)
    asked = set()
    for encoder in manifest.encoders():
        for name in _sequences(manifest, encoder):
            chunk = int(encoder.outputs[name].shape[1])
            for branch in branches:
                own = embeddings.of_branch(manifest, request.embeddings, branch.prefix)
                if name not in own:
                    continue
                length = own[name].shape[1]
                times, rest = divmod(length, chunk)
                if rest or times < count or (times > 1 and encoder.name not in longer):
                    raise InputError(
                        f"the encoded texts of the branch {branch.name!r} have {length} "
                        f"positions, and the texts of the others make {chunk * count}"
                        + (", or a multiple of that" if encoder.name in longer else "")
                        + ": give encoded texts for all"
                    )
                asked.add(times)
    if len(asked) > 1:
        raise InputError(f"the encoded texts are of different lengths: {sorted(asked)} chunks")
    return max(asked, default=count)
