"""Noise levels of a scheduler's timesteps, whatever these are: of training, log σ, or σ itself."""

import bisect
import math
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from tomesd_plus.host.say import warn
from tomesd_plus.host.transient import Transient

CLEAR = 20.0
"""A fractional timestep above this is one of training: those in log σ and σ stay far below."""


class NoiseLevels:
    """Tells the noise level of a timestep: that of training with equal log-SNR, over ``T - 1``; σ of flow matching.

    Integer timesteps are those of training themselves. For others the scheduler's own σ and ᾱ are looked up, so a
    pipeline's scheduler may be changed at any time. A scheduler without ᾱ, as EDM's, is compared by the ᾱ that Stable
    Diffusion is trained with. Its place in the schedule serves where nothing else tells, and the user is told.

    Args:
        pipe: The pipeline; its scheduler is asked. Without one, timesteps of training are all that can be read.
        needed: True if something depends on the noise level, so that not knowing it deserves a warning.
        flow: True if the model was trained by flow matching, so that a timestep is T · σ.
    """

    def __init__(self, pipe: Any = None, needed: bool = True, flow: bool = False) -> None:
        self.needed = needed
        self.flow = flow
        self._scheduler = getattr(pipe, "scheduler", None)  # a copied pipeline's copy finds its own by this
        # Not held. What cannot be referred to so is a stand-in, whose scheduler stays what it is.
        referable = self._scheduler is not None and bool(type(pipe).__weakrefoffset__)
        self._pipe: Transient[weakref.ref[Any]] = Transient(weakref.ref(pipe) if referable else None)
        self._table: Transient[tuple[Tensor, int | None, dict[float, float], bool]] = Transient()
        self._told = False

    def of(self, timesteps: Sequence[float], largest: float = -math.inf) -> list[float]:
        """Noise levels in [0, 1] of timesteps.

        Args:
            timesteps: Of a generation, or one of them.
            largest: Of the same generation's timesteps so far: a large one tells that small ones are of training too.
        """
        table, flow = self._levels_of_scheduler()
        training = self.train_timesteps - (not self.flow)
        clear = CLEAR < max(*timesteps, largest) <= self.train_timesteps and min(timesteps) >= 0
        if flow and not clear and max(timesteps) <= 1:  # as Flux is called
            return [max(timestep, 0.0) for timestep in timesteps]
        levels = []
        for place, timestep in enumerate(timesteps):
            level = table.get(timestep)
            if level is None and (float(timestep).is_integer() or clear or self.flow):
                level = timestep / training
            level = _nearest(table, timestep) if level is None else level
            if level is None:
                self._tell(timestep)
                level = 1 - place / len(timesteps) if len(timesteps) > 1 else timestep / training
            levels.append(min(max(level, 0.0), 1.0))
        return levels

    @property
    def train_timesteps(self) -> int:
        """``T``: timesteps of training; 1,000 where no scheduler tells."""
        return _train_timesteps(self.scheduler)

    @property
    def scheduler(self) -> Any:
        """The pipeline's, as it is now; ``None`` if it has none."""
        pipe = self._pipe.value() if self._pipe.value is not None else None
        if pipe is not None:
            self._scheduler = getattr(pipe, "scheduler", None)
        return self._scheduler

    def _levels_of_scheduler(self) -> tuple[dict[float, float], bool]:
        """The scheduler's timesteps and their noise levels, read once a schedule; and if these are σ."""
        scheduler = self.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or not len(timesteps):
            return {}, False
        version = None if timesteps.is_inference() else timesteps._version
        if self._table.value is None or self._table.value[0] is not timesteps or self._table.value[1] != version:
            values = [float(value) for value in timesteps.tolist()]
            levels = scheduler_noise_levels(scheduler, values)
            table = {} if levels is None else dict(zip(values, levels, strict=True))
            self._table.value = timesteps, version, table, is_flow(scheduler)
        return self._table.value[2:]

    def _tell(self, timestep: float) -> None:
        if self._told or not self.needed:
            return
        self._told = True
        whose = "no scheduler is known" if self.scheduler is None else "the scheduler has none like it"
        warn(
            f"The noise level of timestep {timestep:g} cannot be known: it is none of training, and {whose}. What "
            "depends on it follows the place in the schedule instead. Apply to the pipeline that calls the model.",
            stacklevel=2,
        )


