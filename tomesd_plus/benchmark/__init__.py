"""Time and memory at the shapes of published UNets and towers, beside an ideal without overhead and other methods."""

from tomesd_plus.benchmark.ideal import fewer_tokens
from tomesd_plus.benchmark.measure import Measured, Protocol, Workload, measure
from tomesd_plus.benchmark.report import as_markdown, save_report, speedup_figure
from tomesd_plus.benchmark.rows import Row, load_rows, merge_efficiency
from tomesd_plus.benchmark.run import Outcome, run_suite
from tomesd_plus.benchmark.settings import NAMED, UNTOUCHED, Setting, settings_from, with_ideals
from tomesd_plus.benchmark.shapes import SHAPES, Shape, build_unet, make_inputs
from tomesd_plus.benchmark.suites import SUITES, Suite, Task, task
from tomesd_plus.benchmark.towers import TOWERS, TowerSetting, tower_settings

__all__ = [
    "NAMED",
    "SHAPES",
    "SUITES",
    "TOWERS",
    "UNTOUCHED",
    "Measured",
    "Outcome",
    "Protocol",
    "Row",
    "Setting",
    "Shape",
    "Suite",
    "Task",
    "TowerSetting",
    "Workload",
    "as_markdown",
    "build_unet",
    "fewer_tokens",
    "load_rows",
    "make_inputs",
    "measure",
    "merge_efficiency",
    "run_suite",
    "save_report",
    "settings_from",
    "speedup_figure",
    "task",
    "tower_settings",
    "with_ideals",
]
