"""Arguments of a module's call by their names, however the caller has passed them."""

import inspect
from typing import Any

from torch import Tensor, nn


def positions(kind: type[nn.Module]) -> dict[str, int]:
    """Where each argument of a class's ``forward`` stands, read off its signature.

    A subclass that hands on whatever it is given has that of the class below it.

    Example:
        >>> positions(nn.Linear)
        {'input': 0}
    """
    for each in kind.__mro__:
        if "forward" in vars(each):
            parameters = list(inspect.signature(vars(each)["forward"]).parameters.values())[1:]
            named = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
            if named:
                return {name: index for index, name in enumerate(named)}
    return {}


def argument(places: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a call, or ``None`` if it was not given.

    Args:
        places: Of the module's class, from :func:`positions`; read before, where calls are compiled.
        args, kwargs: As a forward pre-hook with keyword arguments is given them.
        name: As the signature has it.
    """
    if name in kwargs:
        return kwargs[name]
    place = places.get(name, len(args))
    return args[place] if place < len(args) else None


def first(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The first argument of a call, which the signature calls ``name``."""
    return args[0] if args else kwargs[name]


def with_first(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any) -> tuple[tuple[Any, ...], Any]:
    """The arguments of a call with another first one, which the signature calls ``name``."""
    return ((value, *args[1:]), kwargs) if args else (args, kwargs | {name: value})


def call_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, Any]:
    """Latents (of a transformer: hidden states), timestep and text of a denoiser's or ControlNet's call."""
    inner: nn.Module = getattr(model, "_orig_mod", model)  # a compiled model has a signature of its own
    places = positions(type(inner))
    latents = "sample" if "sample" in places else "hidden_states"
    sample, timestep, text = (
        argument(places, args, kwargs, name) for name in (latents, "timestep", "encoder_hidden_states")
    )
    return sample, timestep, text
