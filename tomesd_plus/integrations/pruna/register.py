"""Add the algorithms to Pruna."""

import gc
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST = "0.3.4"
"""Of Pruna: the oldest version with which this was tried."""


def register() -> None:
    """Add the algorithms to Pruna's registry and configurations; a second call does nothing.

    Configurations in memory that were made before, and copies of them, go on working, and know the algorithms from
    now on.

    Raises:
        ImportError: Pruna is not installed, or too old.
    """
    _refuse_missing_or_old()
    from pruna import AlgorithmRegistry, SmashConfig
    from pruna.config.hyperparameters import Boolean
    from pruna.config.smash_space import SMASH_SPACE
    from pruna.logging.logger import pruna_logger

    from tomesd_plus.integrations.pruna.base import NEEDED
    from tomesd_plus.integrations.pruna.cache import TomeCache
    from tomesd_plus.integrations.pruna.sd import TomeSD
    from tomesd_plus.integrations.pruna.vision import TomeVision

    if NEEDED in SMASH_SPACE:
        return
    configs = [each for each in gc.get_objects() if issubclass(type(each), SmashConfig)]
    earlier = [each for each in configs if isinstance(getattr(each, "config_space", None), type(SMASH_SPACE))]
    values = [dict(each._configuration) for each in earlier]  # by numbers, which stand elsewhere afterwards
    SMASH_SPACE.add(Boolean(NEEDED))
    pruna_logger.addFilter(lambda record: NEEDED not in str(record.msg))  # it calls the setting deprecated
    for kind in (TomeSD, TomeCache, TomeVision):
        AlgorithmRegistry.register_algorithm(kind())
    for kind in (TomeSD, TomeCache, TomeVision):
        _tell_partners(AlgorithmRegistry, AlgorithmRegistry[kind.algorithm_name])
    for smash_config, kept in zip(earlier, values, strict=True):
        smash_config.config_space = SMASH_SPACE  # a deep copy has a copy of it
        smash_config._configuration = SMASH_SPACE.get_default_configuration()
        for name in sorted(kept, key=SMASH_SPACE.get_all_algorithms().__contains__, reverse=True):
            smash_config._configuration[name] = kept[name]  # algorithms first: hyperparameters exist by them


def _tell_partners(registry: Any, algorithm: Any) -> None:
    """Declare compatibility on the partners' side too: Pruna asks both."""
    known = {each.algorithm_name: each for each in registry.get_all_algorithms()}
    for mine, theirs in (("compatible_before", "compatible_after"), ("compatible_after", "compatible_before")):
        for name in getattr(algorithm, mine):
            if name not in known:  # in another version of Pruna
                continue
            names = list(getattr(known[name], theirs))
            if algorithm.algorithm_name not in names:
                setattr(known[name], theirs, [*names, algorithm.algorithm_name])


def _refuse_missing_or_old() -> None:
    try:
        found = version("pruna")
    except PackageNotFoundError:
        raise ImportError(
            "tomesd_plus.integrations.pruna is a plug-in for Pruna, which is not installed: "
            f"pip install 'pruna>={OLDEST}'"
        ) from None
    if _numbers(found) < _numbers(OLDEST):
        raise ImportError(
            f"tomesd_plus.integrations.pruna needs Pruna {OLDEST} or later, and {found} is installed: "
            f"pip install -U 'pruna>={OLDEST}'"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The first two or three parts of a version: "0.3.4.post1" to (0, 3, 4)."""
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
