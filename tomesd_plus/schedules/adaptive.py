"""A ratio that looks at the tokens."""

from dataclasses import dataclass

from tomesd_plus.schedules.checks import check_ratios


@dataclass(frozen=True)
class AdaptiveRatio:
    """As many tokens as are in fact alike, in few fixed sizes: plain pictures lose more, busy ones fewer.

    Unlike a schedule it looks at the tokens, so each plan waits for the device once, to read one number.

    Args:
        similarity: Cosine similarity, in [-1, 1], from which on a source counts as like its destination.
        ratios: The ratios to choose from, in [0, 1). The greatest is taken that is not above the share of tokens
            which are alike, averaged over the batch; none, if all are above it.

    Raises:
        ValueError: There are no ratios, or a value is outside its range.
    """

    similarity: float = 0.9
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not self.ratios:
            raise ValueError("AdaptiveRatio needs at least one ratio")
        check_ratios(self.ratios)
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity must lie in [-1, 1], not {self.similarity!r}")

    def removed(self, tokens: int, most: int, alike: float) -> int:
        """How many tokens to remove.

        Args:
            tokens: Of the level.
            most: The most that can be removed there.
            alike: How many are alike, averaged over the batch.
        """
        counts = (min(int(tokens * ratio), most) for ratio in self.ratios)
        return max((count for count in counts if count <= alike), default=0)
