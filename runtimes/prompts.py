"""Tokens → what conditions the denoiser: encoded, weighted and joined. See `prompt_tokens`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

from runtimes import embeddings
from runtimes.argument_values import boolean
from runtimes.conditioning import Encoded, check_finite, run_encoder
from runtimes.errors import InputError
from runtimes.manifest import Branch, Manifest
from runtimes.prompt_tokens import Tokens, check, chunked, tokenize
from runtimes.request import READING, Request, parse
from runtimes.session import Array
from runtimes.sessions import Sessions
from runtimes.tasks import Task

if TYPE_CHECKING:
    from runtimes.pipeline import Pipeline


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
    columns = {n: own for each in manifest.embeddings for n, own in each.inputs.items()}
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
    guided = boolean({"do_classifier_free_guidance": guided}, "do_classifier_free_guidance")
    if not signature.embeddings:
        raise InputError("this bundle has no arguments for encoded texts; export it again")
    own = (*signature.texts, *signature.branch_texts, *READING)
    unknown = [name for name, value in given.items() if value is not None and name not in own]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no text of this bundle; it takes {', '.join(own)}")
    # Texts are encoded for calls of any task, whatever images these take.
    of_texts = structs.replace(manifest, tasks=(Task("texts"),))
    request = parse(of_texts, signature, given)
    check(manifest, request)
    guidance = manifest.guidance
    branches = [
        each
        for each in guidance.branches
        if each.name == guidance.single or (guided and request.has_what_it_needs(each))
    ]
    tokens = tokenize(manifest, pipeline.tokenizers, request, branches)
    made = encode(manifest, pipeline.sessions, tokens, request, branches, pipeline.encoded)
    joined = {each.name: embeddings.joined(each, made) for each in manifest.embeddings}
    parts = {name: np.split(value, len(branches)) for name, value in joined.items()}
    return {
        branch.prefix + name: part[place].copy()
        for place, branch in enumerate(branches)
        for name, part in parts.items()
    }


def _given(manifest: Manifest, request: Request, branches: Sequence[Branch]) -> dict[str, Array]:
    """Zeros of the shape of the encoded texts that were given."""
    made: dict[str, Array] = {}
    for branch in branches:
        own = embeddings.of_branch(manifest, request.embeddings, branch.prefix)
        for name, value in own.items():
            rows = len(branches) * request.prompts
            made[name] = np.zeros((rows, *value.shape[1:]), value.dtype)
    return made


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
