"""Detail-keeping unmerge: what told a token from its group at the last whole step, it keeps.

On a *whole* step the merged layers run on all tokens and leave their output ``kept``. On the steps between,

    output = unmerge(o) + (kept − unmerge(merge(kept)))

where o is the layer's output on merged tokens. A token gets its group's new value plus what it differed from its group
by the last time that was known. Merging is linear, so this is ``kept + unmerge(o − merge(kept))``: one merge and one
unmerge, and a step on which nothing has changed since gives the whole step's output exactly, up to rounding.

What is kept also serves attention reuse, which takes ``kept`` for the output.
"""

from typing import Any

from torch import Tensor, nn

from tomesd_plus.config import Full
from tomesd_plus.plan import MergeMode, MergePlan
from tomesd_plus.step import Step


class DetailKeeper:
    """Decides which steps are whole, and keeps what they leave.

    Args:
        every: A whole step every so many steps, at least 1, a generation's first among them; ``"full"``: a feature
            cache's full steps; ``None``: none at all. Calls at one noise level count as one step and are of one kind.
        mode: As the layers are merged.
    """

    whole: bool  # the step under way
    outputs: dict[tuple[nn.Module, int], Tensor]  # of the latest whole step, by layer and number of the call in it

    def __init__(self, every: int | Full | None, mode: MergeMode) -> None:
        self.every = every
        self.mode = mode
        self.reset()

    def begin_step(self, step: Step, before: Step | None, cached: bool | None = None) -> None:
        """Decide what kind of step it is, and drop outputs that do not fit it.

        Args:
            step: The step.
            before: The one before.
            cached: Whether it is a feature cache's cached step; ``None`` if there is no such cache.
        """
        if self.every is None:
            return
        if step.new_generation or before is None or not step.same_size(before):
            self.outputs = {}
            self._first = step.number
        self._call = step.call
        self.whole = cached is False if self.every == "full" else (step.number - self._first) % self.every == 0

    def keep(self, layer: nn.Module, output: Tensor) -> None:
        """Keep a layer's output (batch, tokens, channels) of a whole step."""
        self.outputs[layer, self._call] = output.detach()

    def kept(self, layer: nn.Module, states: Tensor) -> Tensor | None:
        """A layer's output of the last whole step, if it is of the size of its input now; ``None`` on whole steps."""
        output = None if self.whole else self.outputs.get((layer, self._call))
        return output if output is not None and output.shape == states.shape else None

    def unmerge(self, layer: nn.Module, plan: MergePlan, output: Tensor) -> Tensor:
        """Bring a layer's output (batch, merged tokens, channels) back to all tokens, with their details."""
        if self.every is None:
            return plan.unmerge(output)
        kept = self.outputs.get((layer, self._call))
        if kept is None or not plan.fits(kept):
            return plan.unmerge(output)  # the layer was skipped at the whole step
        return kept + plan.unmerge(output - plan.merge(kept, self.mode))

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept."""
        return sum(output.untyped_storage().nbytes() for output in self.outputs.values())

    def reset(self) -> None:
        """Forget everything."""
        self.whole = False
        self.outputs = {}
        self._first = self._call = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "whole": False, "outputs": {}}
