"""Detail-keeping unmerge: what told a token from its group at the last whole step, it keeps.

On a *whole* step the layers that merge on others run on all tokens and leave their output ``kept``. On those between,

    output = unmerge(o) + (kept − unmerge(merge(kept)))

where o is the layer's output on merged tokens. A token gets its group's new value plus what it differed from its group
by the last time that was known. Merging is linear, so this is ``kept + unmerge(o − merge(kept))``: one merge and one
unmerge, and a step on which nothing has changed since gives the whole step's output exactly, up to rounding.

What is kept also serves attention reuse, which takes ``kept`` for the output.
"""

from torch import Tensor, nn

from tomesd_plus.host.step import MOST_CALLS, Step
from tomesd_plus.matching import MergeMode, MergePlan
from tomesd_plus.merging.config import Full

WHOLE_STEP = "the step is a whole one"  # why a layer was left alone


class DetailKeeper:
    """Decides which steps are whole, and keeps what they leave.

    Args:
        every: A whole step every so many steps, at least 1, a generation's first among them; ``"full"``: a feature
            cache's full steps; ``None``: none at all. Calls at one noise level count as one step and are of one kind.
        mode: As the layers are merged.
    """

    whole: bool  # the step under way
    # Of the model. What is kept of a layer is its own attribute, so that compiled layers share graphs.
    _layers: list[nn.Module]
    _steps: dict[int, Step]  # the latest of each call of a step
    _first: dict[int, int]  # the number of the step at which each call's cadence began
    _too_many: bool  # of the generation's calls are at one step: they can no longer be told apart, so nothing is kept

    def __init__(self, every: int | Full | None, mode: MergeMode) -> None:
        self.every = every
        self.mode = mode
        self._layers = []
        self.reset()

    def attach(self, model: nn.Module) -> None:
        """Serve the layers of a model."""
        self._layers = list(model.modules())

    def begin_step(self, step: Step, cached: bool | None = None) -> None:
        """Decide what kind of step it is, and drop outputs that do not fit it.

        Args:
            step: The step.
            cached: Whether it is a feature cache's cached step; ``None`` if there is no such cache.
        """
        if self.every is None:
            return
        if step.new_generation:
            self.reset()
        if step.call >= MOST_CALLS and not self._too_many:
            self._too_many = True
            self._drop(_KEPT)
        call = 0 if self._too_many else step.call
        before = self._steps.get(call)  # guidance branches may come as calls of their own, of unlike batch
        if before is None or not (self._too_many or step.same_size(before)):
            self._drop(_place(call))
            self._first[call] = step.number
        self._steps[call] = step
        self._place = _place(call)
        self.whole = cached is False if self.every == "full" else (step.number - self._first[call]) % self.every == 0

    def keep(self, layer: nn.Module, output: Tensor) -> None:
        """Keep a layer's output (batch, tokens, channels) of a whole step."""
        if not self._too_many:
            setattr(layer, self._place, output.detach())

    def kept(self, layer: nn.Module, states: Tensor) -> Tensor | None:
        """A layer's output of the last whole step, if it is of the size of its input now; ``None`` on whole steps."""
        output: Tensor | None = None if self.whole else getattr(layer, self._place, None)
        return output if output is not None and output.shape == states.shape else None

    def unmerge(self, layer: nn.Module, plan: MergePlan, output: Tensor) -> Tensor:
        """Bring a layer's output (batch, merged tokens, channels) back to all tokens, with their details."""
        if self.every is None or self.whole:  # a layer that runs on whole steps only may be merged there
            return plan.unmerge(output)
        kept: Tensor | None = getattr(layer, self._place, None)
        if kept is None or not plan.fits(kept):
            return plan.unmerge(output)  # the layer was skipped at the whole step
        return kept + plan.unmerge(output - plan.merge(kept, self.mode))

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept."""
        tensors = [value for layer in self._layers for name, value in vars(layer).items() if name.startswith(_KEPT)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def reset(self) -> None:
        """Forget everything."""
        self._drop(_KEPT)
        self.whole = False
        self._steps = {}
        self._first = {}
        self._too_many = False
        self._place = _place(0)

    def _drop(self, prefix: str) -> None:
        for layer in self._layers:
            for name in [name for name in vars(layer) if name.startswith(prefix)]:
                delattr(layer, name)


_KEPT = "_tomesd_plus_kept_"


def _place(call: int) -> str:
    """The attribute of a layer that holds its output in the so-manieth call of a step."""
    return f"{_KEPT}{call}"
