"""What is to be done with a layer's tokens: one small value for each question."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from tomesd_plus.host.step import MOST_CALLS
from tomesd_plus.host.transient import ThreadLocal
from tomesd_plus.matching import MergeMode, MergePlan
from tomesd_plus.matching.detail import unmerge_with_detail


class Why(Enum):
    """Why a layer's tokens were left alone; the value is how it is said."""

    no_level = "{} tokens fit no level of {} × {} latents"
    level_off = "level {} is not merged by the configuration"
    no_cell = "no cell fits in {} × {} tokens"
    ratio_too_small = "the ratio is less than one of {} tokens"
    ratio_zero = "the ratio is 0 at this noise level"
    full_step = "the step is a full one"
    nothing_similar = "too few tokens are alike"
    does_not_pay = "{}"
    of_call = "{}"
    tomesd = "tomesd leaves it alone: the level is beyond max_downsample, or the ratio removes nothing"
    block_not_merged = "its block's attention was not merged"
    other_tokens = "its input is not the block's tokens"
    attention_cached = "a feature cache takes its self-attention's outputs again"
    attention_left_alone = "its self-attention is left alone"
    places = "it looks at places in the picture"
    mask = "it has an attention mask"
    not_tokens = "its input is not (batch, tokens, channels)"
    other_states = "it attends to other states than its own"
    normalizes = "it normalizes over the picture"
    residual = "it adds its input by itself"
    text_too = "it attends to text too"
    frames = "its tokens are frames"
    fused = "its projections are fused, so queries and keys cannot have tokens of their own"
    all_fused = "its projections are fused"
    unknown_processor = "it is not known what its processor, {}, does"
    backend = "it is not known whether its attention backend, {}, takes heads with an extra channel"
    parallel = "its tokens are spread over several devices"
    beside = "its block's MLP runs beside the attention: only both by one plan can be merged there"
    controlnet = "ControlNets of transformers are not merged"
    replaced = "its processor was replaced by {} after merging was applied"
    module_processor = "its processor is a module, which must stay registered on the layer"
    foreign_processor = (
        "its processor {} is not one of diffusers', and may depend on the tokens' number or order; "
        "if it does not, set permutation_equivariant = True on it"
    )
    pipelines_processor = "its processor {} is a pipeline's own, set for its calls, and may need every token"
    attention_maps = (
        "its processor {} keeps or changes attention maps, which are those of all tokens; "
        "if it does without, set permutation_equivariant = True on it"
    )
    other_batch = "its batch of {} is not the call's {}: its tokens may be tiles"
    own_arguments = "its processor takes arguments of its own ({})"


@dataclass(frozen=True)
class Reason:
    """Why a layer was left alone, as data; ``str`` puts it into words.

    Args:
        why: The kind.
        values: What the kind's words leave open.

    Example:
        >>> str(Reason(Why.level_off, (2,)))
        'level 2 is not merged by the configuration'
    """

    why: Why
    values: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.why.value.format(*self.values)


class KeptOutputs(ThreadLocal):
    """A layer's outputs of the last full step, one for each call of a step; of the generation of this thread."""

    def __init__(self) -> None:
        self.outputs: list[Tensor | None] = [None] * MOST_CALLS


@dataclass(frozen=True, eq=False)
class Leave:
    """Run on all tokens.

    Args:
        reason: Why; ``None`` where nothing was to be merged.
        keep_in: Where the output is to be kept, and which of them it is; ``None``: it is not to be kept.
    """

    reason: Reason | None = None
    keep_in: tuple[KeptOutputs, int] | None = None

    def done(self, output: Tensor) -> None:
        """Keep the output (batch, tokens, channels), if that is wanted."""
        if self.keep_in is not None:
            kept, place = self.keep_in
            kept.outputs[place] = output.detach()


@dataclass(frozen=True, eq=False)
class Merge:
    """Run on merged tokens.

    Args:
        plan: By which to merge and unmerge.
        mode: ``"merge"`` or ``"prune"``.
        kept: The layer's output of the last full step, (batch, tokens, channels), for its details.
    """

    plan: MergePlan
    mode: MergeMode = "merge"
    kept: Tensor | None = None

    def merge(self, hidden_states: Tensor) -> Tensor:
        """From (batch, N, channels) to (batch, M, channels)."""
        return self.plan.merge(hidden_states, self.mode)

    def unmerge(self, output: Tensor) -> Tensor:
        """From (batch, M, channels) back to (batch, N, channels)."""
        return unmerge_with_detail(self.plan, output, self.kept, self.mode)


@dataclass(frozen=True, eq=False)
class AlreadyMerged:
    """The tokens were merged where the block began: only weigh them.

    Args:
        plan: By which that was done.
    """

    plan: MergePlan


Answer = Leave | Merge | AlreadyMerged
