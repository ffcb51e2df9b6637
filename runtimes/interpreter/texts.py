"""Texts of a call → encoded texts: token ids in chunks, the encoders' runs on them, weights.

An encoder takes a certain number of tokens. A longer text is cut there, or, if the call allows more
(`max_embeddings_multiples`), read in chunks, each framed as a text of its own; what the encoder
makes of them is joined along the sequence, where the denoiser takes sequences of any length. What
has no sequence, such as a pooled vector, is that of the first chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.sessions import Sessions
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.calls.request import Request
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.demand import of_call
from latentc.runtimes.programs.statements import Run, Tokens
from latentc.runtimes.texts import prompt_weights
from latentc.runtimes.texts.encoded import Encoded, check_finite, run_encoder
from latentc.runtimes.texts.prompt_weights import Weighted
from latentc.runtimes.texts.tokenizer import Chunk, TextTokenizer

Tokenizers = Mapping[str, TextTokenizer]


class _Framed(NamedTuple):
    """A text of the call, and the template that it is read in."""

    template: str
    text: str

    def weighted(self, parse: Callable[[str], Weighted]) -> Weighted:
        """Return the whole text, whose marks `parse` reads; the template has none."""
        before, _, after = map(prompt_weights.unweighted, self.template.partition("{}"))
        parts = (before, parse(self.text), after)
        weights = tuple(weight for part in parts for weight in part.weights)
        return Weighted("".join(part.text for part in parts), weights)


_Row = tuple[_Framed, ...]  # a text for each input of an encoder


@dataclass(frozen=True)
class _Tokenized:
    """The chunks of the distinct rows of an encoder: `ids` and `weights` [chunks, length] by input;
    `places`: the chunks of each row; `empty`: that of the empty text, -1 where there is none."""

    ids: Mapping[str, Array]
    weights: Mapping[str, Array]
    places: Mapping[_Row, tuple[int, ...]]
    empty: int


def encode(
    reader: Reader, runs: Sequence[Run], sessions: Sessions, known: Encoded | None
) -> dict[str, Array]:
    """Run the encoders on the texts of a call; return the values that `runs` give, a row for each
    prompt.

    Every encoder runs once, on the distinct texts of all its runs.

    Raises:
        InputError: encoded texts were given, and texts do not get to their length.
        NumericalError: an encoder returned NaN or infinity.
    """
    values: dict[str, Array] = {}
    for component, tokenized in reader.tokenized.items():
        outputs = run_encoder(sessions, component, tokenized.ids, known)
        for run in runs:
            if run.component == component:
                values |= reader.taken(run, tokenized, outputs)
    return values


class Reader:
    """Reads the texts of one call for the encoders that run on them."""

    def __init__(
        self,
        call: Request,
        tokenizers: Tokenizers,
        runs: Sequence[Run],
        components: Mapping[str, Component],
    ) -> None:
        self._call = call
        self._components = components  # as they were loaded
        self._facts = call.facts
        self._tokenizers = tokenizers
        self._statements = self._facts.tokens
        self._chunkable = self._facts.chunked
        self._chunks: dict[tuple[str, _Framed], list[Chunk]] = {}
        for run in runs:
            for name in run.feeds.values():
                self._read(run.component, self._statements[name])
        self._count = max(map(len, self._chunks.values()), default=1)
        self._count = _as_given(call, self._facts, runs, self._count, self._chunkable)
        self._lengths = self._longest(runs)
        self.tokenized = {
            component: self.of_encoder([run for run in runs if run.component == component])
            for component in dict.fromkeys(run.component for run in runs)
        }

    def _read(self, component: str, tokens: Tokens) -> None:
        """Read the texts of a statement in chunks."""
        most, hint = 1, ""
        if component in self._chunkable:
            most = self._call.max_embeddings_multiples
            hint = f" (max_embeddings_multiples={most + 1} would read on)"
        parse = prompt_weights.parse if self._call.prompt_weighting else prompt_weights.unweighted
        tokenizer = self._tokenizers[tokens.tokenizer]
        for text in self._texts(tokens):
            key = (tokens.tokenizer, text)
            if key not in self._chunks:
                ending = len(text.template.partition("{}")[2])
                self._chunks[key] = tokenizer.chunks(text.weighted(parse), most, hint, ending)

    def _texts(self, tokens: Tokens) -> list[_Framed]:
        return [_Framed(tokens.template, text) for text in self._call.texts[tokens.text]]

    def _longest(self, runs: Sequence[Run]) -> dict[str, int]:
        """Return by tokenizer how many ids the rows have that are as long as the longest of the
        whole call, whatever is asked for of it.

        Raises:
            InputError: encoded texts were given that are shorter than the texts of the call.
        """
        lengths: dict[str, int] = {}
        for run in (*runs, *self._others(runs)):
            for input, name in run.feeds.items():
                tokens = self._statements[name]
                if tokens.up_to is None:
                    continue
                self._read(run.component, tokens)
                loaded = self._components[run.component].inputs[input].shape[1]
                own = [loaded] if isinstance(loaded, int) else self._used(tokens)
                lengths[tokens.tokenizer] = max(lengths.get(tokens.tokenizer, 1), *own)
        for name, (tokens, more) in self._facts.shortened.items():
            if name not in self._call.values or tokens.tokenizer not in lengths:
                continue
            given = self._call.values[name].shape[1]
            if given + more < lengths[tokens.tokenizer] or given + more > (tokens.up_to or 0):
                raise InputError(
                    f"{name!r} has {given} positions, and the texts of this call make "
                    f"{lengths[tokens.tokenizer] - more}: give encoded texts for all"
                )
            lengths[tokens.tokenizer] = given + more
        return lengths

    def _others(self, runs: Sequence[Run]) -> list[Run]:
        """Return the encoders' runs of the whole call that are not among these, and whose texts
        are there."""
        call, program = self._call, self._facts.program
        numbers = {name: own[0] for name, own in call.numbers.items() if len(own) == 1}
        steps = [program.steps[place] for place in of_call(program, call.given, numbers).live]
        others = [run for run in self._facts.encoders if run in steps and run not in runs]
        return [
            run for run in others if all(self._text(v) in call.texts for v in run.feeds.values())
        ]

    def _text(self, ids: str) -> str:
        """Return the name of the text that ids are of."""
        return self._statements[ids].text

    def _used(self, tokens: Tokens) -> list[int]:
        """Return how many ids the texts of a statement have without filling."""
        texts = self._texts(tokens)
        return [self._chunks[tokens.tokenizer, text][0].used for text in texts]

    def _rows(self, run: Run) -> list[_Row]:
        texts = [self._texts(self._statements[name]) for name in run.feeds.values()]
        return [*zip(*texts, strict=True)]

    def of_encoder(self, runs: Sequence[Run]) -> _Tokenized:
        """Return the chunks that one encoder is run on."""
        inputs = [*runs[0].feeds]
        statements = [self._statements[runs[0].feeds[name]] for name in inputs]
        tokenizers = [statement.tokenizer for statement in statements]
        columns: list[tuple[Chunk, ...]] = []
        places: dict[_Row, list[int]] = {}

        def add(row: _Row) -> list[int]:
            if row not in places:
                read = [*self._chunked(tokenizers, row)]
                places[row] = [*range(len(columns), len(columns) + len(read))]
                columns.extend(read)
            return places[row]

        rows = [row for run in runs for row in self._rows(run)]
        for row in rows:
            add(row)
        count = self._count if runs[0].component in self._chunkable else 1
        weighted = any(chunk.weights for column in columns for chunk in column)
        empty = -1
        if weighted or any(len(places[row]) < count for row in rows):
            empty = add(tuple(_Framed(each.template, "") for each in statements))[0]
        filled = {row: (*own, *[empty] * (count - len(own))) for row, own in places.items()}
        by_input = dict(zip(inputs, zip(*columns, strict=True), strict=True))
        lengths = {
            name: None if each.up_to is None else self._lengths[each.tokenizer]
            for name, each in zip(inputs, statements, strict=True)
        }
        return _Tokenized(
            ids={
                name: np.array([chunk.ids[: lengths[name]] for chunk in own], np.int64)
                for name, own in by_input.items()
            },
            weights={
                name: np.array([c.weights or (1.0,) * len(c.ids) for c in own], np.float32)
                for name, own in by_input.items()
                if any(chunk.weights for chunk in own)
            },
            places=filled,
            empty=empty,
        )

    def _chunked(self, names: Sequence[str], row: _Row) -> Iterator[tuple[Chunk, ...]]:
        """Yield the chunks of a row; a text with fewer than another goes on with the empty one."""
        parts = []
        for name, text in zip(names, row, strict=True):
            parts.append([*(self._chunks.get((name, text)) or self._unweighted(name, text))])
        longest = max(map(len, parts))
        for part, name, text in zip(parts, names, row, strict=True):
            if len(part) < longest:
                empty = self._unweighted(name, _Framed(text.template, ""))
                part += [*empty] * (longest - len(part))
        yield from zip(*parts, strict=True)

    def _unweighted(self, tokenizer: str, text: _Framed) -> list[Chunk]:
        return self._tokenizers[tokenizer].chunks(text.weighted(prompt_weights.unweighted))

    def taken(
        self, run: Run, tokenized: _Tokenized, outputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the values of one run: its rows of what the encoder made of all."""
        columns = self._facts.positions.get(run.component, {})
        sequences = self._facts.sequences(run)
        which = np.array([tokenized.places[row] for row in self._rows(run)], np.intp)
        values = {}
        for output, name in run.gives.items():
            value = outputs[output]
            if tokenized.weights and columns.get(output):
                value = _weighted(value, tokenized, columns[output])
                check_finite(run.component, output, value)
            chunks = which if output in sequences else which[:, :1]
            parts = [value[column] for column in chunks.T]
            values[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return values


def _as_given(
    call: Request, facts: Facts, runs: Sequence[Run], count: int, chunkable: frozenset[str]
) -> int:
    """Return how many chunks the texts need to be as long as the encoded texts that were given."""
    asked = set()
    for name in (facts.stretchable - facts.shortened.keys()) & call.values.keys():
        chunk, length = facts.types[name].shape[0].offset, call.values[name].shape[1]
        times, rest = divmod(length, chunk)
        if runs and (rest or times < count or (times > 1 and not chunkable)):
            raise InputError(
                f"{name!r} has {length} positions, and the texts of this call make "
                f"{chunk * count}{', or a multiple of that' if chunkable else ''}: give encoded "
                "texts for all"
            )
        asked.add(times)
    if len(asked) > 1:
        raise InputError(f"the encoded texts are of different lengths: {sorted(asked)} chunks")
    return max(asked, default=count)


def _weighted(value: Array, tokenized: _Tokenized, columns: Mapping[str, int]) -> Array:
    """Return [chunks, length, width] in which the tokens' numbers are moved away from those of the
    empty text at the same place (weights above 1), or towards them: docs/decisions/0035."""
    made, start = value.copy(), 0
    for name, width in columns.items():
        if name in tokenized.weights:
            chunk, at = np.nonzero(tokenized.weights[name] != 1)
            weight = tokenized.weights[name][chunk, at][:, np.newaxis]
            part = made[:, :, start : start + width]
            empty = value[tokenized.empty, at, start : start + width].astype(np.float32)
            part[chunk, at] = empty + weight * (part[chunk, at] - empty)
        start += width
    return made
