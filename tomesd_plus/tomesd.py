"""A drop-in for tomesd: the same names, arguments and defaults, and on a CPU the same bits as tomesd 0.1.3.

Replace ``import tomesd`` by ``from tomesd_plus import tomesd``. What tomesd does by patching the block class is done
here with the package's own processor and hooks, so other processors stay, and so does what else is on the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.host.models import unet_of
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.transient import ThreadLocal
from tomesd_plus.matching import MergeMode, MergePlan, make_cells
from tomesd_plus.matching.plan import WITH_KERNEL
from tomesd_plus.merging.answers import Reason, Why
from tomesd_plus.merging.apply import merge_with, remove_token_merging
from tomesd_plus.merging.attachment import Attachment, attachments_on
from tomesd_plus.merging.config import Layer, ToMeConfig
from tomesd_plus.merging.generation import Call
from tomesd_plus.merging.planner import levels_of
from tomesd_plus.schedules import ConstantSchedule

__all__ = ["apply_patch", "remove_patch"]


def apply_patch(
    model: Any,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
) -> Any:
    """Merge tokens exactly as tomesd does: constant ratio, matched anew in every block, plain attention.

    Random destinations come from a copy of PyTorch's global generator, made at the first merge, so a second image
    differs from the first even with the same seed; :func:`tomesd_plus.apply_token_merging` has none of that.

    Args:
        model: A diffusers pipeline with a UNet, or a UNet. A patch that is on it is replaced.
        ratio: Share of tokens to remove, at least 0. Cells of ``sx × sy`` allow at most 1 − 1/(sx·sy); more is cut
            silently.
        max_downsample: Merge where the latents are downsampled by at most this.
        sx: Width of the cells that hold one destination each, in tokens.
        sy: Their height.
        use_rand: Draw destinations at random; never done at odd batch sizes.
        merge_attn: Merge around self-attention.
        merge_crossattn: Merge around cross-attention, by the same plan.
        merge_mlp: Merge around the MLP, by the same plan.

    Returns:
        ``model``.

    Raises:
        ValueError: ``ratio`` is no number of at least 0.
    """
    unet_of(model)  # refuses what has none
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < math.inf:
        raise ValueError(f"ratio must be a finite number of at least 0, usually 0.5, not {ratio!r}")
    remove_patch(model)
    if not (merge_attn or merge_crossattn or merge_mlp):
        return model
    merged: dict[Layer, bool] = {"self_attention": merge_attn, "cross_attention": merge_crossattn, "mlp": merge_mlp}
    config = ToMeConfig(
        ratio=0.0,  # the plans below have tomesd's own rule
        cell_size=(sy, sx),
        destinations="random" if use_rand else "fixed",
        metric="block_input",
        layers=[layer for layer, chosen in merged.items() if chosen],
        proportional_attention=False,
    )
    merge_with(
        getattr(model, "unet", model),  # and no ControlNet
        lambda name, excluded: Attachment(
            config, NoiseLevels(needed=False), name, excluded, TomesdPlans(config, ratio, max_downsample), stays=True
        ),
        unknown=True,
    )
    return model


def remove_patch(model: Any) -> Any:
    """Undo :func:`apply_patch`; does nothing if there is no such patch. Returns ``model``."""
    unet = getattr(model, "unet", model)
    if any(isinstance(attachment.plans, TomesdPlans) for attachment in attachments_on(unet)):
        remove_token_merging(unet)
    return model


class _Draws(ThreadLocal):
    """Where a thread's random numbers come from, for as long as the patch is on."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None


