"""Pictures of a picture: its difference from another, and its merge map, as pure functions of tensors."""

from torch import Tensor, stack, zeros_like
from torch.nn.functional import interpolate

DIFFERENCE_GAIN = 4
_MOST = 4.0  # doublings: groups of 16 tokens and more look alike


def difference(pixels: Tensor, reference: Tensor, gain: float = DIFFERENCE_GAIN) -> Tensor:
    """The absolute difference of two pictures (3, height, width) in [0, 1], ``gain`` times, in [0, 1]."""
    return ((pixels - reference).abs() * gain).clamp(0, 1)


def merge_map_overlay(pixels: Tensor, merge_map: Tensor | None) -> Tensor:
    """A picture in grey with its merged tokens in colour: yellow for pairs, the redder the larger the group.

    Args:
        pixels: (3, height, width) in [0, 1].
        merge_map: (rows, columns), how many tokens each token was merged with, itself counted; ``None``: none was.

    Returns:
        (3, height, width) in [0, 1].
    """
    grey = pixels.mean(dim=0, keepdim=True).expand(3, -1, -1) * 0.6 + 0.2
    if merge_map is None:
        return grey.clamp(0, 1)
    doublings = interpolate(merge_map[None, None].float().log2(), size=pixels.shape[1:], mode="nearest")[0, 0]
    red = (doublings / _MOST).clamp(0, 1)
    colour = stack([zeros_like(red) + 1, 1 - red, zeros_like(red)])  # (3, height, width)
    return (grey * 0.3 + colour * 0.7).where(doublings > 0, grey).clamp(0, 1)
