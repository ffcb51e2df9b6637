"""The common runtime interface: named numpy arrays in, named numpy arrays out.

A backend fills in `_run` (and `_close` where its engine holds resources). Checking the
feeds and turning the engine's exceptions into `BackendError` is done once, here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtimes.errors import BackendError, InputError, LatentcError
from runtimes.errors import first_line as first_line  # for the many that look for it here

if TYPE_CHECKING:
    from runtimes.manifest import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]


class Session(ABC):
    """One loaded graph. `run` may be called from several threads, `close` from one.

    `inputs` and `outputs` are the manifest's tensor specifications by name. A dimension is
    an integer or a symbol such as ``"2*height"``; within one call a symbol has one value.
    """

    def __init__(self, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)
        self._dtypes = {name: np.dtype(spec.dtype) for name, spec in self.inputs.items()}
        self._closed = False

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            InputError: a missing or unknown name, a wrong dtype, rank or dimension.
            BackendError: the engine failed.
        """
        if self._closed:
            raise BackendError("this session is closed")
        self._check(feeds)
        with self._reporting():
            return self._run(feeds)

    def accepts(self, feeds: Feeds) -> bool:
        """Whether the graph can take these shapes: some builds are made for a few sizes only."""
        return True

    def bind(self, constants: Feeds) -> Session:
        """Return a session that feeds `constants` by itself at every call.

        Engines with memory of their own get them there once (`_place`). Closing the bound
        session leaves this one open.

        Raises:
            InputError: an unknown name, a wrong dtype or shape.
            BackendError: the engine failed.
        """
        return BoundSession(self, constants)

    def close(self) -> None:
        """Release the engine's resources. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _run(self, feeds: Feeds) -> dict[str, Array]:
        """Run with feeds that have been checked; return every output by name."""

    def _close(self) -> None:
        """Release what the engine holds; engines freed by reference counting need nothing."""

    def _place(self, constants: Feeds) -> Any:
        """Get arrays that many calls share to where the engine wants them, once."""
        return constants

    def _run_placed(self, feeds: Feeds, placed: Any) -> dict[str, Array]:
        """Run with the remaining feeds and what `_place` returned."""
        return self._run({**placed, **feeds})

    def _release(self, placed: Any) -> None:
        """Give back what `_place` took; what is freed by reference counting needs nothing."""

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn the engine's exceptions into BackendError."""
        try:
            yield
        except LatentcError:
            raise
        except Exception as error:
            raise BackendError(f"{type(self).__name__}: {first_line(error)}") from error

    def _check(self, feeds: Feeds) -> None:
        if feeds.keys() != self.inputs.keys():
            raise InputError(_name_mismatch(feeds, self.inputs))
        self._check_each(feeds, {})

    def _check_each(self, feeds: Feeds, symbols: dict[str, int]) -> None:
        """Check dtypes and shapes; `symbols` has what is known before and gets the rest."""
        for name, value in feeds.items():
            if value.dtype != self._dtypes[name]:
                raise InputError(
                    f"input {name!r}: expected {self.inputs[name].dtype}, found {value.dtype}"
                )
            self.inputs[name].check_shape(name, value.shape, symbols)


class BoundSession(Session):
    """A view of another session in which some inputs are already given, and in their place."""

    def __init__(self, session: Session, constants: Feeds) -> None:
        unknown = constants.keys() - session.inputs.keys()
        if unknown:
            raise InputError(f"cannot bind {sorted(unknown)}: inputs are {list(session.inputs)}")
        free = {n: s for n, s in session.inputs.items() if n not in constants}
        super().__init__(free, session.outputs)
        self._session = session
        arrays = {name: np.ascontiguousarray(value) for name, value in constants.items()}
        self._symbols: dict[str, int] = {}
        session._check_each(arrays, self._symbols)
        with session._reporting():
            self._placed = session._place(arrays)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run with the constants added. Raises as `Session.run` does."""
        if self._closed or self._session._closed:
            raise BackendError("this session is closed")
        if feeds.keys() != self.inputs.keys():
            raise InputError(_name_mismatch(feeds, self.inputs))
        self._session._check_each(feeds, dict(self._symbols))
        return self._run(feeds)

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        with self._session._reporting():
            return self._session._run_placed(feeds, self._placed)

    def _close(self) -> None:
        if not self._session._closed:
            self._session._release(self._placed)
        self._placed = None


def cast(session: Session, feeds: Feeds) -> dict[str, Array]:
    """The feeds in the dtypes that the session takes."""
    return {n: v.astype(session.inputs[n].dtype, copy=False) for n, v in feeds.items()}


def _name_mismatch(feeds: Feeds, inputs: Mapping[str, TensorSpec]) -> str:
    missing = sorted(inputs.keys() - feeds.keys())
    unknown = sorted(feeds.keys() - inputs.keys())
    parts = [f"missing {missing}"] if missing else []
    parts += [f"unknown {unknown}"] if unknown else []
    return f"wrong inputs: {', '.join(parts)}; expected {list(inputs)}"