def scheduler_noise_levels(scheduler: Any, timesteps: Sequence[float]) -> list[float] | None:
    """Noise levels of a scheduler's timesteps, or ``None`` where its tables do not tell.

    Args:
        scheduler: One of diffusers', with its timesteps set.
        timesteps: The same on the host.
    """
    last = _train_timesteps(scheduler) - 1
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    found = getattr(scheduler, "sigmas", None)
    sigmas = None
    if found is not None and len(found) - len(timesteps) in (0, 1):
        sigmas = found.tolist() if isinstance(found, Tensor) else [float(sigma) for sigma in found]
    if sigmas is not None and is_flow(scheduler):
        return sigmas[: len(timesteps)]
    training = all(0 <= timestep <= last for timestep in timesteps)
    if training and all(float(timestep).is_integer() for timestep in timesteps):
        return [timestep / last for timestep in timesteps]
    if sigmas is None:
        return [timestep / last for timestep in timesteps] if training and alphas_cumprod is not None else None
    table = _stable_diffusion() if alphas_cumprod is None else tuple(float(alpha) for alpha in alphas_cumprod)
    levels = [_of_sigma(sigma, table) for sigma in sigmas[: len(timesteps)]]
    if training and abs(timesteps[0] / last - levels[0]) < 0.05:  # fractions of training's, as with Karras' σ
        return [timestep / last for timestep in timesteps]
    return levels


def _of_sigma(sigma: float, alphas_cumprod: tuple[float, ...]) -> float:
    """The training timestep of equal log-SNR, over its last; ``sigma`` is noise over signal."""
    if sigma <= 0:
        return 0.0
    logs = _log_sigmas(alphas_cumprod)
    above = bisect.bisect_left(logs, math.log(sigma))
    if above in (0, len(logs)):
        return float(above > 0)
    low, high = logs[above - 1], logs[above]
    return (above - 1 + (math.log(sigma) - low) / (high - low)) / (len(logs) - 1)


@lru_cache(maxsize=8)
def _log_sigmas(alphas_cumprod: tuple[float, ...]) -> tuple[float, ...]:
    floor = 2.0**-24  # zero-SNR schedules end at an ᾱ of 0
    return tuple(math.log((1 - alpha) / max(alpha, floor)) / 2 for alpha in alphas_cumprod)


@lru_cache(maxsize=1)
def _stable_diffusion() -> tuple[float, ...]:
    """ᾱ of Stable Diffusion's training: √β rises evenly from √0.00085 to √0.012 over 1,000 timesteps."""
    first, last, alphas, product = math.sqrt(0.00085), math.sqrt(0.012), [], 1.0
    for index in range(1000):
        product *= 1 - (first + (last - first) * index / 999) ** 2
        alphas.append(product)
    return tuple(alphas)


def is_flow(scheduler: Any) -> bool:
    """True for a scheduler of models that were trained by flow matching."""
    config, sigmas = getattr(scheduler, "config", None), getattr(scheduler, "sigmas", None)
    flow = getattr(config, "prediction_type", None) == "flow_prediction"
    said = flow or getattr(config, "use_flow_sigmas", False)
    bounded = isinstance(sigmas, Tensor) and float(sigmas.max()) <= 1
    return bool(said) or (bounded and not hasattr(scheduler, "alphas_cumprod"))


def _train_timesteps(scheduler: Any) -> int:
    return getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)


def _nearest(levels: dict[float, float], timestep: float) -> float | None:
    """The level of a timestep that may have been rounded on its way."""
    near = min(levels, key=lambda each: abs(each - timestep), default=None)
    return levels[near] if near is not None and math.isclose(near, timestep, rel_tol=4e-3, abs_tol=1e-4) else None
