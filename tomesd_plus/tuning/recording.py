"""One untouched generation of each prompt, recorded: what each step gives, and what a cached one would take."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.caching import FeatureCacheConfig, feature_cache
from tomesd_plus.caching.cache import FeatureCache, feature_cache_on
from tomesd_plus.host.clock import now
from tomesd_plus.host.denoisers import noise_levels_of, reader_of
from tomesd_plus.host.models import denoiser_of
from tomesd_plus.host.solver import solver_steps
from tomesd_plus.host.step import Step, StepTracker
from tomesd_plus.tuning.pictures import Task


@dataclass(frozen=True, eq=False)
class Recording:
    """What was recorded, all on the CPU.

    Args:
        pictures: (prompts, …).
        levels: The noise level of each step.
        calls: How often the denoiser is called at each step.
        size: Of the latents: height and width.
        outputs: What the scheduler was given at each step, which is the guided output, (steps, prompts, values).
        features: What cached steps would take, likewise; ``None`` if the model has no layers to skip.
        sensitivity: Squared error of the output of a cached step for each squared error of what it takes.
        seconds: Of the generations, without what recording has added, and of the denoiser's calls in them.
    """

    pictures: Tensor
    levels: tuple[float, ...]
    calls: tuple[int, ...]
    size: tuple[int, int]
    outputs: Tensor
    features: Tensor | None
    sensitivity: Tensor | None
    seconds: tuple[float, float]

    @property
    def falling(self) -> bool:
        """True if the noise levels tell the steps apart."""
        return all(late < early for early, late in zip(self.levels, self.levels[1:]))


def record(task: Task, prompts: Sequence[tuple[int, str]], steps: int, caches: bool) -> Recording:
    """Generate, and keep what is needed to tell errors of forecasts without generating again.

    Args:
        task: What is generated.
        prompts: With their numbers.
        steps: Solver steps.
        caches: The model has layers that cached steps skip: at each step those that they run are run once more, on
            what the step before has left.
    """
    denoiser, parts = denoiser_of(task.pipe), []
    start = now(_device(denoiser))
    for first in range(0, len(prompts), task.batch_size):
        batch = prompts[first : first + task.batch_size]
        recorder = _Recorder(denoiser, len(batch), task)
        with ExitStack() as stack:
            if caches:
                stack.enter_context(feature_cache(task.pipe, FeatureCacheConfig(interval=1)))  # all in full
            recorder.attach(stack)
            pictures = task.pictures(batch, steps)
        if len(recorder.outputs) != len(recorder.steps):
            raise ValueError(
                f"the denoiser ran at {len(recorder.steps)} steps and the scheduler at {len(recorder.outputs)}: what "
                "each step gives cannot be told in this pipeline"
            )
        parts.append((pictures, recorder))
    seconds = now(_device(denoiser)) - start
    recorders = [recorder for _, recorder in parts]
    one = recorders[0]
    features = [recorder.features for recorder in recorders]
    return Recording(
        torch.cat([pictures for pictures, _ in parts]),
        tuple(step.noise_level for step in one.steps),
        tuple(one.calls),
        (one.steps[0].height, one.steps[0].width),
        torch.cat([torch.stack(recorder.outputs) for recorder in recorders], 1),
        torch.cat([torch.stack(each) for each in features], 1) if caches else None,
        torch.cat([torch.stack(recorder.sensitivity) for recorder in recorders], 1) if caches else None,
        (
            seconds - sum(recorder.recording_seconds for recorder in recorders),
            sum(recorder.seconds for recorder in recorders),
        ),
    )


class _Recorder:
    """Hooks on a denoiser and its scheduler that keep what each step gives, of one batch."""

    def __init__(self, denoiser: nn.Module, count: int, task: Task) -> None:
        self.denoiser = denoiser
        self.count = count
        self.task = task
        self.read = reader_of(task.pipe)
        self.tracker = StepTracker(noise_levels_of(task.pipe))
        self.cache: FeatureCache | None = None
        self.steps: list[Step] = []
        self.calls: list[int] = []
        self.outputs: list[Tensor] = []  # a step: (prompts, values)
        self.features: list[Tensor] = []
        self.sensitivity: list[Tensor] = []  # a step: (prompts,)
        self.seconds = self.recording_seconds = 0.0
        self._started = 0.0
        self._left: dict[str, Any] = {}  # what the step before has left

    def attach(self, stack: ExitStack) -> None:
        """Put the hooks on until the stack is closed."""
        self.cache = feature_cache_on(self.denoiser)
        for handle in (
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after, with_kwargs=True),
        ):
            stack.callback(handle.remove)
        stack.enter_context(solver_steps(self.task.pipe, self._take))

    def _take(self, model_output: Tensor, sample: Tensor) -> None:
        """A scheduler's step, which is given what guidance has made of the calls, however many there were."""
        if model_output.shape[1] == 2 * sample.shape[1]:  # the second half is a learned variance
            model_output = model_output.chunk(2, dim=1)[0]
        self._keep(self.outputs, self._by_prompt(model_output))

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._started = now(_device(model))

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ended = now(_device(model))
        self.seconds += ended - self._started
        self._record(model, args, kwargs, output)
        self.recording_seconds += now(_device(model)) - ended

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        reading = self.read(model, args, kwargs)
        step = self.tracker.observe(reading.sample, reading.timestep, reading.text)
        if step.number < len(self.steps):
            self.calls[step.number] += 1
        else:
            self.steps.append(step)
            self.calls.append(1)
        if self.cache is None or self.cache.record.value is None:
            return
        left = dict(self.cache.record.value.features[step.call].outputs)
        taken, given = self._guided(left[self.cache.boundary[0]]), self._guided(_first(output))
        sensitivity = torch.zeros(self.count)
        if self._left:
            with self.cache.taking(self._left), torch.no_grad():
                cached = self._guided(_first(model.forward(*args, **kwargs)))
            change = (taken - self._guided(self._left[self.cache.boundary[0]])).square().mean(1)
            sensitivity = (cached - given).square().mean(1) / change.clamp(min=1e-20)
        for kept, new in ((self.features, taken), (self.sensitivity, sensitivity)):
            self._keep(kept, new)
        self._left = left

    def _keep(self, kept: list[Tensor], new: Tensor) -> None:
        """Of the step under way; once more at a step, the latest counts."""
        del kept[len(self.steps) - 1 :]
        kept.append(new)

    def _guided(self, value: Any) -> Tensor:
        """What guidance makes of the two halves of a batch, (prompts, values); other batches as they are."""
        tensor = _first(value)
        scale = self.task.guidance_scale
        scale = getattr(self.task.pipe, "guidance_scale", None) if scale is None else scale
        if len(tensor) == 2 * self.count and isinstance(scale, (int, float)):
            without, given = tensor.chunk(2)
            tensor = without + scale * (given - without)
        return self._by_prompt(tensor)

    def _by_prompt(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().float().cpu()
        if len(tensor) % self.count:
            raise ValueError(f"a call of {len(tensor)} samples is no multiple of {self.count} prompts")
        return tensor.unflatten(0, (-1, self.count)).transpose(0, 1).flatten(1)


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
