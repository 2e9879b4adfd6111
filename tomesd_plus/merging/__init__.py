"""Token merging in diffusers' UNets and ControlNets."""

from tomesd_plus.merging.apply import apply_token_merging, remove_token_merging
from tomesd_plus.merging.config import FullSteps, ToMeConfig
from tomesd_plus.merging.processor import ToMeProcessor
from tomesd_plus.merging.report import TokenMergingReport

__all__ = [
    "FullSteps",
    "ToMeConfig",
    "ToMeProcessor",
    "TokenMergingReport",
    "apply_token_merging",
    "remove_token_merging",
]
