"""Token ids and numbers → the tensors that condition the denoiser.

Guidance branches are joined along the batch axis, in the manifest's order: branch g of N
images has the rows g*N .. (g+1)*N-1, the images of one prompt next to each other.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from runtimes.errors import NumericalError
from runtimes.manifest import Branch, Manifest, VectorInput
from runtimes.request import Request
from runtimes.session import Array, Feeds, Session
from runtimes.sessions import Sessions

_Key: TypeAlias = tuple[Any, ...]  # an encoder, and the name, shape and content of each input


class Encoded:
    """What encoders made of token ids: of the texts that were used last, `entries` sets of them and
    `limit` bytes at most. Threads may share it.

    A set is all rows of a call. One row of it alone would do for more calls, but engines may round
    it differently in a batch of another size, and the picture would depend on the calls before.
    """

    def __init__(self, entries: int = 32, limit: int = 32 << 20) -> None:
        self._entries, self._limit = entries, limit
        self._kept: dict[_Key, dict[str, Array]] = {}  # what was used last stands last
        self._lock = threading.Lock()

    def get(self, component: str, feeds: Mapping[str, Array]) -> dict[str, Array] | None:
        """The outputs for these inputs, not to be changed; None if they are not known."""
        key = _key(component, feeds)
        with self._lock:
            found = self._kept.pop(key, None)
            if found is not None:
                self._kept[key] = found
        return found

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
    """The outputs of an encoder for token ids, by input; one whose outputs are `known` is not run,
    nor opened.

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


def vectors(manifest: Manifest, request: Request, branches: Sequence[Branch]) -> dict[str, Array]:
    """The denoiser inputs that are made of call arguments: float32 [branches * images, n]."""
    made = {}
    for vector in manifest.vectors:
        rows = [_vector(manifest, request, vector, branch.prefix) for branch in branches]
        made[vector.input] = np.repeat(np.array(rows, np.float32), request.images, axis=0)
    return made


def windowed(
    manifest: Manifest, request: Request, constants: Mapping[str, Array], evaluations: int
) -> list[dict[str, Array]]:
    """For each evaluation of the denoiser the vectors that are not the same in all of them, as
    diffusers' ControlNet and T2I-Adapter pipelines count it; empty ones where none changes.

    Args:
        constants: the vectors' rows, where they are not 0.
    """
    kept = {
        vector.input: _kept(manifest, request, vector, evaluations)
        for vector in manifest.vectors
        if vector.window or vector.until
    }
    if all(each.all() for each in kept.values()):
        return [{}] * evaluations
    return [
        {name: constants[name] * each[index].astype(np.float32) for name, each in kept.items()}
        for index in range(evaluations)
    ]


def _kept(manifest: Manifest, request: Request, vector: VectorInput, evaluations: int) -> Array:
    """Whether each value of a vector is itself in each evaluation, and not 0: bool
    [evaluations, values], or [evaluations, 1] for all values alike."""
    made = np.ones((evaluations, 1), bool)
    places = np.arange(evaluations).reshape(-1, 1)
    if vector.window:
        start, end = (np.array(_numbers(manifest, request, each)) for each in vector.window)
        made = made & (places / evaluations >= start) & ((places + 1) / evaluations <= end)
    if vector.until:
        (share,) = _numbers(manifest, request, vector.until)
        # Of the step count, though some schedulers evaluate more often: so does diffusers.
        made = made & (places < int(request.num_inference_steps * share))
    return made


def _numbers(manifest: Manifest, request: Request, name: str) -> list[float]:
    (argument,) = (each for each in manifest.arguments if each.name == name)
    default = request.task.defaults.get(name, argument.default)
    return [float(v) for v in request.numbers.get(name, default)]


def check_finite(component: str, name: str, value: Array, side: str = "output") -> None:
    """Raises NumericalError where an output or input of a component holds NaN or infinity."""
    if not np.isfinite(value).all():
        raise NumericalError(f"{component}: its {side} {name!r} holds NaN or infinity")


def _vector(manifest: Manifest, request: Request, vector: VectorInput, prefix: str) -> list[float]:
    """A branch's own value of each argument, else that of the call, else the default."""
    sizes = dict(zip(("height", "width"), map(float, request.size.told), strict=True))
    arguments = {argument.name: argument for argument in manifest.arguments}
    values: list[float] = []
    for name in vector.arguments:
        # A branch may have a default of its own, which counts as what is given would.
        own = prefix + name in arguments and request.task.counts(prefix + name, request.numbers)
        named = prefix + name if own else name
        given = request.numbers.get(prefix + name, request.numbers.get(named))
        default = request.task.defaults.get(named, arguments[named].default)
        values += given or (sizes[v] if isinstance(v, str) else float(v) for v in default)
    return values
