"""The graphs of a loaded build: all kept in memory, or each only while it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from latentc.runtimes.backends.session import Session
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import BackendError

Open = Callable[[str], Session]


class Sessions(Mapping[str, Session]):
    """Sessions by component.

    Args:
        components: what each takes and gives, its fixed sizes filled in.
        open_session: component → its session.
        keep: open all of them now and keep them; else each is opened when it is wanted and closed
            when nobody uses it.
        parallel: with `keep`, open all at once, each in a thread of its own.
        later: those to open when they are first wanted, and keep then.

    Raises:
        what `open_session` raises, at once or later, for the first component that it refuses;
            nothing is left open then.
    """

    def __init__(
        self,
        components: Mapping[str, Component],
        open_session: Open,
        keep: bool = True,
        parallel: bool = False,
        later: Collection[str] = (),
    ) -> None:
        self.components = components
        self._open = open_session
        self._keep = keep
        self._opened: dict[str, Session] = {}
        self._users = dict.fromkeys(components, 0)
        self._lock = threading.RLock()
        self._closed = False
        self._first = [name for name in components if keep and name not in later]
        if not self._first:
            return
        try:
            if parallel:
                self._open_together()
            else:
                for name in self._first:
                    self._opened[name] = open_session(name)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Session:
        """Return a session, opened if it is not.

        One that is got like this is closed by `close`, or after its next use.
        """
        with self._lock:
            if name not in self.components:
                raise KeyError(name)
            self._refuse_closed()
            if name not in self._opened:
                self._opened[name] = self._open(name)
                if self._closed:  # by a signal handler, say, while it was opened
                    self._opened.pop(name).close()
                    self._refuse_closed()
            return self._opened[name]

    def _refuse_closed(self) -> None:
        if self._closed:
            raise BackendError("this pipeline is closed")

    def __iter__(self) -> Iterator[str]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    @contextmanager
    def using(self, name: str) -> Iterator[Session]:
        """Yield a session that stays open for the time inside."""
        with self._lock:
            session = self[name]
            self._users[name] += 1
        try:
            yield session
        finally:
            with self._lock:
                self._users[name] -= 1
                if not self._keep and not self._users[name] and name in self._opened:
                    self._opened.pop(name).close()

    def _open_together(self) -> None:
        """Open all components at once; the first one's error, in their order, is raised when
        every thread is done, so that nothing is opened behind a caller who has given up."""
        opened: dict[str, Session] = {}
        failed: dict[str, BaseException] = {}

        def work(name: str) -> None:
            try:
                opened[name] = self._open(name)
            except BaseException as error:
                failed[name] = error

        # concurrent.futures would do as well, and imports what a start has no other use for.
        first, *others = self._first
        threads = [threading.Thread(target=work, args=(n,), name=f"latentc-{n}") for n in others]
        try:
            for thread in threads:
                thread.start()
            work(first)
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._opened = {name: opened[name] for name in self._first if name in opened}
        for name in self._first:
            if name in failed:
                raise failed[name]

    def close(self) -> None:
        """Close what is open, as `Session.close` does it. Closing twice is harmless."""
        self._closed = True
        with self._lock:
            sessions = list(self._opened.values())
        for session in sessions:
            session.close()
