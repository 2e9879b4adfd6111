"""Time the settings of a workload in turn, each on its own copy of the UNet or tower with shared weights.

Not with torch.utils.benchmark, which times one function after another: a slow phase would affect one setting only.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from tomesd_plus.benchmark.overhead import WATCHED, watched
from tomesd_plus.benchmark.settings import PACKAGE, STEPS, Setting
from tomesd_plus.benchmark.shapes import SHAPES, Shape, build_unet, call_model, make_inputs
from tomesd_plus.benchmark.towers import TOWERS, TowerRunner, tower_runner
from tomesd_plus.evaluation.errors import first_line
from tomesd_plus.evaluation.generation.devices import MEBIBYTE, dtype_by_name, peak_memory
from tomesd_plus.host.clock import seconds_of
from tomesd_plus.host.transformers import blocks_of, matches_flows

MAX_CALLS = STEPS  # per run
REFERENCE_CALLS = 5  # at most; the first setting, the reference, makes as many calls per run as the longest cycle
MIN_ROUNDS = 3  # with fewer at the deadline, the results are discarded
RECOMPILE_LIMIT = 256  # every setting compiles the same code again


@dataclass(frozen=True)
class Workload:
    """A UNet and its input.

    Args:
        shape: One of :data:`~tomesd_plus.benchmark.shapes.SHAPES`, or a vision tower's of
            :data:`~tomesd_plus.benchmark.towers.TOWERS`.
        size: Height and width of the image, pixels.
        batch: Batch size of the UNet, which includes both guidance branches.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        compiled: Whether ``unet.compile_repeated_blocks(fullgraph=True)`` is on; a tower is compiled as a whole.
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
        """``"eager"`` or ``"compiled"``."""
        return "compiled" if self.compiled else "eager"


@dataclass(frozen=True)
class Protocol:
    """How often and how long to measure.

    Args:
        repeats: Number of rounds; each runs every setting once.
        run_seconds: Approximate minimum time of a run; with a fast UNet, a run has several calls.
        deadline: When to stop, as a value of ``time.monotonic()``.
    """

    repeats: int = 5
    run_seconds: float = 0.2
    deadline: float = math.inf

    @property
    def is_over(self) -> bool:
        """True after the deadline."""
        return time.monotonic() > self.deadline


