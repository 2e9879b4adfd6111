"""Meet a model at its first call, where nothing has told of the model before."""

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tomesd_plus.host.step import outside_graphs, refuse_tracing
from tomesd_plus.host.transformers import KNOWN


@dataclass
class _Reading:
    """A model's call, until its first layers have run."""

    model: weakref.ref[nn.Module]
    timestep: Tensor | None = None


def _first_layers(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """What a UNet hands its timestep and its sample to; ``base_`` in one that a ControlNet-XS is part of."""
    for prefix in ("", "base_"):
        if hasattr(model, f"{prefix}time_proj") and hasattr(model, f"{prefix}conv_in"):
            return getattr(model, f"{prefix}time_proj"), getattr(model, f"{prefix}conv_in")
    return None


class FirstCalls:
    """Objects that wait for their model's first call: one hook on every module's call, for all of them.

    What is done then to a model may come too late for this call, in every thread that has begun one; and such a hook
    is not shown keyword arguments. So the call is read from the inside: every SD UNet and ControlNet hands its
    arguments on, by position, to the layers that it calls first: ``time_proj(timestep)``, ``conv_in(sample)``.

    A pipeline may put processors of its own in the place of such an object before the model is called. Where it holds
    the object to put it back, that waits on; where it was the last to hold it, the layer is remembered.

    Args:
        carries: True if a model carries objects that have not met it.
        meet: Let those that a model carries meet it; false if it carries none, met or not.
        begin: ``(model, sample, timestep)``: the call has begun.
        pass_by: ``(model, by_pipeline)``: a model is called that carries none. If one was taken off it, whether a
            pipeline did that; ``None`` if some wait, and whether this is their model is not known. Returns True if it
            had something to tell, which is done once while nothing changes.
        has_model: True of an object that need not wait.

    Raises:
        TypeError: At the call of a transformer that carries one: its calls cannot be read so.
    """

    def __init__(
        self,
        carries: Callable[[nn.Module], bool],
        meet: Callable[[nn.Module], bool],
        begin: Callable[[nn.Module, Tensor, Tensor | None], None],
        pass_by: Callable[[nn.Module, bool | None], bool],
        has_model: Callable[[Any], bool],
    ) -> None:
        self.waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._taken: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # by a pipeline?
        self._told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models at which pass_by had something to tell
        self.lock = threading.RLock()
        self._carries, self._meet, self._begin, self._pass_by = carries, meet, begin, pass_by
        self._has_model = has_model
        self._readings: weakref.WeakKeyDictionary[threading.Thread, _Reading] = weakref.WeakKeyDictionary()
        self._handle: Any = None
        self._fresh = False  # some have come since it was seen whether they have their model

    def add(self, waiting: Any) -> None:
        """Wait for the model of an object, for as long as somebody holds it."""
        with self.lock:
            self._told.clear()
            self.waiting.add(waiting)
            self._fresh = True
            self._come()

    def dropped(self, layer: nn.Module, by_pipeline: bool) -> None:
        """One that had not met its model was taken off a layer of it and is gone; see :func:`taken_off`."""
        with self.lock:
            self._taken[layer] = by_pipeline
            self._come()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling and self._fresh:
            self._let_go()
        if _first_layers(module) is not None:
            if not compiling or self._carries(module):
                self._start(module)
        elif isinstance(module, KNOWN):
            if self._carries(module):
                raise TypeError(
                    f"a processor that is set by itself merges in UNets: use apply_token_merging for this "
                    f"{type(module).__name__}"
                )
        elif self._readings or not (compiling or self.waiting or self._taken):
            self._go_on(module, args)

    def _let_go(self) -> None:
        """Those of a copied model have it already, which could not be told while it was being copied."""
        with self.lock:
            self._fresh = False
            for each in [each for each in self.waiting if self._has_model(each)]:
                self.waiting.discard(each)
            self._leave_if_done()

    @outside_graphs
    def _start(self, model: nn.Module) -> None:
        with self.lock:
            self._readings.pop(threading.current_thread(), None)
            taken = [self._taken.pop(layer) for layer in model.modules() if layer in self._taken]
            by_pipeline = any(taken) if taken else None
            if self._meet(model):
                refuse_tracing("Token merging")
                self._readings[threading.current_thread()] = _Reading(weakref.ref(model))
                self._come()  # again, if another thread's first call has ended since this one's hooks were listed
            elif (by_pipeline is not None or model not in self._told) and self._pass_by(model, by_pipeline):
                self._told.add(model)
            self._leave_if_done()

    @outside_graphs
    def _go_on(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        reading = self._readings.get(threading.current_thread())
        model = None if reading is None else reading.model()
        time_proj, conv_in = (None if model is None else _first_layers(model)) or (None, None)
        if reading is not None and module is time_proj:
            reading.timestep = args[0]
        elif reading is None or model is None or module is conv_in:
            if reading is not None and model is not None:
                # A video model has folded its frames into the batch by now, but not into its timesteps.
                batch = len(args[0]) if reading.timestep is None else len(reading.timestep)
                frames = len(args[0]) // batch
                sample = args[0] if frames == 1 else args[0].unflatten(0, (batch, frames)).transpose(1, 2)
                self._begin(model, sample, reading.timestep)
            with self.lock:
                self._readings.pop(threading.current_thread(), None)
                self._leave_if_done()

    def _come(self) -> None:
        if self._handle is None:
            self._handle = register_module_forward_pre_hook(self)

    def _leave_if_done(self) -> None:
        alive = any(thread.is_alive() and reading.model() is not None for thread, reading in self._readings.items())
        if self._handle is not None and not self.waiting and not self._taken and not alive:
            self._handle.remove()
            self._handle = None


def taken_off() -> tuple[nn.Module, bool] | None:
    """For a processor's ``__del__``: the layer that has just got another one, and if a pipeline of the host did that.

    The host tells nobody when it replaces a processor. But what nobody else holds is gone within
    ``layer.set_processor``, so the stack tells.

    Returns:
        ``None`` if the processor is gone for another reason.
    """
    frame: FrameType | None = sys._getframe(1)
    layer = None
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if layer is not None and not module.startswith("diffusers.models."):
            return layer, module.startswith("diffusers.pipelines.")
        if frame.f_code.co_name == "set_processor" and module.startswith("diffusers.models."):
            layer = frame.f_locals["self"]
        elif layer is None and frame.f_code.co_name not in ("__del__", "__setattr__"):
            return None
        frame = frame.f_back
    return None
