"""Token merging in transformers' vision towers."""

from tomesd_plus.vision.config import TowerConfig
from tomesd_plus.vision.report import LayerTokens, TowerReport

__all__ = ["LayerTokens", "TowerConfig", "TowerReport"]
