"""A plug-in for Pruna: importing it adds the algorithms ``tome_sd``, ``tome_cache`` and ``tome_vision``.

Example:
    >>> import tomesd_plus.integrations.pruna  # doctest: +SKIP
    >>> from pruna import SmashConfig, smash  # doctest: +SKIP
    >>> smashed = smash(pipe, SmashConfig({"tome_sd": {"reduction_ratio": 0.5}}))  # doctest: +SKIP
"""

from tomesd_plus.integrations.pruna.register import register

register()
