"""What runs at which step, chosen by measurement on the user's own model."""

from tomesd_plus.tuning.plans import Costs
from tomesd_plus.tuning.tune import tune

__all__ = ["Costs", "tune"]
