"""The common runtime interface: named numpy arrays in, named numpy arrays out.

A backend fills in `_run` (and `_close` where its engine holds resources). Checking the feeds and
what comes out, turning the engine's exceptions into `BackendError`, and closing while calls are in
flight are done once, here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from traceback import clear_frames
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.calls_in_flight import Call, Calls, current, in_flight
from latentc.runtimes.errors import BackendError, InputError, LatentcError, NumericalError
from latentc.runtimes.errors import first_line as first_line  # for the many that look for it here

if TYPE_CHECKING:
    from latentc.runtimes.bundle.structures import TensorSpec

Feeds = Mapping[str, Array]


class Session(ABC):
    """One loaded graph. `run` and `close` may be called from any thread.

    `inputs` and `outputs` are the manifest's tensor specifications by name. A dimension is
    an integer or a symbol such as ``"2*height"``; within one call a symbol has one value.
    `component` is the manifest's name of what the graph is, for messages.
    """

    component = "this graph"

    def __init__(self, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)
        self._dtypes = {
            name: np.dtype(spec.dtype) for name, spec in (self.inputs | self.outputs).items()
        }
        self._calls = Calls("this session is closed")
        self._places: dict[int, Any] = {}  # what `_place` returned, by a number of its own
        self._numbers = count()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            InputError: a missing or unknown name, a wrong dtype, rank or dimension.
            BackendError: the engine failed, or what came out is not what the manifest says; the
                session is closed, or was while the graph ran.
        """
        with in_flight() as call, self._calls.including(call):
            symbols = self._check(feeds)
            with self._reporting(call):
                outputs = self._run(feeds)
                self._check_outputs(outputs, symbols)
            return outputs

    def accepts(self, feeds: Feeds) -> bool:
        """Return whether the graph can take these shapes: some builds are made for a few sizes
        only.
        """
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
        """Release the engine's resources. Closing twice is harmless.

        Calls in flight are ended where the engine can do that, and waited for. From inside of a
        call of this session, as in a signal handler, this returns at once, and the resources are
        released when the call has ended.
        """
        self._calls.close(self._close_all)

    def _close_all(self) -> None:
        """Release what was placed, then the engine."""
        try:
            for number in tuple(self._places):
                self._release(self._places.pop(number))
        finally:
            self._close()

    def hold(self, constants: Feeds) -> int:
        """Place arrays that were checked, and return the number that they have from then on.

        The session alone refers to what was placed, so that closing it ends the engine's objects
        whatever still waits to be freed in other threads: one of PyTorch's that a thread frees
        while Python shuts down ends the process.
        """
        with in_flight() as call, self._calls.including(call), self._reporting(call):
            placed = self._place(constants)
            number = next(self._numbers)
            self._places[number] = placed
            return number

    def run_held(self, feeds: Feeds, number: int) -> dict[str, Array]:
        """Run with the remaining feeds, which were checked, and what `hold` placed."""
        call = current()
        with self._calls.including(call), self._reporting(call):
            return self._run_placed(feeds, self._places[number])

    def give_back(self, number: int) -> None:
        """Release what `hold` placed; nothing is left to do where the session is closed."""
        try:
            with self._calls.including(current()):
                self._release(self._places.pop(number))
        except BackendError:
            if not self._calls.closed:  # which has released what was placed with everything else
                raise

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
    def _reporting(self, call: Call | None = None) -> Iterator[None]:
        """Turn the engine's exceptions into BackendError, and free what the failed call held: an
        exception keeps every variable on its way, for as long as somebody keeps the exception."""
        try:
            yield
        except LatentcError as error:
            clear_frames(error.__traceback__)
            raise
        except Exception as error:
            clear_frames(error.__traceback__)
            if call is not None and call.cancelled:
                raise BackendError(f"{self.component}: cancelled while it ran") from error
            named = f"{self.component}: {type(self).__name__}"
            raise BackendError(f"{named}: {first_line(error)}") from error

    def _abortable(self, abort: Callable[[], None]) -> AbstractContextManager[None]:
        """Let other threads end what the engine does inside by calling `abort`, which makes the
        engine raise an exception of its own."""
        return current().abortable(abort)

    def _check(self, feeds: Feeds) -> dict[str, int]:
        """Check names, dtypes and shapes; returns the values of the shapes' symbols."""
        if feeds.keys() != self.inputs.keys():
            raise InputError(_name_mismatch(feeds, self.inputs))
        symbols: dict[str, int] = {}
        self.check_each(feeds, symbols)
        return symbols

    def check_each(self, feeds: Feeds, symbols: dict[str, int]) -> None:
        """Check dtypes and shapes; `symbols` has what is known before and gets the rest."""
        for name, value in feeds.items():
            if value.dtype != self._dtypes[name]:
                raise InputError(
                    f"input {name!r}: expected {self.inputs[name].dtype}, found {value.dtype}"
                )
            self.inputs[name].check_shape(name, value.shape, symbols)

    def _named(self, values: Iterable[Array]) -> dict[str, Array]:
        """Return what an engine gives in the manifest's order of outputs, by name.

        Raises:
            BackendError: it gives more or fewer.
        """
        arrays = list(values)
        if len(arrays) != len(self.outputs):
            raise BackendError(
                f"{self.component}: the graph gives {len(arrays)} outputs where the manifest has "
                f"{list(self.outputs)}; the bundle is damaged, export it again"
            )
        return dict(zip(self.outputs, arrays, strict=True))

    def _check_outputs(self, outputs: Any, symbols: dict[str, int]) -> None:
        """Check what the engine gives: arrays by name, dtypes and shapes, with the inputs' symbols.

        Raises:
            BackendError: it is not what the manifest says.
        """
        found = outputs.keys() if isinstance(outputs, Mapping) else type(outputs).__name__
        if found != self.outputs.keys():
            raise BackendError(
                f"{self.component}: expected the outputs {sorted(self.outputs)}, found "
                f"{found if isinstance(found, str) else sorted(map(str, found))}"
            )
        for name, value in outputs.items():
            spec = self.outputs[name]
            # Subclasses have rules of their own: what is masked hides NaN from every check.
            plain = type(value) is np.ndarray
            dtype, shape = value.dtype if plain else type(value).__name__, np.shape(value)
            if dtype != self._dtypes[name] or not spec.fits(shape, symbols):
                raise BackendError(
                    f"{self.component}: its output {name!r} is {dtype} {list(shape)}, and the "
                    f"manifest says {spec.dtype} {list(spec.shape)} where {symbols}; the bundle "
                    "is damaged, export it again"
                )


