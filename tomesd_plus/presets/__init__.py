"""Presets: token merging and a feature cache that go together, by name, from a file, or as ``tune`` has found them."""

from tomesd_plus.presets.apply import PresetReport, apply_preset, preset, preset_from, remove_preset
from tomesd_plus.presets.data import Measured, Preset, Row
from tomesd_plus.presets.named import PRESETS, preset_by_name

__all__ = [
    "PRESETS",
    "Measured",
    "Preset",
    "PresetReport",
    "Row",
    "apply_preset",
    "preset",
    "preset_by_name",
    "preset_from",
    "remove_preset",
]
