"""The outputs that layers keep from full steps, of one model."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from tomesd_plus.host.step import MOST_CALLS
from tomesd_plus.merging.answers import KeptOutputs
from tomesd_plus.merging.decider import KEPT


class Keeping:
    """The layers of a model that may keep an output, and where: a field on each, of which a thread has its own."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, KeptOutputs] = {}

    def begin(self, layers: Iterable[nn.Module]) -> None:
        """Let these layers keep outputs, and no others."""
        self._layers = {layer: KeptOutputs() for layer in layers}
        self.put_back()

    def put_back(self) -> None:
        """Put the fields on the layers again, if another's have taken their place."""
        for layer, kept in self._layers.items():
            setattr(layer, KEPT, kept)

    def end(self) -> None:
        """Take the fields off."""
        for layer, kept in self._layers.items():
            if getattr(layer, KEPT, None) is kept:  # else another attachment has come in the meantime
                delattr(layer, KEPT)
        self._layers = {}

    def drop(self, places: Iterable[int] = range(MOST_CALLS)) -> None:
        """Forget the outputs of some of a step's calls; of all by default."""
        for place in places:
            for kept in self._layers.values():
                kept.outputs[place] = None

    def empty(self) -> list[list[Tensor | None]]:
        """Nothing kept, for :meth:`swap`."""
        return [[None] * MOST_CALLS for _ in self._layers]

    def swap(self, outputs: Any) -> list[list[Tensor | None]]:
        """Put others in the place of this thread's outputs, and return those."""
        before = [kept.outputs for kept in self._layers.values()]
        for kept, own in zip(self._layers.values(), outputs, strict=True):
            kept.outputs = own
        return before

    @property
    def bytes(self) -> int:
        """Memory of this thread's outputs."""
        outputs = (output for kept in self._layers.values() for output in kept.outputs if output is not None)
        return sum(output.untyped_storage().nbytes() for output in outputs)
