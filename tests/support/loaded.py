"""Bundles that tests of one file share, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import latentc

EAGER = "eager"  # in the place of an engine: PyTorch's modules, of which nothing is captured
Ours = Callable[..., latentc.Pipeline]


@contextmanager
def kept_open(
    bundle_of: Callable[[str], Path],
    uncaptured: Callable[[str], latentc.Pipeline] | None = None,
) -> Iterator[Ours]:
    """A function: name and backend → the loaded bundle; all are closed in the end.

    Args:
        bundle_of: a name → the bundle's folder.
        uncaptured: a name → the same over PyTorch's modules, which is meant where a test names no
            backend.
    """
    loaded: dict[tuple[str, str], latentc.Pipeline] = {}

    def get(name: str, backend: str | None = None) -> latentc.Pipeline:
        engine = backend or ("onnxruntime" if uncaptured is None else EAGER)
        if (name, engine) not in loaded:
            if engine == EAGER and uncaptured is not None:
                loaded[name, engine] = uncaptured(name)
            else:
                loaded[name, engine] = latentc.load(bundle_of(name), backend=engine)
        return loaded[name, engine]

    try:
        yield get
    finally:
        for pipe in loaded.values():
            pipe.close()
