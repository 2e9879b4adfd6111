"""Schedulers by name: short ones, and diffusers' class names."""

from typing import Any, cast

from tomesd_plus.evaluation.errors import ModelError
from tomesd_plus.evaluation.names import KARRAS, SCHEDULERS


def scheduler_by_name(name: str, config: Any) -> Any:
    """A scheduler with the betas, prediction type and other settings of a model's own.

    Args:
        name: One of :data:`SCHEDULERS`, or the name of a class of diffusers; with ``-karras`` after it for Karras'
            noise levels.
        config: The configuration of the model's own scheduler.

    Raises:
        ModelError: There is no such scheduler, it has no Karras noise levels, or it does not suit the model.
    """
    import diffusers

    short = name.removesuffix(KARRAS)
    kind = getattr(diffusers, SCHEDULERS.get(short, short), None)
    known = f"choose from {', '.join(SCHEDULERS)}, or a class of diffusers, each also with {KARRAS}"
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ModelError(f"unknown scheduler {name!r}: {known}")
    options = {"use_karras_sigmas": True} if name.endswith(KARRAS) else {}
    try:
        made: Any = cast(Any, kind).from_config(config, **options)
    except Exception as error:  # the host's checks of a configuration that was made for another raise anything
        raise ModelError(f"the scheduler {name!r} does not suit this model: {' '.join(str(error).split())}") from error
    if options and not made.config.get("use_karras_sigmas"):
        raise ModelError(f"{kind.__name__} has no Karras noise levels: leave out {KARRAS}")
    return made
