"""The common runtime interface: named numpy arrays in, named numpy arrays out.

A backend fills in `_run` (and `_close` where its engine holds resources). Checking the
feeds and turning the engine's exceptions into `BackendError` is done once, here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtimes.errors import BackendError, InputError, LatentcError

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
        try:
            return self._run(feeds)
        except LatentcError:
            raise
        except Exception as error:
            raise BackendError(f"{type(self).__name__}: {first_line(error)}") from error

    def accepts(self, feeds: Feeds) -> bool:
        """Whether the graph can take these shapes: some builds are made for a few sizes only."""
        return True

    def bind(self, constants: Feeds) -> Session:
        """Return a session that feeds `constants` by itself at every call.

        Engines with their own memory override this and copy the constants to the device
        once. Closing the bound session leaves this one open.
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

    def _check(self, feeds: Feeds) -> None:
        if feeds.keys() != self.inputs.keys():
            raise InputError(_name_mismatch(feeds, self.inputs))
        symbols: dict[str, int] = {}
        for name, spec in self.inputs.items():
            value = feeds[name]
            if value.dtype != self._dtypes[name]:
                raise InputError(f"input {name!r}: expected {spec.dtype}, found {value.dtype}")
            spec.check_shape(name, value.shape, symbols)


class BoundSession(Session):
    """A view of another session in which some inputs are already given."""

    def __init__(self, session: Session, constants: Feeds) -> None:
        unknown = constants.keys() - session.inputs.keys()
        if unknown:
            raise InputError(f"cannot bind {sorted(unknown)}: inputs are {list(session.inputs)}")
        free = {n: s for n, s in session.inputs.items() if n not in constants}
        super().__init__(free, session.outputs)
        self._session = session
        self._constants = {name: np.ascontiguousarray(value) for name, value in constants.items()}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run with the constants added; the wrapped session checks all of them."""
        return self._session.run({**self._constants, **feeds})

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._session.run({**self._constants, **feeds})


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first non-empty line of an exception's text, shortened, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def _name_mismatch(feeds: Feeds, inputs: Mapping[str, TensorSpec]) -> str:
    missing = sorted(inputs.keys() - feeds.keys())
    unknown = sorted(feeds.keys() - inputs.keys())
    parts = [f"missing {missing}"] if missing else []
    parts += [f"unknown {unknown}"] if unknown else []
    return f"wrong inputs: {', '.join(parts)}; expected {list(inputs)}"