class TomesdPlans:
    """Levels, ratio and random numbers as tomesd has them.

    Args:
        config: What to merge; its ratio says nothing.
        ratio, max_downsample: As in :func:`apply_patch`.
    """

    def __init__(self, config: ToMeConfig, ratio: float, max_downsample: int) -> None:
        self.config = config
        self.ratio = ratio
        self.max_downsample = max_downsample
        self._draws = _Draws()

    def attach(self, names: Mapping[nn.Module, str]) -> None:
        """Names say nothing here: each block makes a plan of its own."""

    def lay_out(self, call: Call, device: torch.device) -> None:
        """Tell levels apart, for the report, and say at which of them something is to be merged."""
        wanted = ConstantSchedule(min(self.ratio, self.config.max_ratio))
        call.levels = {
            tokens: replace(level, ratio=wanted if level.downsample <= self.max_downsample else None)
            for tokens, level in levels_of(call.step, self.config, {}, None, device).items()
        }

    def plan(self, call: Call, hidden_states: Tensor, layer: nn.Module) -> MergePlan | Reason:
        """The plan for a block's input (batch, tokens, channels), or why there is none."""
        alone = Reason(Why.tomesd)
        tokens, latents = hidden_states.shape[1], call.step
        downsample = math.ceil(math.sqrt(latents.height * latents.width // tokens))
        if downsample > self.max_downsample:
            return alone
        height, width = math.ceil(latents.height / downsample), math.ceil(latents.width / downsample)
        if self._draws.generator is None:
            self._draws.generator = _copy_of_global_generator(hidden_states.device)
        removed = int(tokens * min(self.ratio, 1.0))  # more are not there
        cell_height, cell_width = self.config.cell_size
        cells = (height // cell_height) * (width // cell_width)
        if removed <= 0 or cells in (0, tokens) or height * width != tokens:
            return alone
        random = self.config.destinations == "random" and hidden_states.shape[0] % 2 == 0
        destination = draw_destinations(
            height, width, self.config.cell_size, self._draws.generator if random else None, hidden_states.device
        )
        return bipartite_match(hidden_states.detach(), destination, removed)


def draw_destinations(
    height: int, width: int, cell_size: tuple[int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """The destinations' token indices, (destinations,), of the very numbers that tomesd draws."""
    return make_cells(height, width, cell_size, None, generator, device).destination[0]


@torch.no_grad()
def bipartite_match(metric: Tensor, destination: Tensor, removed: int) -> "TomesdPlan":
    """Match by the very calls of tomesd: the order that an unstable sort leaves decides the order of sums.

    Args:
        metric: (batch, tokens, channels).
        destination: Token indices, (destinations,); every other token is a source.
        removed: How many tokens to remove, at least 1; never more than there are sources.
    """
    batch, tokens, channels = metric.shape
    mask = torch.zeros(1, tokens, 1, dtype=torch.int64, device=metric.device)
    mask[:, destination] = -1
    order = mask.argsort(dim=1)[..., 0]  # destinations first
    destination = order[:, : len(destination)].expand(batch, -1)
    source = order[:, destination.shape[1] :].expand(batch, -1)

    norm = metric.norm(dim=-1, keepdim=True)
    metric = metric / norm.clamp_min(torch.finfo(norm.dtype).tiny)  # a token of zeros is similar to nothing
    a = metric.gather(1, source[..., None].expand(-1, -1, channels))
    b = metric.gather(1, destination[..., None].expand(-1, -1, channels))
    similarity, best = (a @ b.transpose(-1, -2)).max(dim=-1)  # (batch, sources)
    ranked = similarity.argsort(dim=-1, descending=True)

    removed = min(removed, source.shape[1])
    merged, unmerged = source.gather(1, ranked[:, :removed]), source.gather(1, ranked[:, removed:])
    return TomesdPlan.of(unmerged, destination, merged, best.gather(1, ranked[:, :removed]))


@dataclass(frozen=True, eq=False)
class TomesdPlan(MergePlan):
    """A plan whose merge adds up in tomesd's order.

    Args:
        merged: Token indices of the sources that are merged away, (batch, removed).
        target: For each of them its destination, as a place among the destinations, (batch, removed).
        destinations: How many there are; they stand last in the merged sequence.
    """

    merged: Tensor
    target: Tensor
    destinations: int

    @classmethod
    def of(cls, unmerged: Tensor, destination: Tensor, merged: Tensor, target: Tensor) -> "TomesdPlan":
        """Build a plan whose merged sequence is the sources that stay, then the destinations."""
        kept = torch.cat([unmerged, destination], dim=1)
        inverse = kept.new_empty(kept.shape[0], kept.shape[1] + merged.shape[1])
        inverse.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
        inverse.scatter_(1, merged, target + unmerged.shape[1])
        base = MergePlan.from_inverse(kept, inverse)
        shared = (base.sizes, base.members, base.starts, base.rows)
        return cls(kept, inverse, *shared, merged, target, destination.shape[1])

    def merge(self, hidden_states: Tensor, mode: MergeMode = "merge") -> Tensor:
        """As tomesd: ``scatter_reduce`` of the sources into the destinations."""
        if mode == "merge" and hidden_states.device.type not in WITH_KERNEL:  # nor for scatter_reduce, maybe
            return super().merge(hidden_states, mode)
        merged = super().merge(hidden_states, "prune")
        if mode == "merge":
            channels = hidden_states.shape[2]
            source = hidden_states.gather(1, self.merged[..., None].expand(-1, -1, channels))
            unmerged, destination = merged.tensor_split([merged.shape[1] - self.destinations], dim=1)
            index = self.target[..., None].expand_as(source)
            merged = torch.cat([unmerged, destination.scatter_reduce(1, index, source, reduce="mean")], dim=1)
        return merged


def _copy_of_global_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.Generator(device=device).set_state(torch.cuda.get_rng_state())
    return torch.Generator().set_state(torch.get_rng_state())
