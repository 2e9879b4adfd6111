"""Configurations: the ways to run a pipeline that an evaluation compares, each in a line of YAML."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import plain
from tomesd_plus.evaluation.switches import SWITCHES, Switch, prepare
from tomesd_plus.merging.report import TokenMergingReport

OTHER_SEED = 1_000_003  # added to a seed to make "another seed"


@dataclass(frozen=True)
class Configuration:
    """A way to run a pipeline; as data, so that a folder of images can say how it was made.

    Args:
        name: Shown in tables; names the folder.
        switches: What is switched on, in this order: a name among ``SWITCHES``, and its options.
        steps: Denoising steps, if other than the evaluation's.
        seed_offset: Added to every seed.

    Raises:
        EvaluationError: A switch or an option is unknown or out of range.
    """

    name: str
    switches: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int | None = None
    seed_offset: int = 0

    def __post_init__(self) -> None:
        if not self.folder:
            raise EvaluationError(f"a configuration's name needs a letter or a digit: {self.name!r}")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise EvaluationError(f"{self.name}: steps must be a whole number of at least 1, not {self.steps!r}")
        self._prepared()

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.]+", "-", self.name).strip("-.").lower()

    @property
    def is_baseline(self) -> bool:
        """True for the untouched pipeline on the evaluation's own seeds and steps."""
        return not self.switches and self.steps is None and not self.seed_offset

    @contextmanager
    def switched_on(self, pipe: Any) -> Iterator[TokenMergingReport | None]:
        """Hold the configuration on a pipeline inside a ``with`` block; yields the merging's report, if it merges."""
        with ExitStack() as stack:
            reports = [stack.enter_context(switch.on(pipe)) for switch in self._prepared().values()]
            yield next((report for report in reports if isinstance(report, TokenMergingReport)), None)

    @property
    def resolved(self) -> dict[str, Any]:
        """The switches as JSON, with all their options: what the images depend on, whatever the defaults become."""
        return {kind: plain(switch.resolved) for kind, switch in self._prepared().items()}

    @property
    def by_batch(self) -> bool:
        """True if an image depends on what else is in its batch."""
        return any(switch.by_batch for switch in self._prepared().values())

    @property
    def by_time(self) -> bool:
        """True if measured times decide about the images, so that they cannot be had twice."""
        return any(switch.by_time for switch in self._prepared().values())

    def _prepared(self) -> dict[str, Switch]:
        return {kind: prepare(self.name, kind, options) for kind, options in self.switches.items()}


BASELINE = Configuration("baseline")
NOISE_FLOOR = Configuration("another seed (noise floor)", seed_offset=OTHER_SEED)


def parse_configuration(entry: str | Mapping[str, Any]) -> Configuration:
    """Read a configuration from what YAML gives, or from a command line's text, which is YAML without the braces.

    A switch may have a bare value instead of options: ``merge: 0.5`` is ``merge: {ratio: 0.5}``, ``cache: 3`` is
    ``cache: {interval: 3}``. Without a ``name`` the text is the name.

    Example:
        >>> parse_configuration("merge: 0.5, cache: 3").switches
        {'merge': {'ratio': 0.5}, 'cache': {'interval': 3}}
        >>> parse_configuration({"name": "clean", "merge": {"ratio": 0.5, "more_at": "clean"}}).folder
        'clean'
    """
    if isinstance(entry, str):
        if entry.strip() == BASELINE.name:
            return BASELINE
        try:
            values = yaml.safe_load("{" + entry + "}")
        except yaml.YAMLError as error:
            raise EvaluationError(
                f"cannot read the configuration {entry!r}: {' '.join(str(error).split())}"
            ) from error
    else:
        values = entry
    if not isinstance(values, Mapping) or not values:
        raise EvaluationError(f"a configuration is a mapping such as 'merge: 0.5, cache: 3', not {entry!r}")
    values = dict(values)
    default = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()[1:-1]
    name, steps = str(values.pop("name", default)), values.pop("steps", None)
    switches = {str(kind): _options(kind, value) for kind, value in values.items()}
    return Configuration(name, switches, steps)


def load_configurations(path: Path) -> list[Configuration]:
    """Read a YAML file: a list of configurations, or a mapping with the list under ``configurations``."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvaluationError(f"cannot read configurations from {path}: {' '.join(str(error).split())}") from error
    if isinstance(content, Mapping):
        content = content.get("configurations")
    if not isinstance(content, list) or not content:
        raise EvaluationError(f"{path} must hold a list of configurations, or one under 'configurations'")
    return [parse_configuration(entry) for entry in content]


def complete(configurations: Sequence[Configuration], noise_floor: bool = True) -> list[Configuration]:
    """The baseline, the configurations, and the noise floor; an EvaluationError if two would share a folder."""
    others = [configuration for configuration in configurations if not configuration.is_baseline]
    chosen = [BASELINE, *others, *([NOISE_FLOOR] if noise_floor else [])]
    names: dict[str, str] = {}
    for configuration in chosen:
        if configuration.folder in names:
            raise EvaluationError(
                f"configurations {names[configuration.folder]!r} and {configuration.name!r} would share a folder: "
                "give one another name"
            )
        names[configuration.folder] = configuration.name
    return chosen


def equal_time(steps: int) -> Configuration:
    """The baseline with fewer steps."""
    return Configuration(f"baseline, {steps} step{'s' if steps > 1 else ''} (equal time)", steps=steps)


def _options(kind: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(key): option for key, option in value.items()}
    if value is None:
        return {}
    return {SWITCHES[kind][1]: value} if kind in SWITCHES else {}
