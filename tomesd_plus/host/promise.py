"""Whether what was asked for happens: said once if not, and again when it stops later."""

from tomesd_plus.host.say import warn


class Promise:
    """What was asked for, judged generation by generation.

    Args:
        broken: How a warning begins: what does not happen.
    """

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self._kept = True

    def judge(self, why_not: str | None) -> None:
        """After a generation in which it should have happened.

        Args:
            why_not: The reason and the mend; ``None`` if it has happened.
        """
        before, self._kept = self._kept, why_not is None  # first: a warning may be raised as an error
        if before and why_not is not None:
            warn(f"{self.broken}: {why_not}.", stacklevel=2)
