"""Noise that is drawn from a generator of PyTorch is what PyTorch draws from it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from latentc.runtimes.errors import InputError
from latentc.runtimes.sampling.torch_generators import TorchGenerator

SIZES = (40, 3, 3, 700, 5, 1248, 624, 1)  # beyond a block of words, and small draws that keep one


def of_seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_both_draw_in_turn(seed: int) -> None:
    """Whoever draws goes on where the other one stopped."""
    ours, theirs = of_seed(seed), of_seed(seed)
    drawn = TorchGenerator(ours)
    for place, size in enumerate(SIZES * 2):
        wanted = torch.randn(size, generator=theirs).numpy()
        mixed = torch.randn(size, generator=ours).numpy() if place % 3 == 2 else drawn.randn(size)
        np.testing.assert_allclose(mixed, wanted, atol=1e-6)
        assert torch.equal(ours.get_state(), theirs.get_state()) or size < 16
    assert ours.initial_seed() == seed


def test_whether_it_has_drawn() -> None:
    generator = of_seed(3)
    assert TorchGenerator(generator).fresh
    TorchGenerator(generator).randn(2)
    assert not TorchGenerator(generator).fresh
    assert TorchGenerator(generator.manual_seed(3)).fresh
    assert not TorchGenerator(of_seed(4).set_state(_drawn(4))).fresh


def _drawn(seed: int) -> torch.Tensor:
    generator = of_seed(seed)
    torch.randn(100, generator=generator)
    return generator.get_state()


def of_another_version() -> Any:
    state = torch.zeros(16, dtype=torch.uint8)
    nothing = SimpleNamespace(initial_seed=lambda: 1, get_state=lambda: state)
    nothing.set_state = nothing.get_state
    return nothing


class OnTheGpu:
    """Looks like a generator of a device that is not here."""

    device = "cuda:0"

    def initial_seed(self) -> int:
        return 1

    get_state = set_state = initial_seed


@pytest.mark.parametrize(
    ("generator", "says"),
    [
        (lambda: OnTheGpu(), "'generator' draws on cuda:0, .*torch.Generator\\('cpu'\\)"),
        (lambda: np.random.default_rng(1), "must be a torch.Generator on the CPU"),
        (lambda: 3, "must be a torch.Generator on the CPU, .*not 3; without PyTorch give 'seed'"),
        (of_another_version, "its state is none that this latentc can read"),
    ],
)
def test_what_is_none(generator: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TorchGenerator(generator())
