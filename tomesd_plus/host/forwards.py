"""A module's ``forward`` replaced by one of ours, and taken off again wherever a host has put it."""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

from torch import nn

Forward = TypeVar("Forward")


def forwards_on(module: nn.Module, kind: type[Forward]) -> list[Forward]:
    """The forwards of a class that a module carries, also inside others' that wrap them.

    accelerate keeps the forward that it has wrapped under a second name, diffusers' hook registry in a chain of
    references, and both tell of it in ``__wrapped__``.
    """
    return [found for names, name in _places(module) if isinstance(found := names[name], kind)]


def take_forwards_off(module: nn.Module, kind: type[Any], mine: Callable[[Any], bool] = lambda _: True) -> None:
    """Put in the place of each forward of a class what was there ``before`` it: a forward, or ``None``.

    Args:
        module: What may carry such forwards.
        kind: Their class.
        mine: Tells of a forward of the class whether it is meant; all are by default.
    """
    for names, name in list(_places(module)):
        forward = names[name]
        while isinstance(forward, kind) and mine(forward) and forward.before is not None:
            forward = forward.before
        if not (isinstance(forward, kind) and mine(forward)):
            names[name] = forward
        elif names is vars(module) and name == "forward":
            del names[name]  # the class's own shows again
        else:
            names[name] = MethodType(type(module).forward, module)


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Dictionaries and the names in them under which a host may hold a module's forward."""
    registry = getattr(module, "_diffusers_hook", None)
    holders = [module, *getattr(registry, "_fn_refs", ())]
    for holder in holders:
        for name in ("forward", "_old_forward", "original_forward"):
            names = vars(holder)
            while names.get(name) is not None:
                yield names, name
                names, name = getattr(names[name], "__dict__", {}), "__wrapped__"
