"""Bundles that tests of one file share, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import latentc

Ours = Callable[..., latentc.Pipeline]


@contextmanager
def kept_open(bundle_of: Callable[[str], Path]) -> Iterator[Ours]:
    """A function: name and backend → the loaded bundle; all are closed in the end."""
    loaded: dict[tuple[str, str], latentc.Pipeline] = {}

    def get(name: str, backend: str = "onnxruntime") -> latentc.Pipeline:
        if (name, backend) not in loaded:
            loaded[name, backend] = latentc.load(bundle_of(name), backend=backend)
        return loaded[name, backend]

    try:
        yield get
    finally:
        for pipe in loaded.values():
            pipe.close()
