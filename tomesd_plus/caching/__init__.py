"""A feature cache for Stable Diffusion UNets: on most steps only the outer layers run.

The idea is DeepCache's (Ma et al. 2023, https://arxiv.org/abs/2312.00858).
"""

from tomesd_plus.caching.apply import apply_feature_cache, feature_cache, remove_feature_cache
from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.report import FeatureCacheReport
from tomesd_plus.schedules import IntervalSchedule

__all__ = [
    "FeatureCacheConfig",
    "FeatureCacheReport",
    "IntervalSchedule",
    "apply_feature_cache",
    "feature_cache",
    "remove_feature_cache",
]
