"""What a feature cache did: which steps were full, and why."""

from tomesd_plus.caching.cache import FeatureCache
from tomesd_plus.caching.generation import CacheRecord, CacheStep
from tomesd_plus.caching.outputs import bytes_of


class FeatureCacheReport:
    """A live view of what a feature cache does; it always tells of the latest generation.

    Args:
        cache: The cache of the pipeline's UNet.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache

    @property
    def steps(self) -> list[CacheStep]:
        """The denoiser's calls, in order."""
        return list(self._record.steps)

    @property
    def full(self) -> int:
        """How many calls were full."""
        return sum(step.full for step in self.steps)

    @property
    def cached(self) -> int:
        """In how many some layers ran."""
        return sum(step.kind == "cached" for step in self.steps)

    @property
    def skipped(self) -> int:
        """In how many nothing ran."""
        return sum(step.skipped for step in self.steps)

    @property
    def skipped_layers(self) -> tuple[str, ...]:
        """Names of the layers that cached steps skip. A block stands for all that is in it."""
        return self._cache.skipped

    @property
    def kept_bytes(self) -> int:
        """Memory kept between steps: the boundary's outputs, twice for a forecast; the early feature if watched; the
        outputs of up to three calls, where others are skipped.
        """
        layers = sum(features.bytes(self._cache.boundary) for features in self._record.features.values())
        return layers + sum(bytes_of(each.value) for kept in self._record.outputs.values() for each in kept)

    @property
    def _record(self) -> CacheRecord:
        self._cache.settle()
        return self._cache.record.value or CacheRecord()

    def __str__(self) -> str:
        if not self.steps:
            return "Feature cache: the model has not run yet."
        lines = [f"{'step':>4} {'noise level':>11}  {'kind':<7} {'ahead':>5} {'change':>7}  full because"]
        for step in self.steps:
            index = "-" if step.index is None else step.index
            change = "" if step.change is None else f"{step.change:.1%}"
            ahead = f"{step.ahead:.2f}" if step.ahead else ""
            line = f"{index:>4} {step.noise_level:>11.3f}  {step.kind:<7} {ahead:>5} {change:>7}  {step.reason or ''}"
            lines.append(line.rstrip())
        layers = f"; cached ones skip {len(self.skipped_layers)} layers and blocks" if self.skipped_layers else ""
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        memory = f"{self.kept_bytes / 2**20:.1f} MiB kept"
        lines.append(f"{self.full} full and {self.cached} cached steps{skipped}{layers}; {memory}.")
        return "\n".join(lines)
