"""A feature cache attached to one denoiser: what runs of the call under way, and what the last ones left."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.caching.calls import ControlNetCalls, SkippableCall, make_call_skippable, wants_dict
from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.deciding import Deciding
from tomesd_plus.caching.forecast import Features
from tomesd_plus.caching.generation import CacheRecord, CacheStep, Current, Generation, Kind, WhyFull
from tomesd_plus.caching.layers import Run, SkippableForward, Skipped, Take, make_skippable, skipped_layers
from tomesd_plus.caching.outputs import Output, forecast, kept_with, map_tensors
from tomesd_plus.caching.verdict import Verdict
from tomesd_plus.host.attention import keeps_attention_maps
from tomesd_plus.host.denoisers import Read
from tomesd_plus.host.forwards import take_forwards_off
from tomesd_plus.host.models import finest_level, unwrapped
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.reading import Reading, read_unet
from tomesd_plus.host.step import Step, StepTracker, outside_graphs, refuse_tracing
from tomesd_plus.host.transient import Transient
from tomesd_plus.host.under_way import is_under_way

CACHE = "_tomesd_plus_cache"  # a UNet's attribute


class FeatureCache:
    """Decides for each call of one denoiser what runs, and keeps what is taken on the others.

    Its bound methods are the hooks on the denoiser; they copy and pickle, and leave a generation's state behind.

    Args:
        config: When a step is full, and what the others run.
        noise_levels: Tells the noise level of a timestep.
        read: Reads a call of the denoiser; a UNet's by default.
    """

    def __init__(
        self, config: FeatureCacheConfig, noise_levels: NoiseLevels | None = None, read: Read = read_unet
    ) -> None:
        self.config = config
        self.read = read
        self.noise_levels = noise_levels or NoiseLevels(needed=config.follows_noise_level)
        self.deciding = Deciding(config)
        self.skipped: tuple[str, ...] = ()
        self.boundary: tuple[str, ...] = ()
        self.record: Transient[CacheRecord] = Transient()  # of the latest generation, in any thread
        self._current = Current()
        self._handles: list[Any] = []
        self._verdict = Verdict(config)
        self._controlnets: Transient[list[tuple[weakref.ref[nn.Module], ControlNetCalls]]] = Transient()
        self.attention_level: int | None = None  # the downsample at which self-attention alone is skipped

    # Installing -------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """True while the hooks are on a UNet."""
        return bool(self._handles)

    def attach(self, unet: nn.Module, controlnets: Mapping[nn.Module, Read] | None = None) -> None:
        """Make a denoiser, or its inner layers, skippable and put hooks on it.

        Args:
            unet: The UNet, or a transformer of which whole calls are skipped.
            controlnets: Those that feed it, each with what reads its calls.
        """
        skipped = self._skipped_layers(unet)
        self.skipped, self.boundary = tuple(skipped.layers), skipped.boundary
        self.deciding.skipped = frozenset(self.skipped)
        if self.config.branch == "self_attention":
            self.attention_level = finest_level(unwrapped(unet))
        setattr(unwrapped(unet), CACHE, self)
        make_skippable(skipped, self.ask)
        if self.config.skips_calls:
            make_call_skippable(unet, self.ask_call)
            self._controlnets.value = []
            for net, read in (controlnets or {}).items():
                calls = ControlNetCalls(read, self.will_skip, self.leave_blank, self.is_attached)
                self._controlnets.value.append((weakref.ref(net), calls))
                calls.attach(net)
        # Before all others: token merging asks for the step's kind in its own.
        self._handles.append(unet.register_forward_pre_hook(self.begin_call, prepend=True, with_kwargs=True))
        self._handles.append(unet.register_forward_hook(self.end_call, always_call=True))
        if self.config.threshold is not None:
            self._handles.append(unet.get_submodule("conv_in").register_forward_hook(self.read_early_feature))

    def check_removable(self) -> None:
        """Refuse to go from inside of a cached call's skipped layers: those that would run were given nothing.

        Raises:
            RuntimeError: Such a call is under way in this thread.
        """
        if self._current.nobody_wrote and is_under_way(self._current.model):
            raise RuntimeError(
                "a feature cache cannot be removed from inside of layers that a cached step skips: remove it between "
                "two calls of the model, as from a pipeline's callback_on_step_end"
            )

    def detach(self, unet: nn.Module) -> None:
        """Take everything off again and free what is kept. The record of steps stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        vars(unwrapped(unet)).pop(CACHE, None)
        for layer in unet.modules():
            take_forwards_off(layer, SkippableForward)
        for model in {unet, unwrapped(unet)}:
            take_forwards_off(model, SkippableCall)
        for reference, calls in self._controlnets.value or ():
            if (net := reference()) is not None:
                calls.detach(net)
        self._controlnets.value = None
        self._current = Current()
        if self.record.value is not None:
            self.record.value.forget()

    def is_attached(self) -> bool:
        """True while the hooks are on a denoiser, for ControlNets' hooks."""
        return self.attached

    def _skipped_layers(self, unet: nn.Module) -> Skipped:
        return skipped_layers(unet, self.config.branch if self.config.skips_layers else "nothing")

    # Hooks ------------------------------------------------------------------------------------------------------

    @outside_graphs
    def begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before the UNet: tell the kind of this step, unless the early feature must be seen first."""
        if not self.attached or kwargs is None:  # a call that had begun when the hook was removed, or a compiled one
            return
        refuse_tracing("A feature cache", *args, *kwargs.values())
        if self.attention_level is not None and torch.is_grad_enabled() and unwrapped(unet).is_gradient_checkpointing:
            raise RuntimeError(
                "branch='self_attention' cannot be used with gradient checkpointing: a block that is run again would "
                "not take what it took at first. Disable one of the two."
            )
        make_skippable(self._skipped_layers(unet), self.ask)  # offloading may have put old forwards back
        current = self._current
        current.waiting, current.given = [], None
        interrupted = current.kind != "idle"
        current.kind, current.nobody_wrote = "idle", False  # until the kind is known
        current.model = unet if is_under_way(unet) else None  # a compiled call need not show
        replaced = self.config.skips_calls and not make_call_skippable(unet, self.ask_call)
        current.as_dict = wants_dict(unet, args, kwargs)
        generation = current.generation or self.new_generation()
        generation.record.failed |= interrupted
        reading = self.read(unet, args, kwargs)
        step = generation.tracker.observe(reading.sample, reading.timestep, reading.text)
        if step.new_generation:
            if not generation.tracker.branches_alike:
                self._verdict.judge(generation.record)
            generation = Generation(generation.tracker, maps_are_read=self._maps_are_read(unet))
        if step.ambiguous:
            generation.record.forget()
        current.generation, current.step, self.record.value = generation, step, generation.record
        kind, reason = self.deciding.chosen(generation, step, current.as_dict)
        generation.level_before, generation.latest = generation.before(step), step
        generation.record.late = step.late
        if kind == "skipped" and replaced:
            kind, reason = "full", WhyFull.replaced
        if generation.blank == step.number and kind != "skipped":
            raise RuntimeError(
                f"step {step.number} was to be skipped, and so its ControlNet was, but the call that came cannot be "
                f"({reason}). Apply the feature cache to the UNet alone: ControlNets then run at every step."
            )
        if kind == "cached" and self.config.threshold is not None:
            current.kind = "undecided"
        else:
            self._decide(generation, step, kind, reason)

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
            changed = change > threshold
            self._decide(
                generation, step, "full" if changed else "cached", WhyFull.changed if changed else None, change
            )
        if self._current.kind == "full":
            generation.record.features[step.call].early = output.detach()

    def end_call(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the denoiser, also after one that raised an exception: its layers are ordinary ones again.

        PyTorch does not call it after a ``KeyboardInterrupt``: see :meth:`ask`.
        """
        current = self._current
        generation, step = current.generation, current.step
        ran = current.kind in ("full", "cached") and output is not None
        if ran and self.config.skips_calls and generation is not None and step is not None and not step.ambiguous:
            # Copies: hosts write into what a call gives.
            new = Output(step, map_tensors(lambda each: each[0].detach().clone(), output), current.as_dict)
            outputs = generation.record.outputs
            outputs[step.call] = kept_with(outputs.get(step.call, ()), new)
        current.forget_call()
        if generation is not None and step is not None and output is None:
            generation.record.failed = True
        elif generation is not None and step is not None and step.last:
            self._verdict.judge(generation.record, finished=True)

    def settle(self) -> None:
        """The report is read: judge the latest generation so far, unless its last scheduled step is still to come."""
        record = self.record.value
        if record is not None and len(record.steps) > 1 and (record.steps[-1].index is None or record.late):
            self._verdict.judge(record, so_far=True)

    def _maps_are_read(self, unet: nn.Module) -> bool:
        """True if a host reads the attention maps of layers that cached steps would not run."""
        return any(
            keeps_attention_maps(module.processor)
            for name, module in unwrapped(unet).named_modules()
            if hasattr(module, "processor") and (self.config.skips_calls or self.skips(name))
        )

    @contextmanager
    def taking(self, outputs: dict[str, Any]) -> Iterator[None]:
        """Let the denoiser's ``forward``, called by itself, be a cached call that takes certain layers' outputs."""
        current = self._current
        before = current.kind, current.outputs, current.model
        current.kind, current.outputs, current.model = "cached", outputs, None
        try:
            yield
        finally:
            current.kind, current.outputs, current.model = before

    # For the layers, and for token merging ----------------------------------------------------------------------

    def ask(self, layer: str) -> Run | Take:
        """What is to be done in a skipped layer of this name."""
        current = self._current
        if not torch.compiler.is_compiling():
            if current.model is not None and not is_under_way(current.model):
                current.forget_call()  # it was interrupted, and this layer is called by itself
                if current.generation is not None:
                    current.generation.record.failed = True
            current.nobody_wrote = current.kind == "cached" and layer not in self.boundary
        if current.kind == "cached":
            return Take(current.outputs[layer])
        return Run(current.outputs if current.kind == "full" else None)

    def ask_call(self) -> Any:
        """What the denoiser's call under way returns in place of running; ``None``: it runs."""
        return self._current.given

    def will_skip(self, reading: Reading) -> tuple[Step, bool]:
        """The step that the denoiser's next call will be, and whether it will be skipped."""
        generation = self._current.generation or self.new_generation()
        step = copy.copy(generation.tracker).observe(reading.sample, reading.timestep, reading.text)
        return step, not step.new_generation and self.deciding.chosen(generation, step, None)[0] == "skipped"

    def leave_blank(self, step: Step) -> None:
        """A ControlNet is skipped at a step: the denoiser's call must be, too."""
        assert self._current.generation is not None
        self._current.generation.blank = step.number

    def skips(self, layer: str) -> bool:
        """True if cached steps skip a layer of the UNet, given by name."""
        return any(layer == name or layer.startswith(f"{name}.") for name in self.skipped)

    def when_decided(self, tell: Callable[[bool], None]) -> None:
        """Tell whether the call under way is cached, or skipped: now, or once that is known."""
        if self._current.kind == "undecided":
            self._current.waiting.append(tell)
        else:
            tell(self._current.kind != "full")

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

    def _decide(
        self, generation: Generation, step: Step, kind: Kind, reason: WhyFull | None, change: float | None = None
    ) -> None:
        current, features, ahead = self._current, generation.record.features, 0.0
        current.kind, current.outputs = kind, {}
        if kind == "full":
            features[step.call] = Features(step, before=self.deciding.full_before(features.get(step.call), step))
            current.outputs = features[step.call].outputs
        elif kind == "cached":
            kept = features[step.call]
            ahead = kept.ahead(step, self.config.forecast)
            current.outputs = kept.forecast(self.boundary, ahead)
        else:
            current.given = forecast(generation.record.outputs[step.call], step.number, self.config.order)
        skipped = kind == "skipped"
        generation.record.steps.append(CacheStep(step.index, step.noise_level, reason, change, ahead, skipped))
        for tell in current.waiting:
            tell(kind != "full")


def feature_cache_on(unet: nn.Module) -> FeatureCache | None:
    """The cache that is attached to a UNet, or ``None``."""
    cache: FeatureCache | None = getattr(unwrapped(unet), CACHE, None)
    return cache
