"""Merging as it is attached to one model: its hooks, the layers' names, and what has been said of it."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tomesd_plus.caching.cache import FeatureCache, feature_cache_on
from tomesd_plus.host.models import owners_of_hooks
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.promise import Promise
from tomesd_plus.host.reading import Reading, read_unet
from tomesd_plus.host.step import MOST_CALLS, StepTracker, outside_graphs, refuse_tracing
from tomesd_plus.host.transient import Transient
from tomesd_plus.merging.answers import KeptOutputs, Reason, Why
from tomesd_plus.merging.blocks import BlockHooks
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.decider import KEPT, Decider, Plans
from tomesd_plus.merging.generation import Call, Current, Generation, LayerRecord, Record, StepRecord
from tomesd_plus.merging.planner import Planner
from tomesd_plus.merging.report import why_nothing_merged


class Attachment:
    """Merging on one model; its bound methods are hooks. It copies and pickles, without a generation's state.

    Args:
        config: What to merge.
        noise_levels: Tells the noise level of a timestep.
        name: Stands before layer names in the report.
        excluded: Layers that no processor could be put on, and why; for the report.
        plans: By which plans tokens are merged; :class:`Planner` by default.
        stays: Wait on the model, when all processors are replaced, for them to be put back; else the hooks go away,
            until a processor that was put back is called.
        read: Reads a call of the model; a UNet's by default.
        blocks: ``(decider) -> hooks`` for the model's blocks; a UNet's by default.
    """

    def __init__(
        self,
        config: ToMeConfig,
        noise_levels: NoiseLevels | None = None,
        name: str = "",
        excluded: dict[str, Reason] | None = None,
        plans: Plans | None = None,
        stays: bool = False,
        read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Reading] = read_unet,
        blocks: Callable[[Decider], BlockHooks] = BlockHooks,
    ) -> None:
        self.config = config
        self.noise_levels = noise_levels or NoiseLevels(needed=config.follows_noise_level)
        self.excluded = excluded or {}
        self.plans = plans or Planner(config)
        self.decider = Decider(config, self.plans, name)
        self.blocks = blocks(self.decider)
        self.read = read
        self.stays = stays
        self.attentions: list[nn.Module] = []
        self.record: Transient[Record] = Transient()  # of the latest generation, in any thread
        self._handles: list[Any] = []
        self._lost_on: Transient[weakref.ref[nn.Module]] = Transient()  # the model whose processors were replaced
        self._keeping: dict[nn.Module, KeptOutputs] = {}  # the layers that may keep an output
        self._promise = Promise("Token merging has merged nothing" + (f" in {name.rstrip('.')}" if name else ""))
        self._of_cached_steps = Promise("Token merging does not follow the feature cache")
        self._warned = False
        self._replaced = False  # all processors were

    @property
    def attached(self) -> bool:
        """True while the hooks are on a model."""
        return bool(self._handles)

    def attach(self, model: nn.Module, attentions: list[nn.Module]) -> None:
        """Put hooks on a model.

        Args:
            model: A UNet or ControlNet.
            attentions: Its attention layers whose processors use this.
        """
        self._lost_on.value, self._replaced = None, False
        self.attentions = attentions
        self.decider.names = {module: name for name, module in model.named_modules()}
        self.plans.attach(self.decider.names)
        if self.config.full_steps is not None:
            self._keeping = {layer: KeptOutputs() for layer in [*attentions, *self.blocks.layers(model)]}
        self._put_kept()
        self._handles = [
            model.register_forward_pre_hook(self.begin_call, with_kwargs=True),
            model.register_forward_hook(self.end_call, always_call=True),
            *self.blocks.attach(model),
        ]

    def _put_kept(self) -> None:
        for layer, kept in self._keeping.items():
            setattr(layer, KEPT, kept)

    def serves_any(self) -> bool:
        """True if a layer has a processor of this attachment."""
        return any(getattr(attention.processor, "attachment", None) is self for attention in self.attentions)

    def lose(self, model: nn.Module) -> None:
        """All processors were replaced: nothing is left behind, but they may be put back."""
        attentions = self.attentions
        self.detach()
        self.attentions, self._lost_on.value = attentions, weakref.ref(model)

    def detach(self) -> None:
        """Take everything off again. The record stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer, kept in self._keeping.items():
            if getattr(layer, KEPT, None) is kept:  # else another attachment has come in the meantime
                delattr(layer, KEPT)
        self._keeping = {}
        self.decider.names = {}
        self.plans.attach({})
        self.attentions = []
        self.decider.current = Current()
        self.decider.latest.value = self._lost_on.value = None
        if self.record.value is not None:
            self.record.value.kept_bytes, self.record.value.plans = 0, {}

    # The model's hooks ------------------------------------------------------------------------------------------

    @outside_graphs
    def begin_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before the model: read the step, and lay out what is to be done."""
        if not self.attached or kwargs is None:  # a call that had begun when the hook was removed, or a compiled one
            return
        refuse_tracing("Token merging", *args, *kwargs.values())
        replaced = not self.serves_any()
        if self.stays and replaced != self._replaced:
            self._processors_changed(model, replaced)
        if replaced and self.stays:
            return
        if replaced:
            self._warn_if_replaced_by_others()
            self.lose(model)
            return
        reading = self.read(model, args, kwargs)
        current = self.decider.current
        generation = current.generation or self.new_generation()
        step = generation.tracker.observe(reading.sample, reading.timestep, reading.text)
        if step.new_generation:
            self._judge(generation.record)
            generation = Generation(generation.tracker)
            record = generation.record
            record.layers = {name: LayerRecord(name, left_alone=reason) for name, reason in self.excluded.items()}
            self._drop_kept(range(MOST_CALLS))
        current.generation, self.record.value = generation, generation.record
        generation.record.steps.append(StepRecord(step.index, step.noise_level))
        current.call = self.decider.latest.value = call = Call(
            step,
            record=generation.record,
            video=reading.sample.ndim == 5,
            gradients=torch.is_grad_enabled(),
            text_tokens=reading.text_tokens,
            obstacle=_reason(reading.obstacle),
            between=_reason(reading.between),
        )
        cache = feature_cache_on(model)

        def settle(cached: bool | None) -> None:
            call.cached = cached
            self._drop_kept(generation.settle(call, self.config))
            self.plans.lay_out(call, reading.sample.device)

        if cache is None:
            settle(None)
        else:
            self._of_cached_steps.judge(self._why_no_cached_steps(cache))
            call.skips, call.attention_level = cache.skips, cache.attention_level
            cache.when_decided(settle)

    @outside_graphs
    def end_call(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model, also after one that failed: say so once if nothing at all was merged."""
        call = self.decider.current.call
        if call is None or call.record is None or not call.running:
            return
        call.running = False
        self.decider.current.block.forget()
        levels = {level.downsample: level for level in call.levels.values()}
        call.record.plans = {
            key[0]: (plan, levels[key[0]].height, levels[key[0]].width) for key, plan in call.plans.items()
        }
        if self._keeping:
            call.record.kept_bytes = sum(map(_bytes, self._keeping.values()))
        if output is not None:  # ``None`` after a failure
            self._note_if_nothing_merged(call, call.record)
            if call.step.last:
                self._judge(call.record)

    # Generations ------------------------------------------------------------------------------------------------

    def new_generation(self, explicit: bool = False) -> Generation:
        """One that has not begun; ``explicit`` if its beginning was said, so that no other is guessed in it."""
        return Generation(StepTracker(self.noise_levels, explicit))

    def explicit_state(self) -> Any:
        """The state of a generation that has not begun, for :meth:`swap_generation`."""
        return self.new_generation(explicit=True), None, [[None] * MOST_CALLS for _ in self._keeping]

    def swap_generation(self, state: Any) -> Any:
        """Put a generation's state in this thread's place: itself, its call, and what its full steps have kept.

        Returns:
            The state that was there.
        """
        current = self.decider.current
        before = current.generation, current.call, [kept.outputs for kept in self._keeping.values()]
        current.generation, current.call, outputs = state
        for kept, own in zip(self._keeping.values(), outputs, strict=True):
            kept.outputs = own
        return before

    def _drop_kept(self, places: Iterable[int]) -> None:
        for place in places:
            for kept in self._keeping.values():
                kept.outputs[place] = None

    # Telling the user -------------------------------------------------------------------------------------------

    def _processors_changed(self, model: nn.Module, replaced: bool) -> None:
        """All processors were replaced since the last call, or are back."""
        self._replaced = replaced
        if not replaced:
            self._handles += self.blocks.attach(model)
            self._put_kept()
            return
        for handle in self._handles[2:]:
            handle.remove()
        del self._handles[2:]
        self._drop_kept(range(MOST_CALLS))
        if self.decider.current.call is not None:
            self.decider.current.call.running = False
        layers = [LayerRecord(name, left_alone=reason) for name, reason in self.excluded.items()]
        others = [LayerRecord(f"{self.decider.prefix}{self.decider.names[each]}") for each in self.attentions]
        for layer, attention in zip(others, self.attentions, strict=True):
            layer.left_alone = Reason(Why.replaced, (type(attention.processor).__name__,))
        self.record.value = Record({layer.name: layer for layer in [*layers, *others]})
        kinds = sorted({type(attention.processor).__name__ for attention in self.attentions})
        warnings.warn(
            f"Token merging merges nothing any more: the attention processors were replaced by {', '.join(kinds)}. "
            "Apply it again to merge around these, or put the former ones back.",
            stacklevel=2,
        )

    def _warn_if_replaced_by_others(self) -> None:
        """A processor set by itself is removed by setting diffusers' default ones; any others are a surprise."""
        kinds = sorted({type(attention.processor).__name__ for attention in self.attentions})
        if not set(kinds) <= {"AttnProcessor", "AttnProcessor2_0", "ToMeProcessor"}:
            warnings.warn(
                f"Token merging merges nothing any more: ToMeProcessor was replaced by {', '.join(kinds)}. Use "
                "apply_token_merging, which merges around other processors, or set it again.",
                stacklevel=2,
            )

    def came_back(self, attention: nn.Module) -> None:
        """A processor is called outside of a call of the model: see whether it is back on a model it was lost on."""
        found = self._lost_on.value() if self._lost_on.value is not None else None
        if found is not None:
            self.attach(found, self.attentions)  # as after PAG: merge again from the next call on
        elif self.attached and attention not in self.decider.names and not self._warned:
            self._warned = True
            warnings.warn(
                "A ToMeProcessor serves one model only, and this one serves another: give each model its own. "
                "Nothing is merged here.",
                stacklevel=2,
            )

    def _why_no_cached_steps(self, cache: FeatureCache) -> str | None:
        """Why options that are of cached steps do nothing beside a cache, with the mend."""
        if cache.config.skips_layers or not self.config.of_cached_steps:
            return None
        return (
            f"{' and '.join(self.config.of_cached_steps)} need cached steps, and this cache's steps run in full or "
            "not at all. Leave them out, or cache layers too: a branch, or C in the plan"
        )

    def _note_if_nothing_merged(self, call: Call, record: Record) -> None:
        # A full step is not to merge, and the gate has a good reason.
        if record.why_nothing is None and not call.full and self.blocks.gate is None:
            record.why_nothing = why_nothing_merged(
                record, call.levels.values(), self.config, call.step.noise_level, call.ran
            )

    def _judge(self, record: Record) -> None:
        """Tell the user if nothing was merged in a generation; of compiled layers nothing is known."""
        merged = any(layer.removed for layer in record.layers.values())
        if not record.judged and (merged or record.why_nothing):
            record.judged = True
            self._promise.judge(None if merged else record.why_nothing)

    def settle(self) -> None:
        """The report is read: judge the latest generation, unless its last scheduled call is still to come."""
        record = self.record.value
        if record is not None and record.steps and record.steps[-1].index is None:
            self._judge(record)


def attachments_on(model: nn.Module) -> list[Attachment]:
    """The attachments whose hooks are on a model."""
    return owners_of_hooks(model, Attachment)


def _reason(words: str | None) -> Reason | None:
    return None if words is None else Reason(Why.of_call, (words,))


def _bytes(kept: KeptOutputs) -> int:
    return sum(output.untyped_storage().nbytes() for output in kept.outputs if output is not None)
