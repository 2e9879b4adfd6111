"""Batches made by other processes ahead of need, so that drawing pictures does not hold up a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset


def ahead(make: Callable[[int], Any], start: int, stop: int, workers: int) -> Iterator[Any]:
    """``make(start)``, ``make(start + 1)`` and so on up to ``stop``, in order.

    Args:
        make: A pure function, so that the result is the same with any number of workers.
        start, stop: As of ``range``.
        workers: Processes; 0: none, each is made when it is asked for.
    """
    return iter(DataLoader(_Made(make, start, stop), batch_size=None, num_workers=workers))


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.make(self.start + index)
