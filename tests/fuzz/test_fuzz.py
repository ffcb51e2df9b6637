"""Every parser takes damaged input for a few moments; `make fuzz` does it for long."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path

import pytest

from tests.fuzz import targets
from tests.fuzz.__main__ import found_inputs
from tests.fuzz.mutation import damaged

INPUTS = 60  # for each parser

NAMES = targets.names()


def test_every_parser_has_a_target() -> None:
    assert set(NAMES) <= set(targets.SEEDS), "enter good inputs for it in tests/fuzz/targets.py"
    assert len(NAMES) >= 25


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_raises_the_parsers_error(name: str) -> None:
    """The rest of a parser's life is `make fuzz`."""
    target = targets.target(name)
    for data in [*found_inputs(name), *damaged(target.seeds, INPUTS, seed=len(name))]:
        target.run(data)


def test_damage_is_of_many_kinds_and_the_same_each_time() -> None:
    seeds = (b'{"a": 1}', b"[1, 2, 3]")
    made = list(damaged(seeds, 500, seed=1))
    assert made[:2] == list(seeds)
    assert made == list(damaged(seeds, 500, seed=1))
    assert len(Counter(made)) > 300


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A parser that lets another exception through does not pass."""
    from latentc.runtimes.bundle import precision
    from latentc.runtimes.storage import parsing

    def broken(text: str) -> str:
        if "\0" in text:
            raise KeyError(text)
        return text

    name = "latentc.runtimes.bundle.precision:canonical"
    monkeypatch.setattr(precision, "canonical", broken)
    assert name in parsing.PARSERS
    target = targets.target(name)
    with pytest.raises(KeyError):
        deque(map(target.run, damaged(target.seeds, 2000, seed=1)), maxlen=0)
