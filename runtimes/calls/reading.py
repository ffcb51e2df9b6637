"""This module says what a call may ask for of its texts: weights of words, more chunks than one."""

from __future__ import annotations

from collections.abc import Mapping

from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.demand import Demand
from latentc.runtimes.programs.statements import Run
from latentc.runtimes.texts import prompt_weights

_Texts = Mapping[str, tuple[str, ...]]


def check_reading(
    facts: Facts, demand: Demand, texts: _Texts, weighting: bool, chunks: int
) -> None:
    """Refuse what this program cannot do with the texts of a call.

    Raises:
        InputError: texts longer than one chunk are asked for and the denoiser takes one length;
            marks that are no weights, or weights where it is not known which numbers are which
            word's.
    """
    if chunks > 1 and not facts.chunked:
        raise InputError(
            "this bundle's denoiser takes encoded texts of one length only: leave "
            "max_embeddings_multiples out"
        )
    if not weighting:
        return
    for own in texts.values():
        for text in own:
            prompt_weights.parse(text)
    live = [facts.program.steps[place] for place in demand.live]
    _check_weights(facts, [step for step in live if step in facts.encoders], texts)


def _check_weights(facts: Facts, runs: list[Run], texts: _Texts) -> None:
    """Refuse weights that cannot act, or not in all that is made of the text."""
    weighted: set[str] = set()  # texts whose words have numbers of their own
    others: dict[str, tuple[str, bool]] = {}  # those with weights: input, and whether a sequence
    for run in runs:
        columns = facts.positions.get(run.component, {})
        known = {name for own in columns.values() for name in own}
        sequence = any(len(spec.shape) > 2 for spec in facts.graphs[run.component].outputs.values())
        for name, tokens in run.feeds.items():
            own = texts[facts.tokens[tokens].text]
            if name in known:
                weighted.update(own)
            else:
                others |= {
                    text: (name, sequence) for text in own if not prompt_weights.parse(text).plain
                }
    for text, (name, sequence) in sorted(others.items()):
        if sequence:
            raise InputError(
                "prompt_weighting: this bundle does not say which numbers of its encoded texts "
                f"({name!r}) are which word's; leave the weights out"
            )
        if text not in weighted:
            raise InputError(
                f"prompt_weighting: what is made of {name!r} is one vector for the whole text, "
                "in which words have no weights; leave them out of that text"
            )
