"""What a feature cache did: which steps were full, and why."""

from tomesd_plus.caching.cache import FeatureCache
from tomesd_plus.caching.generation import CacheRecord, CacheStep


class FeatureCacheReport:
    """A live view of what a feature cache does; it always tells of the latest generation.

    Args:
        cache: The cache of the pipeline's UNet.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache

    @property
    def steps(self) -> list[CacheStep]:
        """The UNet's calls, in order."""
        return list(self._record.steps)

    @property
    def full(self) -> int:
        """How many calls were full."""
        return sum(step.full for step in self.steps)

    @property
    def cached(self) -> int:
        """How many were not."""
        return len(self.steps) - self.full

    @property
    def skipped_layers(self) -> tuple[str, ...]:
        """Names of the layers that cached steps skip. A block stands for all that is in it."""
        return self._cache.skipped

    @property
    def kept_bytes(self) -> int:
        """Memory kept between steps: the boundary's outputs, twice for a forecast; the early feature if watched."""
        return sum(features.bytes(self._cache.boundary) for features in self._record.features.values())

    @property
    def _record(self) -> CacheRecord:
        return self._cache.record.value or CacheRecord()

    def __str__(self) -> str:
        if not self.steps:
            return "Feature cache: the model has not run yet."
        lines = [f"{'step':>4} {'noise level':>11}  {'kind':<6} {'ahead':>5} {'change':>7}  full because"]
        for step in self.steps:
            index = "-" if step.index is None else step.index
            kind = "full" if step.full else "cached"
            change = "" if step.change is None else f"{step.change:.1%}"
            ahead = f"{step.ahead:.2f}" if step.ahead else ""
            line = f"{index:>4} {step.noise_level:>11.3f}  {kind:<6} {ahead:>5} {change:>7}  {step.reason or ''}"
            lines.append(line.rstrip())
        lines.append(
            f"{self.full} full and {self.cached} cached steps; cached ones skip {len(self.skipped_layers)} layers "
            f"and blocks; {self.kept_bytes / 2**20:.1f} MiB kept."
        )
        return "\n".join(lines)
