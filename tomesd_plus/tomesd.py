"""A drop-in for tomesd: the same names, arguments and defaults, and on a CPU the same bits as tomesd 0.1.3.

Replace ``import tomesd`` by ``from tomesd_plus import tomesd``. What tomesd does by patching the block class is done
here with the package's own processor and hooks, so other processors stay, and so does what else is on the model.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tomesd_plus.config import LEVELS, ToMeConfig
from tomesd_plus.matching import destination_mask, max_removed
from tomesd_plus.merger import TokenMerger, mergers_on
from tomesd_plus.pipeline import merge_with, remove_token_merging
from tomesd_plus.plan import MergePlan

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
        ratio: Share of tokens to remove. Cells of ``sx × sy`` allow at most 1 − 1/(sx·sy); more is cut silently.
        max_downsample: Merge where the latents are downsampled by at most this.
        sx, sy: Width and height of the cells that hold one destination each.
        use_rand: Draw destinations at random; never done at odd batch sizes.
        merge_attn, merge_crossattn, merge_mlp: Around which layers of a block to merge.

    Returns:
        ``model``.
    """
    remove_patch(model)
    if not (merge_attn or merge_crossattn or merge_mlp):
        return model
    config = ToMeConfig(
        ratio=dict.fromkeys(LEVELS, 0.0),  # the merger below has tomesd's own rule
        cell_size=(sy, sx),
        destinations="random" if use_rand else "fixed",
        metric="block_input",
        merge_self_attention=merge_attn,
        merge_cross_attention=merge_crossattn,
        merge_mlp=merge_mlp,
        proportional_attention=False,
        share_plan=False,
    )
    merge_with(
        getattr(model, "unet", model),  # and no ControlNet
        lambda timesteps, name, excluded: _TomesdMerger(config, ratio, max_downsample, timesteps, name, excluded),
    )
    return model


def remove_patch(model: Any) -> Any:
    """Undo :func:`apply_patch`; does nothing if there is no such patch. Returns ``model``."""
    unet = getattr(model, "unet", model)
    if any(isinstance(merger, _TomesdMerger) for merger in mergers_on(unet)):
        remove_token_merging(unet)
    return model


class _TomesdMerger(TokenMerger):
    """Levels, ratio and random numbers as tomesd has them."""

    def __init__(self, config: ToMeConfig, ratio: float, max_downsample: int, *base: Any) -> None:
        super().__init__(config, *base)
        self.ratio = ratio
        self.max_downsample = max_downsample
        self.global_generator: torch.Generator | None = None

    def _plan(self, hidden_states: Tensor, layer: Any) -> MergePlan | None:
        if self.step is None:
            return None
        tokens = hidden_states.shape[1]
        original_height, original_width = self.step.height, self.step.width
        downsample = math.ceil(math.sqrt(original_height * original_width // tokens))
        if downsample > self.max_downsample:
            return None
        height, width = math.ceil(original_height / downsample), math.ceil(original_width / downsample)
        if self.global_generator is None:
            self.global_generator = _copy_of_global_generator(hidden_states.device)
        removed = int(tokens * self.ratio)
        sources = max_removed(height, width, self.config.cell_size)
        if removed <= 0 or not sources or height * width != tokens:
            return None
        return self._match(hidden_states.detach(), height, width, removed)

    def _destinations(self, height: int, width: int, batch: int, device: torch.device) -> Tensor:
        random = self.config.destinations == "random" and batch % 2 == 0
        return destination_mask(
            height, width, self.config.cell_size, self.global_generator if random else None, device
        )


def _copy_of_global_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.Generator(device=device).set_state(torch.cuda.get_rng_state())
    return torch.Generator().set_state(torch.get_rng_state())
