"""Which steps run in full, and which layers the others run."""

from dataclasses import dataclass
from typing import Any, Literal

from tomesd_plus.schedules import IntervalSchedule
from tomesd_plus.schedules.checks import is_whole

Branch = int | Literal["self_attention"]


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Which steps are full, and which layers the others run.

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
            of each such layer.
        full_steps: The full steps themselves, counted from 0 at the start of a generation, in place of ``interval``;
            none are listed by default.
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

    def __post_init__(self) -> None:
        if not isinstance(self.interval, IntervalSchedule) and not is_whole(self.interval, 1):
            raise ValueError(
                f"interval must be a whole number of at least 1, or an IntervalSchedule, not {self.interval!r}"
            )
        if self.branch != "self_attention" and not is_whole(self.branch, 0):
            raise ValueError(f"branch must be 'self_attention' or a whole number of at least 0, not {self.branch!r}")
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

    @property
    def follows_noise_level(self) -> bool:
        """True if which steps are full depends on the noise level."""
        return self.full_steps is None and isinstance(self.interval, IntervalSchedule)

    def interval_at(self, noise_level: float) -> int:
        """The interval at a noise level in [0, 1]."""
        return self.interval if isinstance(self.interval, int) else self.interval(noise_level)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
