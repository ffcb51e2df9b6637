"""Texts → what conditions the denoiser: tokens in chunks, encoded, weighted and joined.

An encoder takes a certain number of tokens. A longer text is cut there, or, if the call allows more
(`max_embeddings_multiples`), read in chunks, each framed as a text of its own; what the encoder
makes of them is joined along the sequence. Whether that is possible is a matter of shapes: the
denoiser takes sequences of any length (a symbol, where the encoder's output has a number). What has
no sequence, such as a pooled vector, is that of the first chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from runtimes import embeddings, prompt_weights
from runtimes.conditioning import Encoded, check_finite, run_encoder
from runtimes.errors import InputError
from runtimes.manifest import Branch, Component, Manifest
from runtimes.request import READING, Request, parse
from runtimes.session import Array
from runtimes.sessions import Sessions
from runtimes.tokenizer import Chunk, TextTokenizer

if TYPE_CHECKING:
    from runtimes.pipeline import Pipeline

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
    known = {name for each in manifest.embeddings for name in each.columns}
    for texts in request.texts.values():
        for text in texts:
            prompt_weights.parse(text)
    for branch in manifest.guidance.branches:
        for tokenizer in manifest.tokenizers:
            texts = request.text(tokenizer, branch.prefix) or ()
            if tokenizer.input not in known and not all(
                prompt_weights.parse(text).plain for text in texts
            ):
                raise InputError(
                    "prompt_weighting: this bundle does not say which numbers of its encoded texts "
                    f"({tokenizer.input!r}) are which word's; leave the weights out"
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
    rows = _rows(manifest, request, branches)
    blank = ("",) * len(tokenizers)
    given = [row for row in rows if row is not None]
    if not given and not request.embeddings:
        given = [blank]  # only its shape matters, where all rows are zero
    reader = _Reader(manifest, tokenizers, request)
    parts = {row: list(reader.read(row)) for row in dict.fromkeys(given)}
    count = max((len(each) for each in parts.values()), default=1)
    count = _as_given(manifest, request, branches, count) if given else count
    chunks = [chunk for part in parts.values() for chunk in part]
    place, start = {}, 0
    for row, part in parts.items():
        place[row] = [*range(start, start + len(part))]
        start += len(part)
    weighted = any(each.weights for chunk in chunks for each in chunk)
    empty = -1
    if weighted or any(len(each) < count for each in place.values()):
        if len(place.get(blank, ())) != 1:
            chunks += reader.read(blank)
            place[blank] = [len(chunks) - 1]
        empty = place[blank][0]
    filled = [[-1] * count if row is None else place[row] for row in rows]
    return Tokens(
        ids={name: _ids(chunks, i) for i, name in enumerate(tokenizers)} if chunks else {},
        weights={
            name: _weights(chunks, i)
            for i, name in enumerate(tokenizers)
            if any(chunk[i].weights for chunk in chunks)
        },
        empty=empty,
        rows=np.array([[*row, *[empty] * (count - len(row))] for row in filled], np.intp),
    )


def encode(
    manifest: Manifest,
    sessions: Sessions,
    tokens: Tokens,
    request: Request,
    branches: Sequence[Branch],
    known: Encoded | None = None,
) -> dict[str, Array]:
    """Run the encoders, one after the other; returns their outputs, and the encoded texts that were
    given, with one row per branch and image. An encoder whose outputs are `known` is not run, nor
    opened; none is, where no branch has a text.

    Raises:
        NumericalError: an encoder returned NaN or infinity.
    """
    made = _given(manifest, request, branches) if not tokens.ids else {}
    sequences = chunked(manifest)
    columns = {each.input: each.columns for each in manifest.embeddings}
    for component in manifest.encoders() if tokens.ids else ():
        outputs = run_encoder(sessions, component.name, tokens.ids, known)
        for name, value in outputs.items():
            if tokens.weights and columns.get(name):
                value = _weighted(value, tokens, columns[name])
                check_finite(component.name, name, value)
            which = tokens.rows if name in sequences.get(component.name, ()) else tokens.rows[:, :1]
            made[name] = _joined(value, which)
    for name, value in made.items():
        for place, branch in enumerate(branches):
            own = embeddings.of_branch(manifest, request.embeddings, branch.prefix)
            if name in own:
                value[place * request.prompts : (place + 1) * request.prompts] = own[name]
    return {name: np.repeat(each, request.images_per_prompt, axis=0) for name, each in made.items()}


def encode_prompt(pipeline: Pipeline, given: Mapping[str, Any], guided: bool) -> dict[str, Array]:
    """See `runtimes.pipeline.Pipeline.encode_prompt`."""
    manifest, signature = pipeline.manifest, pipeline.signature
    if not signature.embeddings:
        raise InputError("this bundle has no arguments for encoded texts; export it again")
    own = (*signature.texts, *signature.branch_texts, *READING)
    unknown = [name for name, value in given.items() if value is not None and name not in own]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no text of this bundle; it takes {', '.join(own)}")
    request = parse(manifest, signature, given)
    check(manifest, request)
    guidance = manifest.guidance
    branches = [each for each in guidance.branches if guided or each.name == guidance.single]
    tokens = tokenize(manifest, pipeline.tokenizers, request, branches)
    made = encode(manifest, pipeline.sessions, tokens, request, branches, pipeline.encoded)
    parts = {each.name: np.split(made[each.input], len(branches)) for each in manifest.embeddings}
    return {
        branch.prefix + name: part[place].copy()
        for place, branch in enumerate(branches)
        for name, part in parts.items()
    }


class _Reader:
    """Reads the texts of one call as it says."""

    def __init__(self, manifest: Manifest, tokenizers: Tokenizers, request: Request) -> None:
        longer = chunked(manifest)
        inputs = {n for each in manifest.encoders() if each.name in longer for n in each.inputs}
        self._tokenizers = tokenizers
        self._most = {n: request.max_embeddings_multiples if n in inputs else 1 for n in tokenizers}
        self._more = inputs
        self._weighting = request.prompt_weighting

    def read(self, row: tuple[str, ...]) -> Iterator[tuple[Chunk, ...]]:
        """The chunks of a row, for each tokenizer; the shorter ones go on with the empty text."""
        parts = []
        for text, (name, tokenizer) in zip(row, self._tokenizers.items(), strict=True):
            hint = f" (max_embeddings_multiples={self._most[name] + 1} would read on)"
            read = prompt_weights.parse if self._weighting else prompt_weights.unweighted
            parts.append(
                tokenizer.chunks(read(text), self._most[name], hint if name in self._more else "")
            )
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
        none = not any(texts is not None for texts in found)
        if given or (branch.missing == "zeros" and none):
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


def _given(manifest: Manifest, request: Request, branches: Sequence[Branch]) -> dict[str, Array]:
    """Zeros of the shape of the encoded texts that were given."""
    made: dict[str, Array] = {}
    for branch in branches:
        own = embeddings.of_branch(manifest, request.embeddings, branch.prefix)
        for name, value in own.items():
            rows = len(branches) * request.prompts
            made[name] = np.zeros((rows, *value.shape[1:]), value.dtype)
    return made


def _ids(chunks: Sequence[tuple[Chunk, ...]], column: int) -> Array:
    return np.array([chunk[column].ids for chunk in chunks], np.int64)


def _weights(chunks: Sequence[tuple[Chunk, ...]], column: int) -> Array:
    ones = (1.0,) * len(chunks[0][column].ids)
    return np.array([chunk[column].weights or ones for chunk in chunks], np.float32)


def _weighted(value: Array, tokens: Tokens, columns: Mapping[str, int]) -> Array:
    """[chunks, length, width], where the tokens' numbers are moved away from those of the empty
    text at the same place (weights above 1), or towards them (below): docs/decisions/0035."""
    made, start = value.copy(), 0
    for name, width in columns.items():
        if name in tokens.weights:
            chunk, at = np.nonzero(tokens.weights[name] != 1)
            weight = tokens.weights[name][chunk, at][:, np.newaxis]
            part = made[:, :, start : start + width]
            empty = value[tokens.empty, at, start : start + width].astype(np.float32)
            part[chunk, at] = empty + weight * (part[chunk, at] - empty)
        start += width
    return made


def _joined(value: Array, which: Array) -> Array:
    """The chunks of each row one after the other along the second axis; zeros where it has none."""
    if which.shape[1] == 1:
        spread = value[which[:, 0]]  # a copy
    else:
        spread = np.concatenate([value[column] for column in which.T], axis=1)
    spread[which[:, 0] < 0] = 0
    return spread
