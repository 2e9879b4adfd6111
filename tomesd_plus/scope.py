"""Say that a generation begins, where no pipeline tells."""

from types import TracebackType
from typing import Any

from torch import nn

from tomesd_plus.caching.cache import FeatureCache, feature_cache_on
from tomesd_plus.host.models import denoiser_of, models_of, unwrapped
from tomesd_plus.host.say import warn
from tomesd_plus.merging.attachment import Attachment, attachments_on
from tomesd_plus.merging.processor import attach_to


class generation:
    """A ``with`` block whose calls of the model are one generation, for loops of one's own.

    Pipelines need none of this: a generation's beginning is read off the scheduler's timesteps. A loop that starts in
    the middle of a schedule, jumps, or serves several pictures in turn tells it by this. Entered again, it goes on
    where it was left, so one thread can hold several::

        first, second = generation(pipe), generation(pipe)
        for t in pipe.scheduler.timesteps:
            with first:
                ...
            with second:
                ...

    Each thread has generations of its own in any case; steps of one generation that run in several threads, as of a
    generator that a pool consumes, need a scope around each. What is switched on inside the block does not belong to
    it. Blocks are left in the reverse order of entering.

    Args:
        pipe: A diffusers pipeline, UNet, transformer or ControlNet on which merging, a cache or a preset is on.

    Raises:
        TypeError: ``pipe`` has no UNet or transformer.
        RuntimeError: It is entered while it is entered already.

    Example:
        >>> from tomesd_plus import apply_feature_cache, generation, load_tiny_pipeline
        >>> import torch
        >>> unet = load_tiny_pipeline().unet
        >>> report = apply_feature_cache(unet, interval=2)
        >>> latents, text = torch.zeros(1, 4, 16, 16), torch.zeros(1, 16, unet.config.cross_attention_dim)
        >>> with generation(unet), torch.no_grad():  # timesteps may also rise, as in DDIM inversion
        ...     outputs = [unet(latents, t, text).sample for t in (100, 300, 500)]
        >>> [step.full for step in report.steps]
        [True, False, True]
    """

    def __init__(self, pipe: Any) -> None:
        self._models = _models(pipe)
        self._held: dict[Attachment | FeatureCache, Any] = {}  # this generation's state while it is left
        self._outside: dict[Attachment | FeatureCache, Any] | None = None  # what was there before it was entered

    def __enter__(self) -> "generation":
        if self._outside is not None:
            raise RuntimeError("this generation is under way already: leave its with block first")
        owners: list[Attachment | FeatureCache] = []
        for model in self._models.values():
            attach_to(model)  # a processor that was set by itself waits for the first call
            cache = feature_cache_on(model)
            owners += [*attachments_on(model), *([] if cache is None else [cache])]
        if not owners:
            warn("nothing is switched on here whose generation could begin", stacklevel=2)
        self._outside = {
            owner: owner.swap_generation(self._held.pop(owner, None) or owner.explicit_state()) for owner in owners
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outside, self._outside = self._outside or {}, None
        self._held = {owner: owner.swap_generation(state) for owner, state in outside.items() if owner.attached}


def _models(pipe: Any) -> dict[str, nn.Module]:
    """The models on which something may be switched on."""
    try:
        return models_of(pipe)
    except TypeError:
        return {"model": unwrapped(denoiser_of(pipe))}  # a transformer's calls can be skipped
