"""Token merging in transformers' vision towers."""

from tomesd_plus.vision.apply import merge_towers, towers_report, unmerge_towers
from tomesd_plus.vision.config import TowerConfig
from tomesd_plus.vision.report import LayerTokens, TowerReport

__all__ = ["LayerTokens", "TowerConfig", "TowerReport", "merge_towers", "towers_report", "unmerge_towers"]
