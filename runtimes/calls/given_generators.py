"""The generators that a call gives in the place of a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentc.runtimes.errors import InputError
from latentc.runtimes.sampling.torch_generators import TorchGenerator


def generators_of(given: Mapping[str, Any], images: int) -> tuple[TorchGenerator, ...]:
    """Return the generators of a call: one, or one for each image; none where it gives none.

    Raises:
        InputError: something else, others than the images need, or a seed beside them.
    """
    asked = given.get("generator")
    if asked is None:
        return ()
    if given.get("seed") is not None:
        raise InputError("'seed' and 'generator' both say what noise is drawn: give one of them")
    if not isinstance(asked, Sequence):
        return (TorchGenerator(asked),)
    if len(asked) != images:
        raise InputError(
            f"{len(asked)} generators for {images} images: give one, or one for each image"
        )
    return tuple(TorchGenerator(each) for each in asked)


def seeds_of(generators: Sequence[TorchGenerator]) -> tuple[int, ...]:
    """Return the seed that each generator began with."""
    return tuple(generator.seed for generator in generators)
