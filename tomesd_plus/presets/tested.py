"""Where the presets by name were compared with fewer steps, and what is said at a generation's first call."""

from typing import Any

from torch import Tensor, nn

from tomesd_plus.caching.cache import FeatureCache, feature_cache_on
from tomesd_plus.host.arguments import call_of
from tomesd_plus.host.models import owners_of_hooks
from tomesd_plus.host.names import solver_name
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.say import warn
from tomesd_plus.host.step import outside_graphs
from tomesd_plus.host.timesteps import share_memory
from tomesd_plus.host.transient import Transient

FEW = 8
"""With so many steps or fewer there is next to nothing to take from the step before: merging alone pays."""
STEPS = (15, 20, 25, 30, 50)
"""Those that were tried; other numbers are judged by the nearest."""
SOLVERS = {
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepScheduler, Karras",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}
"""Those that were tried."""
MISSES = frozenset(
    {
        ("balanced", "DPMSolverMultistepScheduler, Karras", 50),
        ("fast", "DDIMScheduler", 15),
        ("fast", "EulerDiscreteScheduler", 15),
    }
)
"""Preset, solver and steps where fewer steps in the same time are closer: rows of ``results/presets.csv``."""


def why_not(name: str, solver: str, steps: int, taken: int | None = None) -> str | None:
    """Why a preset is refused with a solver at a number of steps, with what to do; ``None`` if it is not.

    Args:
        name: The preset's.
        solver: As :func:`~tomesd_plus.host.names.solver_name` says.
        steps: Of the scheduler. Numbers that were not tried are judged by the nearest that was.
        taken: How many of them a generation takes: image-to-image takes a part. All by default.

    Example:
        >>> why_not("fast", "DDIMScheduler", 4)[:66]
        "the preset 'fast' is for 9 steps and more: with 4 there is next to"
    """
    force = ", or insist with force=True"
    taken = steps if taken is None else taken
    if taken <= FEW:
        return (
            f"the preset {name!r} is for {FEW + 1} steps and more: with {taken} there is next to nothing to take from "
            f"the step before. Merge alone, by apply_token_merging(pipe, ratio=0.5){force}"
        )
    nearest = min(STEPS, key=lambda each: abs(each - steps))
    if (name, solver, nearest) in MISSES:
        here = "" if nearest == steps else f" ({steps} were not tried)"
        return (
            f"with {solver} at {nearest} steps{here} the pictures of the preset {name!r} were further from the "
            "untouched ones than those of fewer steps in the same time. Call tune, which finds what suits this "
            f"pipeline{force}"
        )
    return None


class FirstCall:
    """Looks at a generation's first call, when the scheduler's steps are known; a hook on a denoiser.

    Args:
        look: Given the scheduler and the call's timestep; returns True once this schedule is found right.
        pipe: The pipeline; its scheduler may be changed at any time.
        cache: The preset's; without it there is nothing to look at any more.
    """

    def __init__(self, look: "Refusal | StepsCheck", pipe: Any, cache: FeatureCache) -> None:
        self._look = look
        self._levels = NoiseLevels(pipe, needed=False)  # which finds a copied pipeline's scheduler, too
        self._cache = cache
        self._right: Transient[Tensor] = Transient()  # timesteps that were found right
        self._handle: Any = None

    def attach(self, denoiser: nn.Module) -> None:
        """Put the hook on, before all others."""
        self._handle = denoiser.register_forward_pre_hook(self.begin_call, prepend=True, with_kwargs=True)

    def detach(self) -> None:
        """Take it off."""
        self._handle.remove()

    @outside_graphs
    def begin_call(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call.

        Raises:
            ValueError: The preset is refused here.
        """
        if feature_cache_on(denoiser) is not self._cache:  # it was removed by its own name
            self.detach()
            return
        scheduler = self._levels.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps is self._right.value:
            return
        if self._look(scheduler, call_of(denoiser, args, kwargs)[1]):
            self._right.value = timesteps


class Refusal:
    """Refuses a preset by name where fewer steps are closer, and says once with which solver it was not tried.

    Args:
        name: The preset's. Calls whose timesteps are not the scheduler's own, as those of another pipeline with the
            same denoiser, are let pass.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._told: set[str] = set()

    def __call__(self, scheduler: Any, timestep: Any) -> bool:
        """Look at a call; raises ValueError if the preset is refused."""
        if not isinstance(timestep, Tensor) or not share_memory(timestep, scheduler.timesteps):
            return False
        solver, left = solver_name(scheduler), 1 - timestep.storage_offset() / len(scheduler.timesteps)
        steps = getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps)
        reason = why_not(self.name, solver, steps, round(steps * left))
        if reason is not None:
            raise ValueError(reason)
        if solver not in SOLVERS | self._told:
            self._told.add(solver)
            warn(
                f"the presets by name were not tried with {solver}: see with `tomesd-plus compare` if fewer steps are "
                "closer here, or call tune, which finds what suits this pipeline."
            )
        return True


class StepsCheck:
    """Says once if a preset that was chosen to be called with fewer steps is called with another number.

    Args:
        steps: With how many it is to be called.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._told: set[int] = set()

    def __call__(self, scheduler: Any, timestep: Any) -> bool:
        """Look at a call of whatever timestep: some transformers are given none of the scheduler's own."""
        steps = getattr(scheduler, "num_inference_steps", None)
        if steps is not None and steps != self.steps and steps not in self._told:
            self._told.add(steps)
            warn(
                f"this preset is to be called with num_inference_steps={self.steps}, fewer than the untouched "
                f"pictures have, and was called with {steps}: carried over it is not as fast and close as measured."
            )
        return steps is not None


def first_calls_on(denoiser: nn.Module) -> list[FirstCall]:
    """Those whose hooks are on a denoiser."""
    return owners_of_hooks(denoiser, FirstCall)
