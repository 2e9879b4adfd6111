"""What merging did: tokens removed per layer, level and step, and which layers were left alone and why."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from torch import Tensor

from tomesd_plus.host.transient import Transient
from tomesd_plus.merging.answers import Why
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.gate import Decision
from tomesd_plus.merging.generation import LayerRecord, Level, Record, StepRecord
from tomesd_plus.schedules import AdaptiveRatio, Schedule


@dataclass(frozen=True)
class ModelReport:
    """What a report reads of one model.

    Args:
        record: Of the latest generation, if there was one.
        decisions: The gate's, by input's shape, …, number of tokens removed.
        settle: Called when the record is read.
    """

    record: Transient[Record]
    decisions: Mapping[tuple[object, ...], Decision]
    settle: Callable[[], None]


class TokenMergingReport:
    """A live view of what merging does to a pipeline; it always tells of the latest generation.

    Args:
        models: Of the pipeline, by name.
    """

    def __init__(self, models: Mapping[str, ModelReport]) -> None:
        self._models = models

    @property
    def _records(self) -> list[Record]:
        for model in self._models.values():
            model.settle()
        return [model.record.value or Record() for model in self._models.values()]

    @property
    def layers(self) -> list[LayerRecord]:
        """Every layer around which merging is configured, in order of execution, and those it could not be put on.

        With several models, names start with the model's.
        """
        return [layer for record in self._records for layer in record.layers.values()]

    @property
    def steps(self) -> list[StepRecord]:
        """The first model's steps."""
        return list(self._records[0].steps)

    def merge_map(self, level: int | None = None) -> Tensor | None:
        """How many tokens each token was merged with, itself counted, in the first model's latest step.

        Args:
            level: The downsample to show; the finest that was merged by default.

        Returns:
            (height, width) of the level's tokens, int64, on the CPU, for the last sample of the batch, which under
            guidance is one with the prompt; ``None`` if nothing was merged there. Where blocks have plans of their
            own it shows the last block's.
        """
        plans = self._records[0].plans
        level = min(plans, default=None) if level is None else level
        if level not in plans:
            return None
        plan, height, width = plans[level]
        return plan.sizes[-1].gather(0, plan.inverse[-1]).reshape(height, width).cpu()

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
        """Memory of the outputs that full steps have left for the detail-keeping unmerge."""
        return sum(record.kept_bytes for record in self._records)

    @property
    def merged(self) -> bool | None:
        """True if any token was merged; ``None`` if that is unknown, because the layers are compiled."""
        return None if self._is_unknown else any(layer.removed for layer in self.layers)

    @property
    def _is_unknown(self) -> bool:
        return bool(self.steps) and not any(layer.calls or layer.left_alone for layer in self.layers)

    def __str__(self) -> str:
        if self._is_unknown:
            return (
                f"Token merging: {len(self.steps)} calls of the model, whose compiled layers leave no notes: what was "
                "merged is unknown."
            )
        if not self.layers:
            return "Token merging: the model has not run yet."
        lines = [f"{'layer':<72} {'level':>5} {'calls':>5} {'removed':>8}  left alone because"]
        for layer in self.layers:
            level = layer.downsample or "-"
            lines.append(f"{layer.name:<72} {level:>5} {layer.calls:>5} {layer.share:>8.1%}  {layer.reason or ''}")
        levels = ", ".join(f"{share:.1%} at level {level}" for level, share in self.removed.items())
        for model in self._models.values():
            for (shape, *_, removed), decision in model.decisions.items():
                kind = " × ".join(map(str, shape))  # type: ignore[call-overload]
                lines.append(f"Measured with {removed} tokens less in {kind} (batch, tokens, channels): {decision}.")
        kept = f" Kept of full steps: {self.kept_bytes / 2**20:.1f} MiB." if self.kept_bytes else ""
        return "\n".join([*lines, f"Tokens removed: {levels or 'none'}.{kept}"])


def is_replaced(layer: LayerRecord) -> bool:
    """True for a layer that is left alone because somebody has replaced its processor."""
    return layer.left_alone is not None and layer.left_alone.why is Why.replaced


def why_nothing_merged(
    record: Record,
    levels: Iterable[Level],
    config: ToMeConfig,
    noise_level: float,
    ran: Set[int],
    beside_unet: bool = False,
) -> str | None:
    """Tell why nothing was merged and what to set, unless something was, or nothing was to be.

    Args:
        record: Of the generation; compiled layers leave no notes in it.
        levels: Of the step.
        config: What was to be merged.
        noise_level: Of the step.
        ran: The levels, by downsample, at which a layer has run in it: a feature cache skips some.
        beside_unet: Of a ControlNet beside a UNet, which need not have the levels that the UNet has.
    """
    layers = list(record.layers.values())
    asked = [layer for layer in layers if layer.calls and not is_replaced(layer)]
    if not asked or any(layer.removed for layer in layers):
        return None
    present = [level for level in levels if level.ratio is not None]
    adaptive = {level.downsample for level in present if isinstance(level.ratio, AdaptiveRatio)}
    wanted = adaptive | {
        level.downsample for level in present if isinstance(level.ratio, Schedule) and level.ratio(noise_level) > 0
    }
    found = sorted({layer.downsample for layer in layers if layer.downsample})
    if not wanted or adaptive & set(found) or (wanted & set(found) and not wanted & ran):
        return None
    if not found or set(found) & wanted:
        return "; ".join(sorted({layer.reason for layer in layers if layer.reason}))
    if beside_unet:
        return None
    to_do = "give ratio one of them" if isinstance(config.ratio, Mapping) else f"set max_downsample={found[0]}"
    sdxl = " (SDXL has none at full resolution)" if found[0] == 2 else ""
    return f"this model has self-attention at levels {found} only; {to_do}{sdxl}"
