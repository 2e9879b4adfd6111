"""Meet a model at its first call, where nothing has told of the model before."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tomesd_plus.host.step import outside_graphs
from tomesd_plus.host.transient import ThreadLocal


class _Reading(ThreadLocal):
    """The model's call that a thread is at, until its first layers have run."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.timestep: Tensor | None = None


class FirstCalls:
    """Objects that wait for their model's first call: one hook on every module's call, for all of them.

    What is done then to a model may come too late for this call, in every thread that has begun one; and such a hook
    is not shown keyword arguments. So the call is read from the inside: every SD UNet and ControlNet hands its
    arguments on, by position, to the layers that it calls first: ``time_proj(timestep)``, ``conv_in(sample)``.

    Args:
        carries: True if a model carries objects that have not met it.
        meet: Let those that a model carries meet it; false if it carries none, met or not.
        begin: ``(model, sample, timestep)``: the call has begun.
    """

    def __init__(
        self,
        carries: Callable[[nn.Module], bool],
        meet: Callable[[nn.Module], bool],
        begin: Callable[[nn.Module, Tensor, Tensor | None], None],
    ) -> None:
        self.waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self.lock = threading.RLock()
        self._carries, self._meet, self._begin = carries, meet, begin
        self._reading = _Reading()
        self._readers = 0  # threads
        self._handle: Any = None

    def add(self, waiting: Any) -> None:
        """Wait for the model of an object, for as long as somebody holds it."""
        with self.lock:
            self.waiting.add(waiting)
            if self._handle is None:
                self._handle = register_module_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        model, compiling = self._reading.model, torch.compiler.is_compiling()
        if isinstance(module, ModelMixin):
            if not compiling or self._carries(module):
                self._start(module)
        elif model is not None:
            if module is getattr(model, "time_proj", None):
                self._reading.timestep = args[0]
            elif module is getattr(model, "conv_in", None):
                self._finish(model, args[0])
        elif not compiling and not self.waiting:
            self._read(None)  # those that waited are gone

    @outside_graphs
    def _start(self, model: nn.Module) -> None:
        with self.lock:
            found = self._meet(model)
        self._read(model if found else None)

    @outside_graphs
    def _finish(self, model: nn.Module, sample: Tensor) -> None:
        self._begin(model, sample, self._reading.timestep)
        self._read(None)

    def _read(self, model: nn.Module | None) -> None:
        with self.lock:
            self._readers += (model is not None) - (self._reading.model is not None)
            self._reading.model = model
            self._reading.timestep = None
            if self._handle is not None and not self.waiting and not self._readers:
                self._handle.remove()
                self._handle = None
