"""A run in the background: its turn, its progress, its end; and as a generator whose closing stops it."""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
HEARTBEAT = 0.25  # seconds
OnProgress = Callable[[str, int, int], None]
"""Called with a description of the current work, the number of steps done, and their total."""


class Cancelled(Exception):
    """The run was stopped by its user."""


class Run:
    """One user's run: its progress, and whether it goes on."""

    def __init__(self, on_progress: OnProgress | None, stop: threading.Event) -> None:
        self.on_progress = on_progress
        self.stop = stop
        self.done = 0
        self.total = 1

    @contextmanager
    def turn(self, lock: threading.Lock) -> Iterator[None]:
        """Hold the lock; waiting for it ends when the run is stopped."""
        while not lock.acquire(timeout=0.05):
            self._check()
        try:
            self._check()
            yield
        finally:
            lock.release()

    def watch(self, what: str, counted: bool = True) -> Callable[[int], None]:
        """The callback for each step of one picture."""
        self._tell(what)

        def on_step(step: int) -> None:
            self.done += counted
            self._tell(what)

        return on_step

    def _tell(self, what: str) -> None:
        self._check()
        if self.on_progress:
            self.on_progress(what, self.done, self.total)

    def _check(self) -> None:
        if self.stop.is_set():
            raise Cancelled


@dataclass(frozen=True)
class Progress:
    """The current work, and how many of its steps are done."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class _Ended(Generic[T]):
    result: T | None = None
    error: BaseException | None = None


def follow(
    call: Callable[[OnProgress, threading.Event], T], stop: threading.Event | None = None
) -> Generator[Progress | None, None, T]:
    """Run a call in a thread of its own and yield its progress; what it returns or raises comes last.

    While there is nothing new it yields ``None`` now and then: a generator can be closed only where it yields.

    A page's framework closes a generator when its user cancels or leaves. The call is then asked to stop, and not
    waited for: it ends after the current step.

    Args:
        call: Takes a callback for progress, and an event; once that is set it should end.
        stop: The event, for whoever else may set it.
    """
    events: SimpleQueue[Progress | _Ended[T]] = SimpleQueue()
    stop = threading.Event() if stop is None else stop

    def run() -> None:
        try:
            events.put(_Ended(call(lambda what, done, total: events.put(Progress(what, done, total)), stop)))
        except BaseException as error:  # it is raised again where the caller waits
            events.put(_Ended(error=error))

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            try:
                event = events.get(timeout=HEARTBEAT)
            except Empty:
                yield None
                continue
            if isinstance(event, _Ended):
                break
            yield event
    finally:
        stop.set()
    if event.error is not None:
        raise event.error
    return event.result  # type: ignore[return-value]
