"""What merging did: tokens removed per layer, level and step, and which layers were left alone and why."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tomesd_plus.merging.attachment import TokenMerger


@dataclass
class LayerRecord:
    """A layer in the latest generation.

    Args:
        name: The layer's name in its model.
        downsample: Its level; ``None`` if its token count fits no level.
        calls: How often it ran.
        tokens: Tokens that it was given, over all calls, of one sample.
        removed: Tokens that merging removed from it, likewise.
        reason: Why its latest call was left alone; ``None`` if it was merged.
    """

    name: str
    downsample: int | None = None
    calls: int = 0
    tokens: int = 0
    removed: int = 0
    reason: str | None = None

    @property
    def share(self) -> float:
        """Share of tokens removed, in [0, 1)."""
        return self.removed / self.tokens if self.tokens else 0.0


@dataclass
class StepRecord:
    """A step of the latest generation: the share of tokens that was removed at each level."""

    index: int | None
    noise_level: float
    removed: dict[int, float] = field(default_factory=dict)


class TokenMergingReport:
    """A live view of what merging does to a pipeline; it always tells of the latest generation.

    Args:
        mergers: The mergers of the pipeline's models, by the models' names.
    """

    def __init__(self, mergers: dict[str, "TokenMerger"]) -> None:
        self._mergers = mergers

    @property
    def layers(self) -> list[LayerRecord]:
        """Every layer around which merging is configured, in order of execution, and those it could not be put on.

        With several models, names start with the model's.
        """
        return [record for merger in self._mergers.values() for record in merger.records.values()]

    @property
    def steps(self) -> list[StepRecord]:
        """The first model's steps."""
        return list(next(iter(self._mergers.values())).steps)

    def merge_map(self, level: int | None = None) -> Tensor | None:
        """How many tokens each token was merged with, itself counted, in the first model's latest step.

        Args:
            level: The downsample to show; the finest that was merged by default.

        Returns:
            (height, width) of the level's tokens, int64, on the CPU, for the last sample of the batch, which under
            guidance is one with the prompt; ``None`` if nothing was merged there. Where blocks have plans of their
            own it shows the last block's.
        """
        merger = next(iter(self._mergers.values()))
        plans = {key[0]: plan for key, plan in merger.planner.plans.items()}
        level = min(plans, default=None) if level is None else level
        if level not in plans:
            return None
        sizes = plans[level].sizes[-1].gather(0, plans[level].inverse[-1])
        grid = next(grid for grid in merger.levels.values() if grid.downsample == level)
        return sizes.reshape(grid.height, grid.width).cpu()

    @property
    def removed(self) -> dict[int, float]:
        """Share of tokens removed at each level at which layers ran: of all tokens of all :attr:`layers` there."""
        shares: dict[int, float] = {}
        for level in sorted({layer.downsample for layer in self.layers if layer.downsample}):
            chosen = [layer for layer in self.layers if layer.downsample == level]
            shares[level] = sum(layer.removed for layer in chosen) / sum(layer.tokens for layer in chosen)
        return shares

    @property
    def kept_bytes(self) -> int:
        """Memory of the outputs that whole steps have left for the detail-keeping unmerge."""
        return sum(merger.details.kept_bytes for merger in self._mergers.values())

    @property
    def merged(self) -> bool:
        """True if any token was merged."""
        return any(layer.removed for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "Token merging: the model has not run yet."
        lines = [f"{'layer':<72} {'level':>5} {'calls':>5} {'removed':>8}  left alone because"]
        for layer in self.layers:
            level = layer.downsample or "-"
            lines.append(f"{layer.name:<72} {level:>5} {layer.calls:>5} {layer.share:>8.1%}  {layer.reason or ''}")
        levels = ", ".join(f"{share:.1%} at level {level}" for level, share in self.removed.items())
        for merger in self._mergers.values():
            for (shape, *_, removed), decision in merger.blocks.decisions.items():
                kind = " × ".join(map(str, shape))
                lines.append(f"Measured with {removed} tokens less in {kind} (batch, tokens, channels): {decision}.")
        kept = f" Kept of whole steps: {self.kept_bytes / 2**20:.1f} MiB." if self.kept_bytes else ""
        return "\n".join([*lines, f"Tokens removed: {levels or 'none'}.{kept}"])
