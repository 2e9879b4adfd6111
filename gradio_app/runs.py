"""A long call as a generator: it yields progress, and closing it stops the call."""

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from gradio_app.backend import OnProgress

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What is under way, and how many steps are done of how many."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class _Ended(Generic[T]):
    result: T | None = None
    error: BaseException | None = None


def follow(call: Callable[[OnProgress, threading.Event], T]) -> Generator[Progress, None, T]:
    """Run a call in a thread of its own and yield its progress; what it returns or raises comes last.

    A page's framework closes a generator when its user cancels or leaves. The call is then told to stop, and not
    waited for: it ends after the step under way.

    Args:
        call: Takes what to call with progress, and an event; once that is set it should end.
    """
    events: SimpleQueue[Progress | _Ended[T]] = SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        try:
            events.put(_Ended(call(lambda what, done, total: events.put(Progress(what, done, total)), stop)))
        except BaseException as error:  # it is raised again where the caller waits
            events.put(_Ended(error=error))

    threading.Thread(target=run, daemon=True).start()
    try:
        while isinstance(event := events.get(), Progress):
            yield event
    finally:
        stop.set()
    if event.error is not None:
        raise event.error
    return event.result  # type: ignore[return-value]
