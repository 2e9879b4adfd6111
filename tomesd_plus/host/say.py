"""Warnings to the user, shown each time: which is once is decided here, not by what Python has shown before."""

import sys
import warnings


def warn(message: str, stacklevel: int = 2) -> None:
    """``warnings.warn``, also for a text that was told before from the same line, of another model or again later.

    Filters of the user's hold: what is ignored is, and what is an error is raised.

    Args:
        message: What, why, and what to do.
        stacklevel: 2 is the line that has called the caller.
    """
    frame = sys._getframe(1)
    for _ in range(stacklevel - 1):
        frame = frame.f_back or frame  # beyond the stack: its outermost one
    module = frame.f_globals.get("__name__", "sys")
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry={})
