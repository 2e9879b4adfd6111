"""Which transformers merging in towers works with."""

import transformers

OLDEST = "5.18"  # before, layers were made otherwise, or did not pass on what merging gives them


def is_too_old() -> bool:
    """True if the transformers that is installed is older than that."""
    return _numbers(transformers.__version__) < _numbers(OLDEST)


def refuse_too_old() -> None:
    """Raise RuntimeError if it is."""
    if is_too_old():
        raise RuntimeError(
            f"token merging in vision towers needs transformers {OLDEST} or later, "
            f"but {transformers.__version__} is installed: pip install -U transformers"
        )


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
