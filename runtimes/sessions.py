"""The graphs of a loaded build: all kept in memory, or each only while it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from runtimes.errors import BackendError
from runtimes.manifest import Component
from runtimes.session import Session

Open = Callable[[str], Session]


class Sessions(Mapping[str, Session]):
    """Sessions by component.

    Args:
        components: what each takes and gives, its fixed sizes filled in.
        open_session: component → its session.
        keep: open all of them now and keep them; else each is opened when it is wanted and closed
            when nobody uses it.

    Raises:
        what `open_session` raises, at once or later; nothing is left open then.
    """

    def __init__(
        self, components: Mapping[str, Component], open_session: Open, keep: bool = True
    ) -> None:
        self.components = components
        self._open = open_session
        self._keep = keep
        self._opened: dict[str, Session] = {}
        self._users = dict.fromkeys(components, 0)
        self._lock = threading.RLock()
        self._closed = False
        try:
            for name in components if keep else ():
                self._opened[name] = open_session(name)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Session:
        """A session, opened if it is not; what is got like this is closed by `close`, or after
        its next use."""
        with self._lock:
            if name not in self._opened:
                if name not in self.components:
                    raise KeyError(name)
                if self._closed:
                    raise BackendError("this pipeline is closed")
                self._opened[name] = self._open(name)
            return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    @contextmanager
    def using(self, name: str) -> Iterator[Session]:
        """A session that stays open for the time inside."""
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

    def close(self) -> None:
        """Close what is open. Closing twice is harmless."""
        with self._lock:
            self._closed = True
            for session in self._opened.values():
                session.close()
