"""What a UNet's skipped layers share: which kind of step is under way, and what the last full steps left."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.layers import inner_layers, make_skippable, restore_forwards, skipping_cache
from tomesd_plus.caching.report import CacheStep
from tomesd_plus.host.models import owners_of_hooks, sample_and_timestep
from tomesd_plus.host.step import MOST_CALLS, Step, StepTracker, outside_graphs


@dataclass
class _Features:
    """What a full step left: the skipped layers' outputs by name, the early feature, and which step it was.

    Args:
        before: What the full step before it left, at another noise level; ``None`` if there is no trend to follow.
    """

    step: Step
    outputs: dict[str, Any] = field(default_factory=dict)
    early: Tensor | None = None
    before: "_Features | None" = None


class FeatureCache:
    """Decides for each call of one UNet whether it is full, and keeps the features between.

    Its bound methods are the hooks on the UNet; they copy and pickle.

    Args:
        config: When a step is full, and which layers the others run.
        train_timesteps: Timesteps of the model's training, for the noise level.
    """

    mode: Literal["idle", "undecided", "full", "cached"]  # idle outside of the UNet's calls
    outputs: dict[str, Any]  # those of the call under way
    steps: deque[CacheStep]  # of the latest generation
    when_decided: list[Callable[[bool], None]]  # told whether the call under way is cached, once that is known
    _features: dict[int, _Features]  # by the number of the call in its step
    _step: Step | None  # the latest call's
    _too_many: bool  # of the generation's calls are at one step: they can no longer be told apart, so all are full

    def __init__(self, config: FeatureCacheConfig, train_timesteps: int = 1000) -> None:
        self.config = config
        self.tracker = StepTracker(train_timesteps)
        self.steps = deque(maxlen=1000)  # a caller may never begin a new generation
        self.skipped: tuple[str, ...] = ()
        self._handles: list[Any] = []
        self._forget()

    # Installing -------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """True while the hooks are on a UNet."""
        return bool(self._handles)

    def attach(self, unet: nn.Module) -> None:
        """Make a UNet's inner layers skippable and put hooks on it."""
        layers = inner_layers(unet, self.config.branch)
        self.skipped = tuple(layers)
        make_skippable(layers, self)
        # Before all others: token merging asks for the step's kind in its own.
        self._handles.append(unet.register_forward_pre_hook(self.begin_step, prepend=True, with_kwargs=True))
        self._handles.append(unet.register_forward_hook(self.end_step, always_call=True))
        if self.config.threshold is not None:
            self._handles.append(unet.get_submodule("conv_in").register_forward_hook(self.read_early_feature))

    def detach(self, unet: nn.Module) -> None:
        """Take everything off again and free what is kept. The record of steps stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        restore_forwards(unet)
        self._forget()

    # Hooks ------------------------------------------------------------------------------------------------------

    @outside_graphs
    def begin_step(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the UNet: tell the kind of this step, unless the early feature must be seen first."""
        if not self.attached:  # a compiled UNet may still call hooks that were removed
            return
        self.when_decided = []
        make_skippable(inner_layers(unet, self.config.branch), self)  # offloading may have put old forwards back
        self._place(self.tracker.observe(*sample_and_timestep(args, kwargs)))
        reason = self._why_full()
        if reason is None and self.config.threshold is not None:
            self.mode = "undecided"
        else:
            self._decide(reason)

    @outside_graphs
    def read_early_feature(self, conv_in: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After ``conv_in``, the UNet's first layer: decide by how much its output has changed."""
        assert self._step is not None
        if self.mode == "undecided":
            early, threshold = self._features[self._step.call].early, self.config.threshold
            assert early is not None and threshold is not None
            change = float((output - early).abs().mean() / early.abs().mean())
            self._decide("changed" if change > threshold else None, change)
        if self.mode == "full":
            self._features[self._step.call].early = output.detach()

    def end_step(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the UNet, also after one that raised an exception: its layers are ordinary ones again.

        PyTorch does not call it after a ``KeyboardInterrupt``; then they are so from the UNet's next call on.
        """
        self.mode = "idle"
        self.outputs = {}
        self.when_decided = []

    # Deciding ---------------------------------------------------------------------------------------------------

    def _place(self, step: Step) -> None:
        """Take a step in."""
        self._step = step
        if step.new_generation:
            self._features.clear()
            self.steps.clear()
            self._too_many = False
        self._too_many = self._too_many or step.call >= MOST_CALLS
        if self._too_many:
            self._features.clear()

    def _why_full(self) -> str | None:
        """Why the step at hand is full whatever the early feature says; ``None`` if nothing asks for it."""
        step = self._step
        assert step is not None
        if self._too_many:
            return "too many calls a step"
        kept = self._features.get(step.call)
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

    def _decide(self, reason: str | None, change: float | None = None) -> None:
        step = self._step
        assert step is not None
        if reason is not None:
            self._features[step.call] = _Features(step, before=self._full_before(step))
        self.mode = "cached" if reason is None else "full"
        kept = self._features[step.call]
        ahead = self._ahead(kept, step) if reason is None else 0.0
        self.outputs = self._forecast(kept, ahead) if ahead else kept.outputs
        self.steps.append(CacheStep(step.index, step.noise_level, reason, change, ahead))
        for tell in self.when_decided:
            tell(reason is None)

    def _complete(self, kept: _Features) -> bool:
        """False if the step that left it has failed on its way."""
        return kept.outputs.keys() == set(self.skipped)

    def _full_before(self, step: Step) -> _Features | None:
        """What the last full step before a full one left, where it makes a trend."""
        kept = self._features.get(step.call)
        if kept is not None and kept.step.number == step.number:
            kept = kept.before
        if not self.config.forecast or kept is None or not self._complete(kept) or not step.same_size(kept.step):
            return None
        return _Features(kept.step, kept.outputs)

    def _ahead(self, kept: _Features, step: Step) -> float:
        """How far a cached step follows the trend, as a share of the way between the last two full steps."""
        if kept.before is None:
            return 0.0
        age, gap = step.number - kept.step.number, kept.step.number - kept.before.step.number
        return self.config.forecast * min(1.0, age / gap)

    def _forecast(self, kept: _Features, ahead: float) -> dict[str, Any]:
        """The outputs that a cached step takes then."""
        assert kept.before is not None
        seam = self.skipped[-1]
        return {**kept.outputs, seam: _extrapolate(kept.before.outputs[seam], kept.outputs[seam], ahead)}

    def skips(self, layer: str) -> bool:
        """True if cached steps skip a layer of the UNet, given by name."""
        return any(layer == name or layer.startswith(f"{name}.") for name in self.skipped)

    # State ------------------------------------------------------------------------------------------------------

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept between steps."""
        kept = list(self._features.values())
        kept += [each.before for each in kept if each.before is not None]
        tensors = [each.early for each in kept if each.early is not None]
        for each in kept:
            seam = each.outputs.get(self.skipped[-1], ())
            tensors += seam if isinstance(seam, tuple) else [seam]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _forget(self) -> None:
        self.mode = "idle"
        self.outputs = {}
        self._features = {}
        self._step = None
        self.when_decided = []
        self._too_many = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mode": "idle", "outputs": {}, "when_decided": [], "_features": {}, "_step": None}


def _extrapolate(first: Any, second: Any, ahead: float) -> Any:
    """Go on from the second of two outputs by a share of the way between them; the second if they are not alike."""
    if isinstance(first, tuple):
        return tuple(_extrapolate(one, other, ahead) for one, other in zip(first, second, strict=True))
    if (first.dtype, first.device) != (second.dtype, second.device):  # the caller has moved the model in mid-run
        return second
    return torch.lerp(first, second, 1 + ahead)


def feature_cache_on(unet: nn.Module) -> FeatureCache | None:
    """The cache whose hooks are on a UNet, or ``None``. A compiled UNet's may be on either of its two modules."""
    found = next(iter(owners_of_hooks(unet, FeatureCache)), None)
    return found or skipping_cache(getattr(unet, "mid_block", None))
