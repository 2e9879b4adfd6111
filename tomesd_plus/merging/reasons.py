"""Why merging has merged nothing, in words that say what to set."""

from collections.abc import Iterable, Mapping, Set

from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.levels import Level
from tomesd_plus.merging.report import LayerRecord
from tomesd_plus.schedules import AdaptiveRatio, Schedule


def why_idle(
    records: Iterable[LayerRecord], levels: Iterable[Level], config: ToMeConfig, noise_level: float, ran: Set[int]
) -> str | None:
    """Tell why nothing was merged, unless something was, or nothing was to be.

    Args:
        records: Of the layers; compiled ones leave none.
        levels: Of the step.
        config: What was to be merged.
        noise_level: Of the step.
        ran: The levels, by downsample, at which a layer has run in it: a feature cache skips some.
    """
    records = list(records)
    if not records or any(record.removed for record in records):
        return None
    present = [level for level in levels if level.ratio is not None]
    adaptive = {level.downsample for level in present if isinstance(level.ratio, AdaptiveRatio)}
    wanted = adaptive | {
        level.downsample for level in present if isinstance(level.ratio, Schedule) and level.ratio(noise_level) > 0
    }
    found = sorted({record.downsample for record in records if record.downsample})
    if not wanted or adaptive & set(found) or (wanted & set(found) and not wanted & ran):
        return None
    if not found or set(found) & wanted:
        return "; ".join(sorted({record.reason for record in records if record.reason}))
    to_do = "give ratio one of them" if isinstance(config.ratio, Mapping) else f"set max_downsample={found[0]}"
    sdxl = " (SDXL has none at full resolution)" if found[0] == 2 else ""
    return f"this model has self-attention at levels {found} only; {to_do}{sdxl}"
