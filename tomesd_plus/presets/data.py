"""A preset as data: what to switch on, and what was measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tomesd_plus.caching import FeatureCacheConfig
from tomesd_plus.host.models import finest_level, unet_of
from tomesd_plus.host.transformers import transformer_of
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.presets.files import MOST_BYTES, decoded, encoded, read, written
from tomesd_plus.schedules.checks import is_number, is_whole

LONGEST = 2000
"""Characters of a text."""
LARGEST = 1e9
"""The largest number."""


@dataclass(frozen=True)
class Row:
    """What a plan came to.

    Args:
        name: What it is: a plan's letters, or so many steps.
        speedup: Of the denoising calls.
        psnr: Mean over the prompts that were chosen on, in dB to the untouched pictures; ``None`` if not measured.
        held_out_psnr: The same over the prompts that were kept aside.
    """

    name: str
    speedup: float
    psnr: float | None = None
    held_out_psnr: float | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Measured:
    """Where a preset was chosen, and what was measured there.

    Args:
        model: Class of the denoiser and its parameters, such as ``"UNet2DConditionModel, 5.6 M parameters"``.
        scheduler: The scheduler's class, with what else tells its kind, such as ``"DPMSolverMultistepScheduler,
            Karras"``.
        steps: Of the untouched pictures.
        guidance_scale: Of classifier-free guidance; ``None``: the pipeline's default.
        size: Of the latents, height × width.
        device: Its name, with the data type.
        versions: Of torch, diffusers and this package.
        prompts: How many it was chosen on.
        held_out: How many were kept aside.
        speedup: Of the denoising calls, by the costs.
        whole_speedup: Of a whole generation; ``None`` where costs were given and so no times measured.
        psnr: As in :class:`Row`.
        held_out_psnr: As in :class:`Row`.
        costs: Of a step of each kind, as shares of a full one.
        costs_measured: True if they were measured on this device, false if they were given.
        generations: How often the prompts' pictures were made to find it.
        beside: Fewer steps of the same scheduler, and the best even plans, at the same speed or the next slower.
    """

    model: str
    scheduler: str
    steps: int
    guidance_scale: float | None
    size: str
    device: str
    versions: str
    prompts: int
    held_out: int
    speedup: float
    whole_speedup: float | None
    psnr: float
    held_out_psnr: float | None
    costs: Mapping[str, float]
    costs_measured: bool
    generations: int
    beside: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "beside", tuple(self.beside))
        _check(self)
        if not isinstance(self.costs, Mapping) or not all(map(is_number, self.costs.values())):
            raise ValueError(f"costs must map kinds of steps to numbers, not {self.costs!r}")
        if not all(isinstance(row, Row) for row in self.beside):
            raise ValueError("beside must be rows")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


@dataclass(frozen=True)
class Preset:
    """Token merging and a feature cache that go together.

    Args:
        description: Which steps run in full, in a line.
        merging: What to merge where the outer layers have self-attention, as those of SD 1.x and 2.x have; ``None``:
            nothing.
        cache: What runs at which step; ``None``: everything.
        merging_inside: What to merge where the outer layers have none, as in SDXL: there is nothing to merge on cached
            steps. ``None``: as ``merging`` says.
        steps: With how many steps to call the pipeline; ``None``: any number. A plan with noise levels is carried over
            to other numbers; where ``steps`` are fewer than those it was measured beside, a warning tells.
        measured: Where it was chosen; ``None`` for those by name, whose figures are in ``results/``.

    Raises:
        ValueError: A value is of another type, or outside its range.

    Example:
        >>> from tomesd_plus import FeatureCacheConfig, Preset
        >>> Preset("every second step", None, FeatureCacheConfig(interval=2, forecast=1.0)).cache.interval
        2
    """

    description: str
    merging: ToMeConfig | None
    cache: FeatureCacheConfig | None
    merging_inside: ToMeConfig | None = field(default_factory=lambda: ToMeConfig(ratio=0.5, plan_per="block"))
    steps: int | None = None
    measured: Measured | None = None

    def __post_init__(self) -> None:
        _check(self)
        for name, kind in (("cache", FeatureCacheConfig), ("merging", ToMeConfig), ("merging_inside", ToMeConfig)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise ValueError(f"{name} must be a {kind.__name__} or None, not {getattr(self, name)!r}")
        if not isinstance(self.measured, (Measured, type(None))):
            raise ValueError(f"measured must be a Measured or None, not {self.measured!r}")
        if self.steps is not None and not is_whole(self.steps, 1):
            raise ValueError(f"steps must be a whole number of at least 1, not {self.steps!r}")

    def merging_for(self, pipe: Any) -> ToMeConfig | None:
        """The merging for a pipeline, UNet or transformer.

        Raises:
            TypeError: There is merging, and it has no model in which tokens can be merged.
        """
        if self.merging is None or self.merging_inside is None or transformer_of(pipe) is not None:
            return self.merging
        finest = finest_level(unet_of(pipe))
        return self.merging if finest == 1 else replace(self.merging_inside, max_downsample=finest)

    def to_json(self) -> str:
        """The content of its file."""
        return written(encoded(self))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "what was given as a preset") -> "Preset":
        """Read what :meth:`to_json` has written, or a stranger's text, of which every value is checked.

        Args:
            text: JSON, at most a megabyte.
            where: What an error's message begins with.

        Raises:
            ValueError: It is no preset; the message says what is wrong.
        """
        kinds = (Preset, Measured, Row)
        found = decoded(read(text, where), {kind.__name__: kind for kind in kinds}, where)
        if not isinstance(found, Preset):
            raise ValueError(f"{where} holds no preset but a {type(found).__name__}")
        return found

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Preset":
        """Read a file that :meth:`save` has written, or a stranger's, as :meth:`from_json` does.

        Raises:
            ValueError: It is no preset; the message says what is wrong.
            OSError: It cannot be read.
        """
        with Path(path).open("rb") as file:
            return cls.from_json(file.read(MOST_BYTES + 1), str(path))


def _check(data: Any) -> None:
    """Check a dataclass's fields that are texts, numbers or truth values against what they are declared as."""
    wanted = {
        "str": f"a text of one line and {LONGEST:,} characters at most",
        "int": f"a whole number of 0 to {LARGEST:.0e}",
        "float": f"a number of 0 to {LARGEST:.0e}",
        "bool": "true or false",
    }
    for each in fields(data):
        value, declared = getattr(data, each.name), str(getattr(each.type, "__name__", each.type))
        kind = declared.split(" | ")[0]
        if kind not in wanted or (value is None and "None" in declared):
            continue
        right = {
            "str": isinstance(value, str) and len(value) <= LONGEST and value.isprintable(),
            "int": is_whole(value, 0) and value <= LARGEST,
            "float": is_number(value) and 0 <= value <= LARGEST,
            "bool": isinstance(value, bool),
        }[kind]
        if not right:
            raise ValueError(f"{each.name} must be {wanted[kind]}, not {str(value)[:100]!r}")
