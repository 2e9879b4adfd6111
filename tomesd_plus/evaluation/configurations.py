"""Configurations: the ways of running a pipeline that an evaluation compares, each one line of YAML."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import digest, plain
from tomesd_plus.evaluation.plain_data import load_yaml, read_text
from tomesd_plus.evaluation.switches import SWITCHES, Switch, prepare
from tomesd_plus.merging.report import TokenMergingReport

MAX_FOLDER = 150  # bytes; file systems allow 255
OTHER_SEED = 1_000_003  # offset of the noise floor's seeds


@dataclass(frozen=True)
class Configuration:
    """A way of running a pipeline, as plain data that can be stored with the images.

    Args:
        name: Shown in tables; also gives the folder's name.
        switches: The methods to switch on, in this order: a key of ``SWITCHES`` and its options.
        steps: Denoising steps, if different from the evaluation's.
        seed_offset: Added to every seed.

    Raises:
        EvaluationError: A method or an option is unknown or out of range.
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
        """The name in a form that suits a folder, and leads nowhere else; long ones end with a hash."""
        name = re.sub(r"[^\w.]+", "-", self.name).strip("-.").lower()
        if len(name.encode()) > MAX_FOLDER or name.endswith((".json", ".csv", ".md", ".png")):  # as our files' names
            name = f"{name.encode()[:MAX_FOLDER].decode(errors='ignore')}-{digest(self.name)[:8]}"
        return name

    @property
    def is_baseline(self) -> bool:
        """True for the unmodified pipeline with the evaluation's own seeds and steps."""
        return not self.switches and self.steps is None and not self.seed_offset

    @contextmanager
    def switched_on(self, pipe: Any) -> Iterator[TokenMergingReport | None]:
        """Apply the configuration to a pipeline inside a ``with`` block; yields token merging's report, if any."""
        with ExitStack() as stack:
            reports = [stack.enter_context(switch.on(pipe)) for switch in self._prepared().values()]
            yield next((report for report in reports if isinstance(report, TokenMergingReport)), None)

    @property
    def resolved(self) -> dict[str, Any]:
        """The methods with all options, defaults included, as JSON: it stays valid when defaults change."""
        return {kind: plain(switch.resolved) for kind, switch in self._prepared().items()}

    @property
    def depends_on_batch(self) -> bool:
        """True if an image depends on the other images in its batch."""
        return any(switch.depends_on_batch for switch in self._prepared().values())

    @property
    def depends_on_timing(self) -> bool:
        """True if images depend on measured times, so that they are not reproducible."""
        return any(switch.depends_on_timing for switch in self._prepared().values())

    def _prepared(self) -> dict[str, Switch]:
        return {kind: prepare(self.name, kind, options) for kind, options in self.switches.items()}


BASELINE = Configuration("baseline")
NOISE_FLOOR = Configuration("another seed (noise floor)", seed_offset=OTHER_SEED)


def parse_configuration(entry: str | Mapping[str, Any]) -> Configuration:
    """Parse a configuration from a YAML mapping, or from a command line's text: a YAML mapping without the braces.

    A single value stands for a method's main option: ``merge: 0.5`` is ``merge: {ratio: 0.5}``, and ``cache: 3`` is
    ``cache: {interval: 3}``. The name defaults to the text.

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
            values = load_yaml("{" + entry + "}")
        except ValueError as error:
            raise EvaluationError(f"cannot read the configuration {entry[:200]!r}: {error}") from error
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
        content = load_yaml(read_text(path))
    except (OSError, ValueError) as error:
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
