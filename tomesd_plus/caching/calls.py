"""Whole calls of a model that are skipped, and of the ControlNets that feed it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tomesd_plus.caching.outputs import map_tensors
from tomesd_plus.host.arguments import argument, positions
from tomesd_plus.host.denoisers import Read
from tomesd_plus.host.forwards import forwards_on, take_forwards_off
from tomesd_plus.host.models import unwrapped
from tomesd_plus.host.reading import Reading
from tomesd_plus.host.step import Step, outside_graphs
from tomesd_plus.host.transient import ThreadLocal


class SkippableCall:
    """Stands in for the ``forward`` of a whole model; it copies and pickles with it.

    Args:
        ask: Gives what the call is to return in place of running, or ``None``.
        model: The model.
    """

    __slots__ = ("ask", "before", "model")  # hosts copy a forward's dictionary into their own

    def __init__(self, ask: Callable[[], Any], model: nn.Module) -> None:
        self.ask = ask
        self.model = model
        self.before = model.__dict__.get("forward")  # another's, such as accelerate's; None for the class's own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.ask()
        if given is not None:
            return given
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


def make_call_skippable(model: nn.Module, ask: Callable[[], Any]) -> bool:
    """Put a :class:`SkippableCall` on a model that has none of this asker's; true if it was there."""
    owner = getattr(ask, "__self__", None)
    if any(getattr(each.ask, "__self__", None) is owner for each in forwards_on(model, SkippableCall)):
        return True
    model.forward = SkippableCall(ask, model)
    return False


def wants_dict(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What a call's ``return_dict`` asks for."""
    given = argument(positions(type(unwrapped(model))), args, kwargs, "return_dict")
    return True if given is None else bool(given)


class _ControlNetCall(ThreadLocal):
    """Where a thread is."""

    def __init__(self) -> None:
        self.blank: Any = None  # what the call under way returns in place of running
        self.step: tuple[Step, bool] | None = None  # of the call under way, and if it returns a dictionary
        self.shapes: dict[int, tuple[Step, bool, Any]] = {}  # of its outputs, by the number of the call in its step


class ControlNetCalls:
    """Skips a ControlNet's calls whose outputs a skipped call of the denoiser would not look at.

    Its bound methods are the hooks on the ControlNet. What it returns then is memory that nobody wrote to.

    Args:
        read: Reads the ControlNet's calls.
        will_skip: ``(reading)``: the step, and whether the denoiser's call at it will be skipped.
        blank: Is told, before a call is skipped, of which step.
        works: False once nothing is to be skipped any more.
    """

    def __init__(
        self,
        read: Read,
        will_skip: Callable[[Reading], tuple[Step, bool]],
        blank: Callable[[Step], None],
        works: Callable[[], bool],
    ) -> None:
        self._read = read
        self._will_skip = will_skip
        self._blank = blank
        self._works = works
        self._current = _ControlNetCall()
        self._handles: list[Any] = []

    def attach(self, net: nn.Module) -> None:
        """Put hooks on a ControlNet."""
        make_call_skippable(net, self.ask)
        self._handles.append(net.register_forward_pre_hook(self.begin_call, with_kwargs=True))
        self._handles.append(net.register_forward_hook(self.end_call, always_call=True))

    def detach(self, net: nn.Module) -> None:
        """Take them off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        take_forwards_off(net, SkippableCall, lambda forward: getattr(forward.ask, "__self__", None) is self)
        self._current = _ControlNetCall()

    @outside_graphs
    def begin_call(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before the ControlNet: see whether the denoiser's call will be skipped."""
        current = self._current
        current.blank = current.step = None
        if kwargs is None or not self._works():
            return
        there = make_call_skippable(net, self.ask)  # offloading may have put the old forward back
        step, skip = self._will_skip(self._read(net, args, kwargs))
        current.step = step, wants_dict(net, args, kwargs)
        before, as_dict, shapes = current.shapes.get(step.call, (step, None, None))
        if skip and there and as_dict == current.step[1] and step.same_size(before):
            self._blank(step)
            current.blank = map_tensors(lambda like: like[0].new_empty(like[0].shape), shapes)

    @outside_graphs
    def end_call(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the ControlNet, also after one that raised an exception: keep the shapes of what it gave."""
        current = self._current
        if current.step is not None and current.blank is None and output is not None:
            step, as_dict = current.step
            current.shapes[step.call] = step, as_dict, map_tensors(lambda each: shape_of(each[0]), output)
        current.blank = current.step = None

    def ask(self) -> Any:
        """What the call under way returns in place of running; ``None``: it runs."""
        return self._current.blank


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and device that takes the memory of one number."""
    return tensor.new_zeros(()).expand(tensor.shape)
