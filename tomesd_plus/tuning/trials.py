"""Plans tried on pictures, each once, within a budget of work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tomesd_plus.tuning.errors import Errors
from tomesd_plus.tuning.pictures import Task, psnr_of, squared_error, switched_on
from tomesd_plus.tuning.plans import Costs, Plan, untouched
from tomesd_plus.tuning.recording import Recording, record


@dataclass(eq=False)
class Trials:
    """The pictures' fidelity of plans that were tried.

    Args:
        task: What is generated.
        prompts: Those that are chosen on, with their numbers.
        costs: Of a step of each kind.
        most: The most work, in untouched generations of all prompts.
        caches: The model has layers that cached steps skip.
        on_work: Told of the work that was done, in the same unit, and what it was for.
    """

    task: Task
    prompts: Sequence[tuple[int, str]]
    costs: Costs
    most: float
    caches: bool
    on_work: Callable[[float, str], None]
    spent: float = 0.0
    tried: dict[Plan, Tensor] = field(default_factory=dict)
    recordings: dict[int, Recording] = field(default_factory=dict)

    def recording(self, steps: int) -> Recording:
        """An untouched generation of so many solver steps, recorded once."""
        if steps not in self.recordings:
            made = record(self.task, self.prompts, steps, self.caches)
            self.recordings[steps] = made
            self.work(
                (1.2 if self.caches else 1.0) * sum(made.calls) / sum(self.full.calls), f"{steps} steps recorded"
            )
            self.tried[self.untouched(steps)] = squared_error(made.pictures, self.full.pictures)
        return self.recordings[steps]

    def untouched(self, steps: int) -> Plan:
        """All in full, of so many solver steps."""
        return untouched(len(self.recording(steps).levels)).called_with(steps)

    @property
    def full(self) -> Recording:
        """That of the untouched pictures."""
        return self.recordings[self.task.steps]

    @property
    def left(self) -> float:
        """How much work is left."""
        return self.most - self.spent

    def work(self, amount: float, what: str) -> None:
        """Note work that was done."""
        self.spent += amount
        self.on_work(amount, what)

    def cost(self, plan: Plan) -> float:
        """Of a plan's calls, in full ones."""
        return plan.cost(self.costs, self.recording(plan.steps).calls)

    def speedup(self, plan: Plan) -> float:
        """Of the denoising calls."""
        return sum(self.full.calls) / self.cost(plan)

    def error(self, plan: Plan) -> Tensor:
        """Squared errors of the pictures with a plan, (prompts,); generated if they were not."""
        if plan not in self.tried:
            with switched_on(self.task.pipe, plan):
                made = self.task.pictures(self.prompts, plan.steps)
            self.tried[plan] = squared_error(made, self.full.pictures)
            self.work(1 / self.speedup(plan), f"{self.psnr(plan):.1f} dB at {self.speedup(plan):.2f}×")
        return self.tried[plan]

    def psnr(self, plan: Plan) -> float:
        """Mean over the prompts in dB."""
        return psnr_of(self.error(plan))

    def errors(self, steps: int, gains: Tensor, weights: Tensor) -> Errors:
        """Errors along a recording of so many steps.

        Args:
            steps: Solver steps.
            gains: What an error in a step's output does to the picture of the untouched pictures' steps, (steps,
                prompts). At fewer steps each is by so much longer, and so is what an error in it does.
            weights: Of each prompt.
        """
        made = self.recording(steps)
        count = len(made.outputs)
        if count != len(gains):
            places = torch.linspace(0, len(gains) - 1, count)
            low, share = places.floor().long(), (places % 1)[:, None]
            high = (low + 1).clamp(max=len(gains) - 1)
            of_all = len(gains)
            gains = (gains[low] * (1 - share) + gains[high] * share) * (of_all / count) ** 2
        return Errors(made.outputs, made.features, made.sensitivity, gains, weights)


def measured_gains(trials: Trials, probes: int) -> Tensor:
    """What an error in a step's output does to the picture: (steps, prompts), in squared errors.

    A few steps are skipped, each in a generation of its own, which tells the error of the output and that of the
    picture; between them the gain is interpolated in its logarithm.

    Args:
        trials: With a recording of the untouched pictures.
        probes: How many steps, at most.
    """
    made = trials.full
    steps = len(made.outputs)
    if steps < 3:
        return torch.ones(steps, made.outputs.shape[1])
    places = sorted({round(each) for each in torch.linspace(2, steps - 1, min(probes, steps - 2)).tolist()})
    logs = []
    for place in places:
        letters = "F" * place + "S" + "F" * (steps - place - 1)
        error = trials.error(Plan(letters).called_with(trials.task.steps))
        given = 2 * made.outputs[place - 1] - made.outputs[place - 2] - made.outputs[place]
        logs.append((error.clamp(min=1e-12) / given.square().mean(-1).clamp(min=1e-12)).log())
    table = []
    for step in range(steps):
        after = next((index for index, place in enumerate(places) if place >= step), len(places) - 1)
        before = max(0, after - 1)
        span = places[after] - places[before]
        share = min(max((step - places[before]) / span, 0.0), 1.0) if span else 0.0
        table.append(logs[before] * (1 - share) + logs[after] * share)
    return torch.stack(table).exp()
