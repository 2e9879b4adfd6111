"""Merging as it is attached to one model: its hooks, and the layers' names."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tomesd_plus.caching.cache import feature_cache_on
from tomesd_plus.host.models import owners_of_hooks
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.reading import Reading, read_unet
from tomesd_plus.host.step import StepTracker, outside_graphs, refuse_tracing
from tomesd_plus.host.transient import Transient
from tomesd_plus.host.under_way import is_under_way
from tomesd_plus.merging.answers import Reason, Why
from tomesd_plus.merging.blocks import BlockHooks
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.decider import Decider, Plans
from tomesd_plus.merging.generation import Call, Current, Generation, Record, StepRecord
from tomesd_plus.merging.kept import Keeping
from tomesd_plus.merging.planner import Planner
from tomesd_plus.merging.telling import Telling
from tomesd_plus.merging.wrapping import left_alone, processors_on


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
        self.attentions: list[Any] = []
        self.record: Transient[Record] = Transient()  # of the latest generation, in any thread
        self._handles: list[Any] = []
        self._lost_on: Transient[weakref.ref[nn.Module]] = Transient()  # the model whose processors were replaced
        self._keeping = Keeping()
        self._replaced = False  # all processors were
        self.taken_by_pipeline = False  # of a processor that was set by itself: it is gone, and a pipeline did that
        self.telling = Telling(config, name, gated=self.blocks.gate is not None)

    @property
    def attached(self) -> bool:
        """True while the hooks are on a model."""
        return bool(self._handles)

    def attach(self, model: nn.Module, attentions: list[Any]) -> None:
        """Put hooks on a model.

        Args:
            model: A UNet or ControlNet.
            attentions: Its attention layers whose processors use this.
        """
        self._lost_on.value, self._replaced, self.taken_by_pipeline = None, False, False
        self.attentions = attentions
        self.decider.names = {module: name for name, module in model.named_modules()}
        self.plans.attach(self.decider.names)
        if self.config.full_steps is not None:
            self._keeping.begin([*attentions, *self.blocks.layers(model)])
        self._handles = [
            model.register_forward_pre_hook(self.begin_call, with_kwargs=True),
            model.register_forward_hook(self.end_call, always_call=True),
            *self.blocks.attach(model),
        ]

    def serves_any(self) -> bool:
        """True if a layer has a processor of this attachment."""
        return any(getattr(attention.processor, "attachment", None) is self for attention in self.attentions)

    def lose(self, model: nn.Module) -> None:
        """All processors were replaced: nothing is left behind, but they may be put back."""
        attentions = self.attentions
        self.detach()
        self.attentions, self._lost_on.value = attentions, weakref.ref(model)

    def check_removable(self, model: nn.Module) -> None:
        """Refuse to be taken off a model inside of a block whose tokens are merged: who would unmerge them?

        Raises:
            RuntimeError: Such a block is under way in this thread.
        """
        if self.decider.current.block.merged and is_under_way(model):
            raise RuntimeError(
                "token merging cannot be removed from inside of a block or layer whose tokens are merged: remove it "
                "between two calls of the model, as from a pipeline's callback_on_step_end"
            )

    def detach(self) -> None:
        """Take everything off again. The record stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._keeping.end()
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
        if replaced != self._replaced:
            self._processors_changed(model, replaced)
        if replaced:
            return
        reading = self.read(model, args, kwargs)
        current = self.decider.current
        generation = current.generation or self.new_generation()
        step = generation.tracker.observe(reading.sample, reading.timestep, reading.text)
        if step.new_generation:
            self.telling.judge(generation.record)
            generation = Generation(generation.tracker)
            generation.record = left_alone(self.excluded)
            self._keeping.drop()
        current.generation, self.record.value = generation, generation.record
        generation.record.steps.append(StepRecord(step.index, step.noise_level))
        generation.record.late = step.late
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
            self._keeping.drop(generation.settle(call, self.config))
            self.plans.lay_out(call, reading.sample.device)

        if cache is None:
            settle(None)
        else:
            self.telling.beside(cache)
            call.skips, call.attention_level = cache.skips, cache.attention_level
            cache.when_decided(settle)

    @outside_graphs
    def end_call(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model, also after one that failed."""
        call = self.decider.current.call
        if call is None or call.record is None or not call.running:
            return
        call.running = False
        self.decider.current.block.forget()
        levels = {level.downsample: level for level in call.levels.values()}
        call.record.plans = {
            key[0]: (plan, levels[key[0]].height, levels[key[0]].width) for key, plan in call.plans.items()
        }
        call.record.kept_bytes = self._keeping.bytes
        if output is not None:  # ``None`` after a failure
            self.decider.note_replaced(model, call, self.attentions)
            self.telling.note(call, call.record)
            if call.step.last:
                self.telling.judge(call.record)

    # Generations ------------------------------------------------------------------------------------------------

    def new_generation(self, explicit: bool = False) -> Generation:
        """One that has not begun; ``explicit`` if its beginning was said, so that no other is guessed in it."""
        return Generation(StepTracker(self.noise_levels, explicit))

    def explicit_state(self) -> Any:
        """The state of a generation that has not begun, for :meth:`swap_generation`."""
        return self.new_generation(explicit=True), None, self._keeping.empty()

    def swap_generation(self, state: Any) -> Any:
        """Put a generation's state in this thread's place: itself, its call, and what its full steps have kept.

        Returns:
            The state that was there.
        """
        current = self.decider.current
        before = current.generation, current.call
        current.generation, current.call, outputs = state
        return *before, self._keeping.swap(outputs)

    # Processors that others have set ---------------------------------------------------------------------------

    def _processors_changed(self, model: nn.Module, replaced: bool) -> None:
        """All processors were replaced since the last call, or are back."""
        self._replaced = replaced
        if not replaced:
            self._handles += self.blocks.attach(model)
            self._keeping.put_back()
            return
        self.record.value = left_alone(self.excluded | self.decider.replaced(self.attentions))
        if not self.stays:
            self.telling.bare_replaced(processors_on(model), self.taken_by_pipeline)
            self.lose(model)
            return
        for handle in self._handles[2:]:
            handle.remove()
        del self._handles[2:]
        self._keeping.drop()
        if self.decider.current.call is not None:
            self.decider.current.call.running = False
        self.telling.all_replaced(each.processor for each in self.attentions)

    def came_back(self, attention: nn.Module) -> None:
        """A processor is called outside of a call of the model: see whether it is back on a model it was lost on."""
        found = self._lost_on.value() if self._lost_on.value is not None else None
        if found is not None:
            self.attach(found, self.attentions)  # as after PAG: merge again from the next call on
        elif self.attached and attention not in self.decider.names:
            self.telling.served_another()

    def settle(self) -> None:
        """The report is read: judge the latest generation so far, unless its last scheduled call is still to come."""
        record = self.record.value
        if record is not None and record.steps and (record.steps[-1].index is None or record.late):
            self.telling.judge(record, so_far=True)


def attachments_on(model: nn.Module) -> list[Attachment]:
    """The attachments whose hooks are on a model."""
    return owners_of_hooks(model, Attachment)


def _reason(words: str | None) -> Reason | None:
    return None if words is None else Reason(Why.of_call, (words,))
