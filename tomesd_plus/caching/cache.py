"""A feature cache attached to one UNet: which kind of step is under way, and what the last full steps left."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.forecast import Features
from tomesd_plus.caching.layers import Run, SkippableForward, Skipped, Take, make_skippable, skipped_layers
from tomesd_plus.host.arguments import sample_and_timestep
from tomesd_plus.host.forwards import forwards_on, take_forwards_off
from tomesd_plus.host.models import owners_of_hooks
from tomesd_plus.host.step import Step, StepTracker, outside_graphs
from tomesd_plus.host.transient import ThreadLocal, Transient

Kind = Literal["idle", "undecided", "full", "cached"]
"""Of the UNet's call under way; idle outside of calls."""


@dataclass(frozen=True)
class CacheStep:
    """One call of the UNet in the latest generation.

    Args:
        index: Place in the scheduler's timesteps; ``None`` if the caller passed a timestep of its own.
        noise_level: 1 at the first, noisiest timestep of training, 0 at the last.
        reason: Why it was full; ``None`` if it was cached.
        change: Of the early feature since the last full step, as a share; ``None`` unless the choice depended on it.
        ahead: How far it followed the trend of the last two full steps, as a share of the way between them; 0 for
            full steps, and for those that took what the last full step had left as it was.
    """

    index: int | None
    noise_level: float
    reason: str | None
    change: float | None = None
    ahead: float = 0.0

    @property
    def full(self) -> bool:
        """True if all layers ran."""
        return self.reason is not None


@dataclass
class CacheRecord:
    """What was done in one generation, as plain data.

    Args:
        steps: One entry a call of the UNet; of a loop that never begins a new generation the latest.
        features: What full steps have left, by the number of the call in its step.
    """

    steps: deque[CacheStep] = field(default_factory=lambda: deque(maxlen=1000))
    features: dict[int, Features] = field(default_factory=dict)


@dataclass
class Generation:
    """What a cache holds from a generation's first call to the next one's.

    Args:
        tracker: Reads the calls' steps.
        record: What was done, and what full steps have left.
    """

    tracker: StepTracker
    record: CacheRecord = field(default_factory=CacheRecord)


class Current(ThreadLocal):
    """Where a thread is."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.step: Step | None = None
        self.kind: Kind = "idle"
        self.outputs: dict[str, Any] = {}  # those of the call under way
        self.waiting: list[Callable[[bool], None]] = []  # told of the call's kind once that is known


class FeatureCache:
    """Decides for each call of one UNet whether it is full, and keeps the features between.

    Its bound methods are the hooks on the UNet; they copy and pickle, and leave a generation's state behind.

    Args:
        config: When a step is full, and which layers the others run.
        train_timesteps: Timesteps of the model's training, for the noise level.
    """

    def __init__(self, config: FeatureCacheConfig, train_timesteps: int = 1000) -> None:
        self.config = config
        self.train_timesteps = train_timesteps
        self.skipped: tuple[str, ...] = ()
        self.boundary: tuple[str, ...] = ()
        self.record: Transient[CacheRecord] = Transient()  # of the latest generation, in any thread
        self._current = Current()
        self._handles: list[Any] = []

    # Installing -------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """True while the hooks are on a UNet."""
        return bool(self._handles)

    def attach(self, unet: nn.Module) -> None:
        """Make a UNet's inner layers skippable and put hooks on it."""
        skipped = self._skipped_layers(unet)
        self.skipped, self.boundary = tuple(skipped.layers), skipped.boundary
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
        for layer in unet.modules():
            take_forwards_off(layer, SkippableForward)
        self._current = Current()
        if self.record.value is not None:
            self.record.value.features = {}

    def _skipped_layers(self, unet: nn.Module) -> Skipped:
        return skipped_layers(unet, self.config.branch)

    # Hooks ------------------------------------------------------------------------------------------------------

    @outside_graphs
    def begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the UNet: tell the kind of this step, unless the early feature must be seen first."""
        if not self.attached:  # a compiled UNet may still call hooks that were removed
            return
        make_skippable(self._skipped_layers(unet), self.ask)  # offloading may have put old forwards back
        current = self._current
        current.waiting = []
        generation = current.generation or self.new_generation()
        step = generation.tracker.observe(*sample_and_timestep(unet, args, kwargs))
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
        assert generation is not None and step is not None
        if self._current.kind == "undecided":
            early, threshold = generation.record.features[step.call].early, self.config.threshold
            assert early is not None and threshold is not None
            change = float((output - early).abs().mean() / early.abs().mean())
            self._decide(generation, step, "changed" if change > threshold else None, change)
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
        return Generation(StepTracker(self.train_timesteps, explicit))

    def swap_generation(self, other: Any) -> Any:
        """Put another generation in this thread's place; ``None``: a new one. Returns what was there before."""
        before, self._current.generation = self._current.generation, other or self.new_generation(explicit=True)
        return before

    # Deciding ---------------------------------------------------------------------------------------------------

    def _why_full(self, generation: Generation, step: Step) -> str | None:
        """Why a step is full whatever the early feature says; ``None`` if nothing asks for it."""
        if step.ambiguous:
            return "too many calls a step"
        kept = generation.record.features.get(step.call)
        if kept is None or not self._complete(kept):
            return "first step" if step.new_generation else "nothing kept"
        if not step.same_size(kept.step):
            return "other batch or size"
        if self.config.full_steps is not None:
            return "listed" if step.number in self.config.full_steps else None
        age = step.number - kept.step.number
        if age >= self.config.interval_at(step.noise_level):
            return "interval"
        return "same noise level" if age == 0 else None

    def _decide(self, generation: Generation, step: Step, reason: str | None, change: float | None = None) -> None:
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
    """The cache whose hooks are on a UNet, or ``None``. A compiled UNet's may be on either of its two modules."""
    found = next(iter(owners_of_hooks(unet, FeatureCache)), None)
    forwards = [] if found else forwards_on(getattr(unet, "mid_block", None) or nn.Module(), SkippableForward)
    return found or next((owner for f in forwards if isinstance(owner := _owner(f), FeatureCache)), None)


def _owner(forward: SkippableForward) -> Any:
    return getattr(forward.ask, "__self__", None)
