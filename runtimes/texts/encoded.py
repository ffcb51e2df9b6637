"""Encoded texts: the encoders' runs on token ids, and what they gave for earlier calls' texts."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.backends.sessions import Sessions
from latentc.runtimes.errors import NumericalError

_Key: TypeAlias = tuple[Any, ...]  # an encoder, and the name, shape and content of each input


class Encoded:
    """An `Encoded` keeps what encoders made of token ids.

    It keeps that of the texts that were used last, `entries` sets and `limit` bytes at most.
    Threads may share it.

    A set is all rows of a call. One row of it alone would do for more calls, but engines may round
    it differently in a batch of another size, and the image would depend on the calls before.
    """

    def __init__(self, entries: int = 32, limit: int = 32 << 20) -> None:
        self._entries, self._limit = entries, limit
        self._kept: dict[_Key, dict[str, Array]] = {}  # what was used last stands last
        self._lock = threading.Lock()

    def get(self, component: str, feeds: Mapping[str, Array]) -> dict[str, Array] | None:
        """Return the outputs for these inputs, not to be changed; None if they are not known."""
        key = _key(component, feeds)
        with self._lock:
            outputs = self._kept.pop(key, None)
            if outputs is not None:
                self._kept[key] = outputs
        return outputs

    def put(self, component: str, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Remember outputs, and forget those that were not used for longest."""
        kept = {name: value.view() for name, value in outputs.items()}
        for value in kept.values():
            value.flags.writeable = False
        with self._lock:
            self._kept[_key(component, feeds)] = kept
            while len(self._kept) > self._entries or self._size() > self._limit:
                del self._kept[next(iter(self._kept))]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()

    def _size(self) -> int:
        return sum(value.nbytes for kept in self._kept.values() for value in kept.values())


def run_encoder(
    sessions: Sessions, component: str, ids: Feeds, known: Encoded | None = None
) -> Mapping[str, Array]:
    """Return the outputs of an encoder for token ids, by input.

    One whose outputs are `known` is not run, nor opened.

    Raises:
        NumericalError: it returned NaN or infinity.
    """
    specs = sessions.components[component].inputs.items()
    feeds = {name: ids[name].astype(spec.dtype, copy=False) for name, spec in specs}
    outputs = known.get(component, feeds) if known else None
    if outputs is not None:
        return outputs
    with sessions.using(component) as session:
        outputs = _in_batches(session, feeds)
    for name, value in outputs.items():
        check_finite(component, name, value)
    if known:
        known.put(component, feeds, outputs)
    return outputs


def _key(component: str, feeds: Mapping[str, Array]) -> _Key:
    each = ((name, value.shape, value.tobytes()) for name, value in sorted(feeds.items()))
    return (component, *each)


def _in_batches(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run an encoder, row by row where it was loaded for one row."""
    rows = len(next(iter(feeds.values())))
    if rows == 1 or any(spec.shape[0] != 1 for spec in session.inputs.values()):
        return session.run(feeds)
    parts = [session.run({n: v[row : row + 1] for n, v in feeds.items()}) for row in range(rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}


def check_finite(component: str, name: str, value: Array, side: str = "output") -> None:
    """Raises NumericalError where an output or input of a component holds NaN or infinity."""
    if not np.isfinite(value).all():
        raise NumericalError(f"{component}: its {side} {name!r} holds NaN or infinity")
