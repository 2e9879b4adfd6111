"""Which steps run in full, and what the others run: a few layers, or nothing."""

from dataclasses import dataclass
from typing import Any, Literal

from tomesd_plus.schedules import IntervalSchedule, StepPlan
from tomesd_plus.schedules.checks import is_whole

Branch = int | Literal["self_attention", "nothing"]


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Which steps are full, and what the others run.

    A generation's first step is always full, and so is one whose batch or size the kept features do not fit.

    Args:
        interval: 3 by default. A step is full once it is this many steps after the last full one, at least 1. Larger
            is faster and less close; with 1 every step is full, and the pictures are the untouched ones. An
            :class:`IntervalSchedule` makes full steps denser at chosen noise levels. Steps at one noise level count
            once (Heun and PNDM have such).
        branch: How many layers run on cached steps, as DeepCache counts: ``3 · block + layer``, from the outside. With
            0 (default) the last layer of the last up block runs alone: fastest. Each more is slower and closer.
            ``"self_attention"``: all run but self-attention at the finest level that has it, the costliest one, whose
            outputs are taken again (pyramid attention broadcast, https://arxiv.org/abs/2408.12588). Keeps one output
            of each such layer. ``"nothing"``: the whole call is skipped, and so are those of ControlNets that feed it;
            its output is a forecast from the last ones that ran. Fastest, of any denoiser, transformers too.
        full_steps: The full steps themselves, counted from 0 at the start of a generation, in place of ``interval``;
            none are listed by default.
        plan: A letter a step, in place of ``interval``: F in full, C as ``branch`` says, S skipped. Text such as
            ``"FSCS"``, or a :class:`StepPlan`, whose noise levels carry it over to other numbers of steps.
        order: How skipped calls are forecast: 1 (default) along a straight line through the last two outputs of calls
            that ran (the predictor of ZEUS, 2026), 2 along a parabola through the last three, in the number of the
            step; ``None``: a parabola where all of these lie at most two steps apart, else a line. Every second call
            of 20 skipped, but for the last: the line has 44.4 dB with DPM++ 2M and the parabola 40.7, with Euler 47.8
            and 48.3.
        threshold: Off by default. Makes it adaptive: a step is full once the output of ``conv_in``, the cheapest early
            feature, has changed by more than this share since the last full step (mean absolute change over mean
            absolute value, larger than 0), and at the latest after ``interval``. A larger one makes fewer steps full:
            faster and less close. The report tells each step's change. It reads one number back from the device at
            each step.
        forecast: How far cached steps follow the trend of the last two full steps, in [0, 1]; 0 by default, as
            DeepCache. More costs next to nothing, and is closer up to where the trend overshoots: 1 at an interval of
            2, about 0.85 beyond. At step n cached steps take ``f₁ + forecast · min(1, (n − n₁) / (n₁ − n₀)) · (f₁ −
            f₀)``, where ``f₁`` and ``f₀`` are what the full steps ``n₁`` and ``n₀`` left. Until a generation has had
            two full steps of one batch and size there is no trend, and they take ``f₁``. Keeps two feature maps
            instead of one. After TaylorSeer (https://arxiv.org/abs/2503.06923), which forecasts transformers' layers.

    Raises:
        ValueError: A value is outside its range. The message names it and says what is allowed.
    """

    interval: int | IntervalSchedule = 3
    branch: Branch = 0
    full_steps: tuple[int, ...] | None = None
    threshold: float | None = None
    forecast: float = 0.0
    plan: StepPlan | None = None
    order: int | None = 1

    def __post_init__(self) -> None:
        if not isinstance(self.interval, IntervalSchedule) and not is_whole(self.interval, 1):
            raise ValueError(
                f"interval must be a whole number of at least 1, or an IntervalSchedule, not {self.interval!r}"
            )
        if self.branch not in ("self_attention", "nothing") and not is_whole(self.branch, 0):
            raise ValueError(
                f"branch must be 'self_attention', 'nothing' or a whole number of at least 0, not {self.branch!r}"
            )
        if self.full_steps is not None:
            object.__setattr__(self, "full_steps", tuple(self.full_steps))
            if not all(is_whole(step, 0) for step in self.full_steps):
                raise ValueError(f"full_steps must be whole numbers of at least 0, not {self.full_steps!r}")
            if self.threshold is not None:
                raise ValueError("give either full_steps or threshold, not both: each chooses the full steps")
        if self.threshold is not None and not (_number(self.threshold) and self.threshold > 0):
            raise ValueError(f"threshold must be a number larger than 0, not {self.threshold!r}")
        if not (_number(self.forecast) and 0 <= self.forecast <= 1):
            raise ValueError(f"forecast must be a number in [0, 1], not {self.forecast!r}")
        if self.order is not None and (not is_whole(self.order, 1) or self.order > 2):
            raise ValueError(f"order must be 1, 2 or None, not {self.order!r}")
        if self.plan is not None:
            self._check_plan(self.plan if isinstance(self.plan, StepPlan) else StepPlan(self.plan))
        elif self.branch == "nothing" and self.threshold is not None:
            raise ValueError("threshold watches a layer of the call, so it cannot be used with branch='nothing'")

    def _check_plan(self, plan: StepPlan) -> None:
        object.__setattr__(self, "plan", plan)
        others = [name for name in ("full_steps", "threshold") if getattr(self, name) is not None]
        others += ["interval"] if self.interval != 3 else []
        if others:
            raise ValueError(f"give either plan or {' and '.join(others)}, not both: each chooses the full steps")
        if self.branch == "nothing" and "C" in plan.letters:
            raise ValueError("plan has cached steps (C), of which branch='nothing' says that they run nothing: use S")

    @property
    def skips_calls(self) -> bool:
        """True if whole calls may be skipped."""
        return self.branch == "nothing" or (self.plan is not None and "S" in self.plan.letters)

    @property
    def skips_layers(self) -> bool:
        """True if cached steps may come, which run some layers."""
        return self.branch != "nothing" and (self.plan is None or "C" in self.plan.letters)

    @property
    def follows_noise_level(self) -> bool:
        """True if what a step runs depends on the noise level."""
        if self.plan is not None:
            return self.plan.noise_levels is not None
        return self.full_steps is None and isinstance(self.interval, IntervalSchedule)

    def interval_at(self, noise_level: float) -> int:
        """The interval at a noise level in [0, 1]."""
        return self.interval if isinstance(self.interval, int) else self.interval(noise_level)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
