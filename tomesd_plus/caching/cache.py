"""A feature cache attached to one UNet: which kind of step is under way, and what the last full steps left."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.forecast import Features
from tomesd_plus.caching.generation import CacheRecord, CacheStep, Current, Generation, WhyFull
from tomesd_plus.caching.layers import Run, SkippableForward, Skipped, Take, make_skippable, skipped_layers
from tomesd_plus.host.arguments import call_of
from tomesd_plus.host.forwards import take_forwards_off
from tomesd_plus.host.models import finest_level, unwrapped
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.step import Step, StepTracker, outside_graphs, refuse_tracing
from tomesd_plus.host.transient import Transient

CACHE = "_tomesd_plus_cache"  # a UNet's attribute


class FeatureCache:
    """Decides for each call of one UNet whether it is full, and keeps the features between.

    Its bound methods are the hooks on the UNet; they copy and pickle, and leave a generation's state behind.

    Args:
        config: When a step is full, and which layers the others run.
        noise_levels: Tells the noise level of a timestep.
    """

    def __init__(self, config: FeatureCacheConfig, noise_levels: NoiseLevels | None = None) -> None:
        self.config = config
        self.noise_levels = noise_levels or NoiseLevels(needed=config.follows_noise_level)
        self.skipped: tuple[str, ...] = ()
        self.boundary: tuple[str, ...] = ()
        self.record: Transient[CacheRecord] = Transient()  # of the latest generation, in any thread
        self._current = Current()
        self._handles: list[Any] = []
        self.attention_level: int | None = None  # the downsample at which self-attention alone is skipped

    # Installing -------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """True while the hooks are on a UNet."""
        return bool(self._handles)

    def attach(self, unet: nn.Module) -> None:
        """Make a UNet's inner layers skippable and put hooks on it."""
        skipped = self._skipped_layers(unet)
        self.skipped, self.boundary = tuple(skipped.layers), skipped.boundary
        if self.config.branch == "self_attention":
            self.attention_level = finest_level(unwrapped(unet))
        setattr(unwrapped(unet), CACHE, self)
        make_skippable(skipped, self.ask)
        # Before all others: token merging asks for the step's kind in its own.
        self._handles.append(unet.register_forward_pre_hook(self.begin_call, prepend=True, with_kwargs=True))
        self._handles.append(unet.register_forward_hook(self.end_call, always_call=True))
        if self.config.threshold is not None:
            self._handles.append(unet.get_submodule("conv_in").register_forward_hook(self.read_early_feature))

    def detach(self, unet: nn.Module) -> None:
        """Take everything off again and free what is kept. The record of steps stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        vars(unwrapped(unet)).pop(CACHE, None)
        for layer in unet.modules():
            take_forwards_off(layer, SkippableForward)
        self._current = Current()
        if self.record.value is not None:
            self.record.value.features = {}

    def _skipped_layers(self, unet: nn.Module) -> Skipped:
        return skipped_layers(unet, self.config.branch)

    # Hooks ------------------------------------------------------------------------------------------------------

    @outside_graphs
    def begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before the UNet: tell the kind of this step, unless the early feature must be seen first."""
        if not self.attached or kwargs is None:  # a call that had begun when the hook was removed, or a compiled one
            return
        refuse_tracing("A feature cache")
        if self.attention_level is not None and torch.is_grad_enabled() and unwrapped(unet).is_gradient_checkpointing:
            raise RuntimeError(
                "branch='self_attention' cannot be used with gradient checkpointing: a block that is run again would "
                "not take what it took at first. Disable one of the two."
            )
        make_skippable(self._skipped_layers(unet), self.ask)  # offloading may have put old forwards back
        current = self._current
        current.waiting = []
        generation = current.generation or self.new_generation()
        step = generation.tracker.observe(*call_of(unet, args, kwargs))
        if step.new_generation:
            generation = Generation(generation.tracker)
        if step.ambiguous:
            generation.record.features.clear()
        current.generation, current.step, self.record.value = generation, step, generation.record
        reason = self._why_full(generation, step)
        if reason is None and self.config.threshold is not None:
            current.kind = "undecided"
        else:
            self._decide(generation, step, reason)

    @outside_graphs
    def read_early_feature(self, conv_in: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After ``conv_in``, the UNet's first layer: decide by how much its output has changed."""
        generation, step = self._current.generation, self._current.step
        if generation is None or step is None:
            return  # the layer is run by itself
        if self._current.kind == "undecided":
            early, threshold = generation.record.features[step.call].early, self.config.threshold
            assert early is not None and threshold is not None
            change = float((output - early).abs().mean() / early.abs().mean())
            self._decide(generation, step, WhyFull.changed if change > threshold else None, change)
        if self._current.kind == "full":
            generation.record.features[step.call].early = output.detach()

    def end_call(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the UNet, also after one that raised an exception: its layers are ordinary ones again.

        PyTorch does not call it after a ``KeyboardInterrupt``; then they are so from the UNet's next call on.
        """
        current = self._current
        current.kind = "idle"
        current.outputs = {}
        current.waiting = []

    # For the layers, and for token merging ----------------------------------------------------------------------

    def ask(self, layer: str) -> Run | Take:
        """What is to be done in a skipped layer of this name."""
        current = self._current
        if current.kind == "cached":
            return Take(current.outputs[layer])
        return Run(current.outputs if current.kind == "full" else None)

    def skips(self, layer: str) -> bool:
        """True if cached steps skip a layer of the UNet, given by name."""
        return any(layer == name or layer.startswith(f"{name}.") for name in self.skipped)

    def when_decided(self, tell: Callable[[bool], None]) -> None:
        """Tell whether the call under way is cached: now, or once that is known."""
        if self._current.kind == "undecided":
            self._current.waiting.append(tell)
        else:
            tell(self._current.kind == "cached")

    # Generations ------------------------------------------------------------------------------------------------

    def new_generation(self, explicit: bool = False) -> Generation:
        """One that has not begun; ``explicit`` if its beginning was said, so that no other is guessed in it."""
        return Generation(StepTracker(self.noise_levels, explicit))

    def explicit_state(self) -> Any:
        """The state of a generation that has not begun, for :meth:`swap_generation`."""
        return self.new_generation(explicit=True)

    def swap_generation(self, state: Any) -> Any:
        """Put a generation's state in this thread's place; returns what was there, which may be ``None``."""
        before, self._current.generation = self._current.generation, state
        return before

    # Deciding ---------------------------------------------------------------------------------------------------

    def _why_full(self, generation: Generation, step: Step) -> WhyFull | None:
        """Why a step is full whatever the early feature says; ``None`` if nothing asks for it."""
        if step.ambiguous:
            return WhyFull.ambiguous
        kept = generation.record.features.get(step.call)
        if kept is None or not self._complete(kept):
            return WhyFull.first_step if step.new_generation else WhyFull.nothing_kept
        if not step.same_size(kept.step):
            return WhyFull.other_size
        if self.config.full_steps is not None:
            return WhyFull.listed if step.number in self.config.full_steps else None
        age = step.number - kept.step.number
        if age >= self.config.interval_at(step.noise_level):
            return WhyFull.interval
        return WhyFull.same_noise_level if age == 0 else None

    def _decide(self, generation: Generation, step: Step, reason: WhyFull | None, change: float | None = None) -> None:
        current, features = self._current, generation.record.features
        ahead = 0.0
        if reason is not None:
            features[step.call] = Features(step, before=self._full_before(features.get(step.call), step))
            current.kind, current.outputs = "full", features[step.call].outputs
        else:
            kept = features[step.call]
            ahead = kept.ahead(step, self.config.forecast)
            current.kind, current.outputs = "cached", kept.forecast(self.boundary, ahead)
        generation.record.steps.append(CacheStep(step.index, step.noise_level, reason, change, ahead))
        for tell in current.waiting:
            tell(reason is None)

    def _complete(self, kept: Features) -> bool:
        """False if the step that left it has failed on its way."""
        return kept.outputs.keys() == set(self.skipped)

    def _full_before(self, kept: Features | None, step: Step) -> Features | None:
        """What the last full step before a full one left, where it makes a trend."""
        if kept is not None and kept.step.number == step.number:
            kept = kept.before
        if not self.config.forecast or kept is None or not self._complete(kept) or not step.same_size(kept.step):
            return None
        return Features(kept.step, kept.outputs)


def feature_cache_on(unet: nn.Module) -> FeatureCache | None:
    """The cache that is attached to a UNet, or ``None``."""
    cache: FeatureCache | None = getattr(unwrapped(unet), CACHE, None)
    return cache
