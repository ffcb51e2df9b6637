"""Encoded texts as results: what a call makes of its texts, asked for by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from latentc.runtimes.arrays import Array
from latentc.runtimes.calls.choices import READING
from latentc.runtimes.calls.choosing import Calls
from latentc.runtimes.calls.request import Request
from latentc.runtimes.calls.signature import Signature
from latentc.runtimes.calls.values import boolean
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.demand import of_call
from latentc.runtimes.programs.values import Rows
from latentc.runtimes.unknown_names import suggestion


class Loaded(Protocol):
    """A `Loaded` has what encoding needs of a pipeline.

    See `latentc.runtimes.pipeline.pipeline.Pipeline`.
    """

    @property
    def calls(self) -> Calls: ...

    @property
    def signature(self) -> Signature: ...

    def computed(self, request: Request, names: Sequence[str]) -> dict[str, Array]: ...


def encode_prompt(pipeline: Loaded, given: Mapping[str, Any], guided: bool) -> dict[str, Array]:
    """See `latentc.runtimes.pipeline.pipeline.Pipeline.encode_prompt`."""
    signature = pipeline.signature
    guided = boolean({"do_classifier_free_guidance": guided}, "do_classifier_free_guidance")
    if not signature.embeddings:
        if not signature.texts:
            raise InputError("this bundle takes no texts")
        raise InputError("this bundle has no arguments for encoded texts; export it again")
    own = (*signature.texts, *signature.branch_texts, *READING)
    unknown = [name for name, value in given.items() if value is not None and name not in own]
    if unknown:
        hint = suggestion(unknown[0], own, "it takes")
        raise InputError(f"{unknown[0]!r} is no text of this bundle; {hint}")
    facts = pipeline.calls.facts[0]  # texts are encoded for all programs alike
    names = [name for name, value in given.items() if value is not None]
    demand = of_call(facts.program, names, None) if guided else facts.demand_of_base(names)
    groups = [name for group in facts.groups.values() for name in group]
    encoded = [name for name in groups if facts.types[name].rows == Rows.PROMPTS]
    wanted = [name for name in encoded if name in demand.values]
    texts = {name: given[name] for name in names if name in (*demand.arguments, *READING)}
    return pipeline.computed(pipeline.calls.request(texts, wanted), wanted)
