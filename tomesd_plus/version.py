"""The package's version, in a place that needs nothing else."""

__version__ = "0.1.0"
