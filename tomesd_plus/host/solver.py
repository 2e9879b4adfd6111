"""What a pipeline's scheduler is given at each step: whatever guidance makes of the denoiser's calls."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import Tensor

Take = Callable[[Tensor, Tensor], None]
"""``(model_output, sample)``, as the scheduler's ``step`` is given them."""


class _Step:
    """Stands in for a scheduler's ``step``; pipelines see its signature, and a copied scheduler has its own."""

    def __init__(self, scheduler: Any, take: Take) -> None:
        self._scheduler, self._step, self._take = scheduler, scheduler.step, take
        self._signature = inspect.signature(scheduler.step)
        update_wrapper(self, scheduler.step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        self._take(given["model_output"], given["sample"])
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))  # pipelines that make sound too copy theirs in mid-run
        return self if copied is None else MethodType(type(copied).step, copied)


@contextmanager
def solver_steps(pipe: Any, take: Take) -> Iterator[None]:
    """Have each step of a pipeline's scheduler told, inside a ``with`` block.

    Args:
        pipe: The pipeline.
        take: Told before the scheduler takes its step.

    Raises:
        TypeError: The pipeline has no scheduler.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"expected a pipeline with a scheduler, not {type(pipe).__name__}")
    before = vars(scheduler).get("step")
    scheduler.step = _Step(scheduler, take)
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before
