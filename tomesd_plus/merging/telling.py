"""What the user is told of merging in one model: each time once, with the reason and what to do."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tomesd_plus.caching.cache import FeatureCache
from tomesd_plus.host.attention import is_of_pipeline
from tomesd_plus.host.promise import Promise
from tomesd_plus.host.say import warn
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.generation import Call, Record
from tomesd_plus.merging.report import is_replaced, why_nothing_merged
from tomesd_plus.merging.wrapping import SET_BY_OTHERS, kinds, listed, processors_on, why_excluded

DEFAULTS = {"AttnProcessor", "AttnProcessor2_0"}
"""diffusers' own processors; to set them is the way to take a processor off that was set by itself."""
_MEND = "Use apply_token_merging, which keeps other processors and tells in its report what happens in each layer"


class Telling:
    """Judges generation by generation whether what was asked for has happened, in all layers.

    Args:
        config: What was asked for.
        name: Of the model, with a full stop; empty for a model by itself.
        gated: A gate decides at which levels merging pays, so that none is broken where nothing is merged.
    """

    def __init__(self, config: ToMeConfig, name: str, gated: bool) -> None:
        where = f" in {name.rstrip('.')}" if name else ""
        self._config = config
        self._gated = gated
        self._beside_unet = name.startswith("controlnet")
        self._anywhere = Promise(f"Token merging has merged nothing{where}")
        self._everywhere = Promise(f"Token merging leaves layers alone{where}")
        self._of_cached_steps = Promise(f"Token merging does not follow the feature cache{where}")
        self._wanted: set[int] = set()  # the levels that are merged by the configuration, by downsample
        self._served_another = False

    def beside(self, cache: FeatureCache) -> None:
        """A call is a feature cache's: tell if options that are of cached steps do nothing beside it."""
        options, reason = self._config.of_cached_steps, None
        if options and not cache.config.skips_layers:
            reason = (
                f"{' and '.join(options)} need cached steps, and this cache's steps run in full or not at all. Leave "
                "them out, or cache layers too: a branch, or C in the plan"
            )
        self._of_cached_steps.judge(reason)

    def note(self, call: Call, record: Record) -> None:
        """A call is over: note if nothing was merged that should have been."""
        self._wanted |= {level.downsample for level in call.levels.values() if level.ratio is not None}
        # A full step is not to merge, and the gate has a good reason.
        if record.why_nothing is None and not call.full and not self._gated:
            record.why_nothing = why_nothing_merged(
                record, call.levels.values(), self._config, call.step.noise_level, call.ran, self._beside_unet
            )

    def judge(self, record: Record, so_far: bool = False) -> None:
        """Tell what has not happened in a generation, so far or in all; of compiled layers nothing is known."""
        merged = any(layer.removed for layer in record.layers.values())
        if not record.judged and (merged or record.why_nothing):
            record.judged = merged or not so_far
            self._anywhere.judge(None if merged else record.why_nothing)
            if merged:
                self._everywhere.judge(self._why_not_everywhere(record))

    def _why_not_everywhere(self, record: Record) -> str | None:
        """Name the layers whose processors somebody has replaced; a pipeline's own come and go with its calls."""
        replaced = [layer for layer in record.layers.values() if is_replaced(layer)]
        layers = [each for each in replaced if each.downsample is None or each.downsample in self._wanted]
        if not layers:
            return None
        reasons = "; ".join(sorted({str(each.left_alone) for each in layers}))
        return (
            f"{listed([each.name for each in layers])}: {reasons}. Put the former processor back, or remove merging "
            "and apply it again, around this one"
        )

    def all_replaced(self, processors: Iterable[Any]) -> None:
        """All layers that were to be merged have other processors now."""
        found = list(processors)
        reasons = [reason for each in found if (reason := why_excluded(each)) and reason.why in SET_BY_OTHERS]
        if any(map(is_of_pipeline, found)):
            mend = "The pipeline sets them for its calls, and they may need every token, so nothing is merged in it"
        elif reasons:
            words = "; ".join(sorted({str(reason) for reason in reasons}))
            mend = f"Put the former ones back: apply_token_merging merges around none of these, for {words}"
        else:
            mend = "Apply it again to merge around these, or put the former ones back"
        warn(
            "Token merging merges nothing any more: the attention processors were replaced by "
            f"{kinds(found)}. {mend}.",
            stacklevel=2,
        )

    def bare_replaced(self, processors: Iterable[Any], by_pipeline: bool) -> None:
        """The same where the processor was set by itself, which replaces those of all layers."""
        words = _why_surprising(processors, by_pipeline)
        if words is not None:
            warn(f"Token merging merges nothing any more: {words}.", stacklevel=2)

    def served_another(self) -> None:
        """A processor was called in another model than its own."""
        if not self._served_another:
            self._served_another = True
            warn(
                "A ToMeProcessor serves one model only, and this one serves another: give each model its own. "
                "Nothing is merged here.",
                stacklevel=2,
            )


def tell_of_passing_by(model: nn.Module, by_pipeline: bool | None) -> bool:
    """A UNet is called without a processor of ours: tell if one was replaced before the first call.

    Args:
        model: The UNet.
        by_pipeline: One was taken off it, by a pipeline or not. ``None``: some wait that may have been set on it.

    Returns:
        True if there was something to tell.
    """
    processors = processors_on(model)
    if by_pipeline is not None:
        words = _why_surprising(processors, by_pipeline)
    elif any(map(is_of_pipeline, processors)):  # these are set where the pipeline is called, perhaps over ours
        words = f"if ToMeProcessor was set on this UNet, its pipeline has replaced it by {kinds(processors)}. {_MEND}"
    else:
        words = None
    if words is not None:
        warn(f"Token merging merges nothing: {words}.", stacklevel=2)
    return words is not None


def _why_surprising(processors: Iterable[Any], by_pipeline: bool) -> str | None:
    """What has replaced a processor that was set by itself; ``None`` if a user has put diffusers' own back."""
    others = [each for each in processors if not hasattr(each, "attachment")]
    if not by_pipeline and {type(each).__name__ for each in others} <= DEFAULTS:
        return None
    return f"ToMeProcessor was replaced by {kinds(others)}. {_MEND}"