class BoundSession(Session):
    """A view of another session in which some inputs are already given, and in their place."""

    def __init__(self, session: Session, constants: Feeds) -> None:
        unknown = constants.keys() - session.inputs.keys()
        if unknown:
            raise InputError(f"cannot bind {sorted(unknown)}: inputs are {list(session.inputs)}")
        free = {n: s for n, s in session.inputs.items() if n not in constants}
        super().__init__(free, session.outputs)
        self.component = session.component
        self._session = session
        arrays = {name: np.ascontiguousarray(value) for name, value in constants.items()}
        self._symbols: dict[str, int] = {}
        session.check_each(arrays, self._symbols)
        self._number = session.hold(arrays)

    def _check(self, feeds: Feeds) -> dict[str, int]:
        if feeds.keys() != self.inputs.keys():
            raise InputError(_name_mismatch(feeds, self.inputs))
        symbols = dict(self._symbols)
        self._session.check_each(feeds, symbols)
        return symbols

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._session.run_held(feeds, self._number)

    def _close(self) -> None:
        self._session.give_back(self._number)


def cast(session: Session, feeds: Feeds) -> dict[str, Array]:
    """Return the feeds in the dtypes that the session takes.

    Raises:
        NumericalError: a number is beyond its dtype, in which it would be infinite; a graph may
            hide that.
    """
    with np.errstate(over="ignore"):
        made = {n: v.astype(session.inputs[n].dtype, copy=False) for n, v in feeds.items()}
    for name, value in made.items():
        narrower = value.dtype.kind == "f" and value.dtype.itemsize < feeds[name].dtype.itemsize
        if narrower and not np.isfinite(value).all():
            raise NumericalError(
                f"{session.component}: its input {name!r} holds numbers beyond {value.dtype}"
            )
    return made


def _name_mismatch(feeds: Feeds, inputs: Mapping[str, TensorSpec]) -> str:
    missing = sorted(inputs.keys() - feeds.keys())
    unknown = sorted(feeds.keys() - inputs.keys())
    parts = [f"missing {missing}"] if missing else []
    parts += [f"unknown {unknown}"] if unknown else []
    return f"wrong inputs: {', '.join(parts)}; expected {list(inputs)}"