@dataclass
class Measured:
    """The measurements of one setting.

    Args:
        setting: The setting.
        seconds: For each run, the mean time of a UNet call.
        calls: UNet calls per run.
        matching_seconds, merging_seconds: Time per UNet call, in eager mode, of finding plans, and of merging and
            unmerging; ``None`` if the setting does not use this package's merging.
        memory_mib: Peak memory.
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
    """Run settings in turn, so that changes in the machine's load affect all of them alike; a warm-up comes first.

    Every run begins a new generation. Its number of calls is a multiple of the setting's cycle.

    Args:
        workload: The UNet and its input.
        settings: The first one is the reference; its time determines the number of calls per run.
        device: Where to run.
        protocol: How often and how long to measure.
        on_run: Called with the setting's name before each run.

    Returns:
        An entry for each setting; empty if the deadline came too early.
    """
    before_run = on_run or (lambda name: None)
    dtype, tower = dtype_by_name(workload.dtype, device), TOWERS.get(workload.shape)
    unet = tower.build(workload.size, dtype, device) if tower else build_unet(SHAPES[workload.shape], dtype, device)
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
            except Exception as error:  # other packages, the compiler, out of memory: continue with the others
                reason = first_line(error)[:120]
                results.append(Measured(setting, failure=f"failed: {type(error).__name__}: {reason}"))
        if results[0].failure:
            return results[:1]  # no reference
        least = protocol.run_seconds / candidates[0].run(1)
        reference = min(REFERENCE_CALLS, max(candidate.measured.setting.cycle for candidate in candidates))
        for done in range(protocol.repeats):
            if protocol.is_over:
                return results if done >= MIN_ROUNDS else []
            for candidate in candidates:
                before_run(candidate.measured.setting.name)
                candidate.run_and_time(max(least, reference) if candidate is candidates[0] else least)
    if workload.compiled:
        torch.compiler.reset()  # its graphs hold references to the UNets
    return results


class _Candidate:
    """A setting that has been switched on.

    Args:
        setting: The setting.
        pipe: A stand-in for a pipeline: a model and a scheduler; or a vision tower.
        shape: Of the model; ``None`` for a tower.
        inputs: Inputs of the model.
    """

    def __init__(self, setting: Setting, pipe: Any, shape: Shape | None, inputs: dict[str, Any]) -> None:
        self.measured = Measured(setting)
        self.pipe = pipe
        self.shape = shape
        self.inputs = inputs

    def run(self, calls: int) -> float:
        """Begin a generation; return the time of its UNet calls in seconds."""
        if isinstance(self.pipe, TowerRunner):
            return self.pipe.run(calls)
        shape, inputs, scheduler, model = self.shape, self.inputs, self.pipe.scheduler, model_of(self.pipe)
        assert shape is not None
        device = inputs["encoder_hidden_states"].device
        scheduler.set_timesteps(STEPS, device=device)  # new timestep tensors mark a new generation

        def work() -> None:
            for timestep in scheduler.timesteps[:calls]:
                call_model(model, shape, inputs, timestep)

        return seconds_of(work, device)

    def warm_up(self, device: torch.device, bare: float, compiled: bool) -> None:
        """Measure memory and the package's own functions, which would disturb the timed runs."""
        cycle, measured = self.measured.setting.cycle, self.measured
        others = _allocated(device) - bare  # tensors that other settings keep between steps
        if compiled:
            with peak_memory(device) as peak:
                self.run(cycle)
            with torch.compiler.set_stance("force_eager"), watched(device) as spent:
                self.run(cycle)
            self.run(cycle)
        else:
            if "levels" in self.measured.setting.switches.get("merge", {}):
                self.run(1)  # the gate measures in this call
            with peak_memory(device) as peak, watched(device) as spent:
                self.run(cycle)
        measured.memory_mib = (peak[0] - others) / MEBIBYTE
        if measured.setting.switches.keys() & {"merge", "tomesd", "preset"}:
            measured.matching_seconds, measured.merging_seconds = (spent[kind] / cycle for kind in WATCHED)

    def run_and_time(self, least: float) -> None:
        """Time one run of at least this many calls, rounded up to the setting's cycle and limited to MAX_CALLS."""
        cycle = self.measured.setting.cycle
        calls = cycle * max(1, min(math.ceil(least / cycle), MAX_CALLS // cycle))
        self.measured.calls = calls
        self.measured.seconds.append(self.run(calls) / calls)


@contextmanager
def _candidate(unet: nn.Module, setting: Setting, workload: Workload, device: torch.device) -> Iterator[_Candidate]:
    if workload.shape in TOWERS:
        with tower_runner(unet, setting, workload.size, workload.batch, workload.compiled) as runner:
            yield _Candidate(setting, runner, None, {})
        return
    shape = SHAPES[workload.shape]
    dtype = dtype_by_name(workload.dtype, device)
    pipe = stand_in(unet)
    if workload.compiled and shape.is_transformer:
        for block in blocks_of(pipe.transformer).values():
            block.compile(fullgraph=True)
    elif workload.compiled:
        # tomesd creates a generator in its forward, which breaks the graph
        pipe.unet.compile_repeated_blocks(fullgraph=PACKAGE not in setting.switches)
    with setting.switched_on(pipe, shape.finest, shape.grid(workload.size)):
        yield _Candidate(
            setting,
            pipe,
            shape,
            make_inputs(shape, workload.size, workload.batch, dtype, device),
        )


class StandIn(SimpleNamespace):
    """What of a pipeline settings are switched on at; unlike its base it can be referred to weakly."""


def stand_in(unet: nn.Module) -> StandIn:
    """A stand-in for a pipeline, on which settings can be switched on: a scheduler and a copy of the model."""
    if any(hasattr(unet, name) for name in ("down_blocks", "up_blocks")):
        return StandIn(unet=twin(unet), scheduler=DDIMScheduler(steps_offset=1))
    scheduler = FlowMatchEulerDiscreteScheduler() if matches_flows(unet) else DDIMScheduler(steps_offset=1)
    return StandIn(transformer=twin(unet), scheduler=scheduler)


def model_of(pipe: Any) -> nn.Module:
    """The model of a stand-in."""
    model: nn.Module = getattr(pipe, "unet", None) or pipe.transformer
    return model


def twin(unet: nn.Module) -> nn.Module:
    """Copy the modules but share the tensors, so that the copy takes no memory."""
    tensors = (*unet.parameters(), *unet.buffers())
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
