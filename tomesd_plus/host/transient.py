"""State that copies and pickles leave behind: in a copy it is as new."""

import threading
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Key = TypeVar("Key")
Value = TypeVar("Value")


class ThreadLocal(threading.local):
    """Fields of which each thread has its own; a subclass sets them in its ``__init__``, without arguments.

    Fields must not be class attributes: ``torch.compile`` traces those of an instance only.
    """

    def __reduce__(self) -> Any:
        return type(self), ()


class Transient(Generic[T]):
    """Holds a value, or ``None``."""

    def __init__(self, value: T | None = None) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return type(self), ()


class TransientDict(dict[Key, Value]):
    """A dictionary that is empty in a copy."""

    def __reduce__(self) -> Any:
        return type(self), ()
