"""Times one workload: all its settings in turn, each on a UNet of its own with the weights of all."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn

from tomesd_plus.benchmark.overhead import WATCHED, watched
from tomesd_plus.benchmark.settings import PACKAGE, STEPS, Setting
from tomesd_plus.benchmark.shapes import LATENT_PIXELS, SHAPES, build_unet, make_inputs
from tomesd_plus.evaluation.errors import first_line
from tomesd_plus.evaluation.generation.devices import MEBIBYTE, dtype_by_name, peak_memory
from tomesd_plus.host.clock import moment, seconds_between

MAX_CALLS = STEPS  # in a run
REFERENCE_CALLS = 5  # the first setting, which all are compared with, runs as long as the longest, up to so many calls
LEAST_ROUNDS = 3  # fewer, where time runs out, give no row
RECOMPILE_LIMIT = 256  # every setting is a graph of the same code


@dataclass(frozen=True)
class Workload:
    """A UNet and its input.

    Args:
        shape: One of :data:`~tomesd_plus.benchmark.shapes.SHAPES`.
        size: Height and width of the picture, pixels.
        batch: Samples, both guidance branches counted.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        compiled: Whether ``unet.compile_repeated_blocks(fullgraph=True)`` is on.
    """

    shape: str
    size: int
    batch: int = 2
    dtype: str = "float32"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.shape} {self.size}², batch {self.batch}, {self.dtype}, {self.mode}"

    @property
    def mode(self) -> str:
        """Eager or compiled."""
        return "compiled" if self.compiled else "eager"


@dataclass(frozen=True)
class Protocol:
    """How often is measured.

    Args:
        repeats: Rounds, each of which runs every setting once.
        run_seconds: A run takes at least about so long: that of a fast UNet is of several calls.
        deadline: When to stop, of ``time.monotonic()``.
    """

    repeats: int = 5
    run_seconds: float = 0.2
    deadline: float = math.inf

    @property
    def is_over(self) -> bool:
        """True if time is up."""
        return time.monotonic() > self.deadline


@dataclass
class Measured:
    """What one setting gave.

    Args:
        setting: Which.
        seconds: Of a UNet call, the mean of each run.
        calls: UNet calls a run.
        matching_seconds, merging_seconds: Of a UNet call, eager: finding plans; merging and unmerging. ``None`` where
            the package's own functions do not run.
        memory_mib: Peak.
        failure: Why there are no times.
    """

    setting: Setting
    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    matching_seconds: float | None = None
    merging_seconds: float | None = None
    memory_mib: float | None = None
    failure: str = ""


def measure(
    workload: Workload,
    settings: Sequence[Setting],
    device: torch.device,
    protocol: Protocol,
    on_run: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Run settings in turn, so that a machine's noise meets them alike; a warm-up of each goes before.

    Every run begins a generation: as many calls as it takes until a setting's work repeats, or a multiple.

    Args:
        workload: What runs.
        settings: The first is the one whose time tells how many calls make a run.
        device: Where.
        protocol: How often.
        on_run: Called with the setting's name before each run.

    Returns:
        An entry a setting; none at all if time was up too soon.
    """
    before_run = on_run or (lambda name: None)
    unet = build_unet(SHAPES[workload.shape], dtype_by_name(workload.dtype, device), device)
    bare = _allocated(device)
    candidates: list[_Candidate] = []
    results: list[Measured] = []
    with ExitStack() as stack, torch.no_grad(), torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        for setting in settings:
            if protocol.is_over:
                return []
            before_run(setting.name)
            try:
                with ExitStack() as own:
                    candidate = own.enter_context(_candidate(unet, setting, workload, device))
                    candidate.warm_up(device, bare, workload.compiled)
                    stack.enter_context(own.pop_all())
                candidates.append(candidate)
                results.append(candidate.measured)
            except Exception as error:  # of a peer, a compiler, a full memory: the others go on
                reason = first_line(error)[:120]
                results.append(Measured(setting, failure=f"failed: {type(error).__name__}: {reason}"))
        if results[0].failure:
            return results[:1]  # there is nothing to compare with
        least = protocol.run_seconds / candidates[0].run(1)
        reference = min(REFERENCE_CALLS, max(candidate.measured.setting.cycle for candidate in candidates))
        for done in range(protocol.repeats):
            if protocol.is_over:
                return results if done >= LEAST_ROUNDS else []
            for candidate in candidates:
                before_run(candidate.measured.setting.name)
                candidate.run_and_time(max(least, reference) if candidate is candidates[0] else least)
    if workload.compiled:
        torch.compiler.reset()  # its graphs would keep the UNets
    return results


