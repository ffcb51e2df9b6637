"""Textual inversion: embeddings of new words, learnt for a concept (Gal et al. 2022,
https://arxiv.org/abs/2208.01618). diffusers adds them to tokenizer and text encoder.

A word with several vectors is several tokens: diffusers writes ``<cat>`` in a prompt out as ``<cat>
<cat>_1 …`` before it is tokenized, and so does a bundle's runtime (`expansions`). Where a prompt
has ``<cat>_1`` itself beside ``<cat>``, diffusers writes a part of it out once more; we do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentc.exporter.source import unread_keys, weight_files
from latentc.exporter.source.adapters.kinds import Ingredient, Reading
from latentc.exporter.source.adapters.places import worded
from latentc.exporter.stored_weights import check_finite
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import SourceError, first_line
from latentc.runtimes.storage.parsing import parser

if TYPE_CHECKING:
    import torch

_PLAIN = Reading()
_A1111 = "emb_params"  # how web interfaces call the only tensor
_UNUSED = ("string_to_token.*",)  # the id of the word that the training began with
# Of a pair, by the encoder that it is for; a single one is for the only encoder.
_PAIR = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}


def find(asked: str, reading: Reading = _PLAIN) -> Ingredient:
    """Return a textual inversion: ``FILE``, ``FOLDER`` or a Hub id, with ``:WORD``.

    Without one it is the word that the file names, or the file's own name.
    """
    place, word = worded(asked)
    usual = "learned_embeds.safetensors"
    name, path = weight_files.find(place, "textual inversion", usual, reading.allow_pickle)
    word = word or _named(path) or path.stem
    return Ingredient("textual-inversion", name, path, sha256(path), token=word)


def parts(pipeline_class: str) -> tuple[str, ...]:
    import diffusers

    if not hasattr(getattr(diffusers, pipeline_class, None), "load_textual_inversion"):
        return ()
    return tuple(part for pair in _PAIR.values() for part in pair)


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> None:
    """Add the words."""
    from latentc.exporter.quiet import quiet_loading

    if not hasattr(pipe, "load_textual_inversion"):
        raise SourceError(f"{type(pipe).__name__} takes no new words ({ingredients[0].id})")
    for ingredient in ingredients:
        with quiet_loading():
            _add(pipe, ingredient)


def expansions(tokenizer: Any) -> dict[str, str]:
    """Return for each word of several tokens what it stands for in a text."""
    words = set(getattr(tokenizer, "added_tokens_encoder", ()))
    text_by_word = {}
    for word in words:
        pieces = [word]
        while f"{word}_{len(pieces)}" in words:
            pieces.append(f"{word}_{len(pieces)}")
        if len(pieces) > 1:
            text_by_word[word] = " ".join(pieces)
    return dict(sorted(text_by_word.items()))


def _add(pipe: Any, inversion: Ingredient) -> None:
    encoders = [pair for pair in _PAIR.values() if getattr(pipe, pair[0], None) is not None]
    for _, tokenizer in encoders:
        if inversion.token in getattr(pipe, tokenizer).get_vocab():
            raise SourceError(
                f"the word {inversion.token!r} of {inversion.id} is in the vocabulary already; "
                f"give it another name, as {inversion.path.name}:WORD"
            )
    vectors = _vectors(inversion)
    if set(vectors) != set(encoders):
        raise SourceError(
            f"{inversion.id} has vectors for {_list(vectors)}; {type(pipe).__name__} needs them "
            f"for {_list(encoders)}"
        )
    for (encoder, tokenizer), tensor in vectors.items():
        try:
            pipe.load_textual_inversion(
                tensor,
                token=inversion.token,
                text_encoder=getattr(pipe, encoder),
                tokenizer=getattr(pipe, tokenizer),
            )
        except Exception as error:
            width = getattr(pipe, encoder).get_input_embeddings().weight.shape[1]
            raise SourceError(
                f"{inversion.id} does not fit: vectors of {tensor.shape[-1]} numbers for "
                f"{inversion.token!r}, and {encoder} has {width} ({first_line(error)})"
            ) from error


def _vectors(inversion: Ingredient) -> Mapping[tuple[str, str], torch.Tensor]:
    """Return the tensor for each pair of encoder and tokenizer."""
    tensors = _tensors(inversion.path)
    if len(tensors) == 1:
        return {_PAIR["clip_l"]: next(iter(tensors.values()))}
    if set(tensors) == set(_PAIR):
        return {_PAIR[name]: tensor for name, tensor in tensors.items()}
    raise SourceError(
        f"{inversion.id} is no textual inversion: expected one tensor, or {' and '.join(_PAIR)}; "
        f"found {', '.join(sorted(tensors)[:4])}"
    )


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return _held(path)[1]


def _named(path: Path) -> str:
    """Return the word that a file names."""
    return _held(path)[0]


@parser(SourceError, "path", "a file of a textual inversion")
def _held(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the word that a file names, and its tensors.

    Pickles of web interfaces have the vectors in a table under ``*``, and the word beside.

    Raises:
        SourceError: it has tensors that nothing reads, or that hold NaN or infinity.
    """
    held = weight_files.content(path)
    if "string_to_param" in held:
        tensors = {_A1111: held["string_to_param"]["*"]}
        others = weight_files.flattened(held).keys() - {"string_to_param.*", *_UNUSED}
        unread_keys.refuse(path.name, "a textual inversion", others)
        check_finite(path.name, tensors)
        return str(held.get("name") or ""), tensors
    tensors = weight_files.flattened(held)
    check_finite(path.name, tensors)
    names = list(tensors)
    return names[0] if len(names) == 1 and names[0] != _A1111 else "", tensors


def _list(pairs: Any) -> str:
    return " and ".join(encoder for encoder, _ in pairs)
