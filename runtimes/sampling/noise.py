"""Gaussian noise that equals PyTorch's on the CPU, in numpy.

``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`` is defined by its
generator and two recipes, both reproduced here (ATen's ``CPUGeneratorImpl.cpp``,
``native/cpu/DistributionTemplates.h`` and ``core/DistributionsHelper.h``):

- The generator is MT19937 seeded with the low 32 bits of the seed: the stream of numpy's
  legacy ``RandomState``, which numpy guarantees never to change.
- 16 values or more: one 32-bit word per value gives a 24-bit uniform, and Box-Muller pairs
  value i with i + 8 in each block of 16. If the size is no multiple of 16, the last 16
  values are drawn anew, over the end of the full blocks.
- Fewer than 16 values: scalar Box-Muller in double precision, two words per uniform. It
  makes two values at a time; the second is kept for the next small draw of the same
  generator, whatever large draws come between.

Small draws are bit-equal to PyTorch's. For large ones the words and the uniforms are
bit-equal and the logarithms and sines are each library's own float32 ones. Measured against
PyTorch 2.13 (AVX-512, numpy 2.3.5): 86% of 3 x 2**22 values are bit-equal, the largest
difference is 7.2e-7, the largest relative one 3.5e-7. Evaluating in float64 and rounding
comes no closer (83% bit-equal, 4.8e-7) and takes 2.5 times as long.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from latentc.runtimes.errors import InputError

if TYPE_CHECKING:
    from numpy.random import RandomState

FloatArray: TypeAlias = npt.NDArray[np.float32]

_BLOCK = 16  # values per Box-Muller block, and the size from which the block recipe is used
_HALF = _BLOCK // 2
_MASK24 = np.uint32(0xFFFFFF)
_TWO_PI = np.float32(2.0 * math.pi)


class Generator:
    """Draws what a ``torch.Generator("cpu")`` of the same seed draws, call after call.

    Args:
        seed: -2**63 to 2**64 - 1, PyTorch's range; as there, only the low 32 bits count.

    Raises:
        InputError: the seed is no integer or out of range.

    A generator changes with each draw: do not share one between threads.
    """

    __slots__ = ("_cached", "_words", "seed")

    def __init__(self, seed: SupportsIndex) -> None:
        # Imported here because numpy.random costs about 15 ms, which a program that only
        # loads a bundle need not pay.
        from numpy.random import RandomState

        self.seed: int = _check_seed(seed)
        self._words: RandomState = RandomState(self.seed & 0xFFFFFFFF)
        self._cached: float | None = None

    def __repr__(self) -> str:
        return f"Generator(seed={self.seed})"

    def randn(self, shape: int | Sequence[int]) -> FloatArray:
        """Return the next standard normal values, as a C-contiguous float32 array of `shape`.

        Raises:
            InputError: a negative dimension.
        """
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(dim < 0 for dim in dims):
            raise InputError(f"cannot draw noise of shape {dims}: a dimension is negative")
        size = math.prod(dims)
        values = self._draw_blocks(size) if size >= _BLOCK else self._draw_scalars(size)
        return values.reshape(dims)

    def _draw_blocks(self, size: int) -> FloatArray:
        values = self._uniform24(size)
        tail = size % _BLOCK
        if tail:
            # The full blocks first: the last of them is partly overwritten, not redrawn.
            _box_muller(values[: size - tail])
            values[-_BLOCK:] = self._uniform24(_BLOCK)
            _box_muller(values[-_BLOCK:])
        else:
            _box_muller(values)
        return values

    def _draw_scalars(self, size: int) -> FloatArray:
        return np.array([self._next_scalar() for _ in range(size)], dtype=np.float32)

    def _next_scalar(self) -> float:
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        angle = 2.0 * math.pi * self._uniform53()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform53()))
        self._cached = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform24(self, size: int) -> FloatArray:
        """Return float32 in [0, 1), multiples of 2**-24, from one word each."""
        words = self._next_words(size)
        words &= _MASK24
        values = words.astype(np.float32)
        values *= np.float32(2.0**-24)
        return values

    def _uniform53(self) -> float:
        """Return a float in [0, 1), a multiple of 2**-53, from two words, the high one first."""
        high, low = self._next_words(2).tolist()
        return float(((high << 32) | low) & ((1 << 53) - 1)) * 2.0**-53

    def _next_words(self, count: int) -> npt.NDArray[np.uint32]:
        # The full range makes randint hand out the generator's 32-bit words unchanged.
        return self._words.randint(0, 1 << 32, size=count, dtype=np.uint32)


Generators: TypeAlias = Generator | Sequence[Generator]


def draw(generators: Generators, shape: Sequence[int]) -> FloatArray:
    """Return the noise of a batch, as diffusers' ``randn_tensor`` draws it.

    Args:
        generators: one generator draws the whole batch in one go; a sequence has one per
            image, so that an image's noise does not depend on the others in its batch.
        shape: batch first.

    Returns:
        float32, of `shape`.

    Raises:
        InputError: the number of generators is neither 1 nor the batch size.

    The two kinds differ even for equal seeds: small shapes and the redrawn tail make a batch
    of n something else than n images. A sequence of one is the same as that one, as in
    diffusers.
    """
    if isinstance(generators, Generator):
        return generators.randn(shape)
    if len(generators) == 1:
        return generators[0].randn(shape)
    if len(generators) != shape[0]:
        raise InputError(
            f"{len(generators)} generators for a batch of {shape[0]}: give one, or one per image"
        )
    one = (1, *shape[1:])
    return np.concatenate([generator.randn(one) for generator in generators])


def seeded(seed: SupportsIndex | Sequence[SupportsIndex]) -> Generators:
    """Return generators for `draw`: one for a single seed, one per image for a sequence of seeds.

    Raises:
        InputError: a seed is no integer or out of range, or the sequence is empty.
    """
    if not isinstance(seed, Sequence):
        return Generator(seed)
    if isinstance(seed, str | bytes) or not seed:
        raise InputError(f"seed must be an integer or a non-empty list of integers, not {seed!r}")
    return [Generator(each) for each in seed]


def fresh_seed() -> int:
    """Return a seed in [0, 2**32) from the operating system, for when the user gives none."""
    return int.from_bytes(os.urandom(4), "little")


def _box_muller(values: FloatArray) -> None:
    """Turns uniforms into normals in place, in blocks of 16: pair i with i + 8.

    All in float32, like PyTorch: the rounding of the angle is part of the result.
    """
    blocks = values.reshape(-1, 2, _HALF)
    radius = np.float32(1.0) - blocks[:, 0]  # in (0, 1], so that the logarithm is finite
    np.log(radius, out=radius)
    radius *= np.float32(-2.0)
    np.sqrt(radius, out=radius)
    angle = blocks[:, 1] * _TWO_PI
    np.multiply(radius, np.cos(angle), out=blocks[:, 0])
    np.multiply(radius, np.sin(angle), out=blocks[:, 1])


def _check_seed(seed: SupportsIndex) -> int:
    if isinstance(seed, bool):
        raise InputError(f"seed must be an integer, not {seed!r}")
    try:
        value = operator.index(seed)
    except TypeError:
        raise InputError(f"seed must be an integer, not {seed!r}") from None
    if not -(2**63) <= value < 2**64:
        raise InputError(f"seed must be from -2**63 to 2**64 - 1, not {value}")
    return value