class _Candidate:
    """A setting that is on.

    Args:
        setting: Which.
        pipe: A UNet of its own, and a scheduler.
        inputs: Of the UNet.
    """

    def __init__(self, setting: Setting, pipe: Any, inputs: dict[str, Any]) -> None:
        self.measured = Measured(setting)
        self.pipe = pipe
        self.inputs = inputs

    def run(self, calls: int) -> float:
        """Begin a generation; returns the seconds that its UNet calls took."""
        inputs = dict(self.inputs)
        sample = inputs.pop("sample")
        self.pipe.scheduler.set_timesteps(STEPS, device=sample.device)  # new tensors: a new generation
        start = moment(sample.device)
        for timestep in self.pipe.scheduler.timesteps[:calls]:
            self.pipe.unet(sample, timestep, **inputs, return_dict=False)
        return seconds_between(start, moment(sample.device))

    def warm_up(self, device: torch.device, bare: float, compiled: bool) -> None:
        """Run to watch the memory and the package's own functions, both of which would disturb the times."""
        cycle, measured = self.measured.setting.cycle, self.measured
        others = _allocated(device) - bare  # what other settings keep from step to step
        if compiled:
            with peak_memory(device) as peak:
                self.run(cycle)
            with torch.compiler.set_stance("force_eager"), watched(device) as spent:
                self.run(cycle)
            self.run(cycle)
        else:
            if "levels" in self.measured.setting.switches.get("merge", {}):
                self.run(1)  # in which a gate measures
            with peak_memory(device) as peak, watched(device) as spent:
                self.run(cycle)
        measured.memory_mib = (peak[0] - others) / MEBIBYTE
        if measured.setting.switches.keys() & {"merge", "tomesd", "preset"}:
            measured.matching_seconds, measured.merging_seconds = (spent[kind] / cycle for kind in WATCHED)

    def run_and_time(self, least: float) -> None:
        """Run about as many calls as wanted."""
        cycle = self.measured.setting.cycle
        calls = cycle * max(1, min(math.ceil(least / cycle), MAX_CALLS // cycle))
        self.measured.calls = calls
        self.measured.seconds.append(self.run(calls) / calls)


@contextmanager
def _candidate(unet: nn.Module, setting: Setting, workload: Workload, device: torch.device) -> Iterator[_Candidate]:
    shape, latent = SHAPES[workload.shape], workload.size // LATENT_PIXELS
    dtype = dtype_by_name(workload.dtype, device)
    pipe = stand_in(unet)
    if workload.compiled:
        # at the first call; tomesd makes a generator in its forward, which breaks the graph
        pipe.unet.compile_repeated_blocks(fullgraph=PACKAGE not in setting.switches)
    with setting.switched_on(pipe, shape.finest, (latent, latent)):
        yield _Candidate(
            setting,
            pipe,
            make_inputs(shape, workload.size, workload.batch, dtype, device),
        )


def stand_in(unet: nn.Module) -> SimpleNamespace:
    """What settings are switched on for, in place of a pipeline: a scheduler, and a twin of a UNet."""
    return SimpleNamespace(unet=twin(unet), scheduler=DDIMScheduler(steps_offset=1))


def twin(unet: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same tensors, so that it takes no memory."""
    tensors = (*unet.parameters(), *unet.buffers())
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
