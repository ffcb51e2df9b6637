"""Measures how long the parts of a call take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Timings:
    """Seconds per stage. `encode` is next to nothing where the texts were encoded before, in an
    earlier call. `steps` has one entry per evaluation of the denoiser; time that the
    caller spends between steps counts nowhere but in `total`."""

    tokenize: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    steps: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to the stage."""
        start = perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + perf_counter() - start)
