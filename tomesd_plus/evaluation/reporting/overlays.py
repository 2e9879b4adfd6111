"""Images of differences and of merge maps, as pure functions of tensors."""

from torch import Tensor, stack, zeros_like
from torch.nn.functional import interpolate

DIFFERENCE_GAIN = 4
_MAX_DOUBLINGS = 4.0  # groups of 16 or more tokens have the same colour


def difference(pixels: Tensor, reference: Tensor, gain: float = DIFFERENCE_GAIN) -> Tensor:
    """The absolute difference of two images (3, height, width) in [0, 1], times ``gain``, clamped to [0, 1]."""
    return ((pixels - reference).abs() * gain).clamp(0, 1)


def merge_map_overlay(pixels: Tensor, merge_map: Tensor | None) -> Tensor:
    """A grey image with merged tokens in colour: yellow for pairs, redder for larger groups.

    Args:
        pixels: (3, height, width) in [0, 1].
        merge_map: (rows, columns), the size of the group that each token was merged into; ``None`` if none merged.

    Returns:
        (3, height, width) in [0, 1].
    """
    grey = pixels.mean(dim=0, keepdim=True).expand(3, -1, -1) * 0.6 + 0.2
    if merge_map is None:
        return grey.clamp(0, 1)
    doublings = interpolate(merge_map[None, None].float().log2(), size=pixels.shape[1:], mode="nearest")[0, 0]
    red = (doublings / _MAX_DOUBLINGS).clamp(0, 1)
    colour = stack([zeros_like(red) + 1, 1 - red, zeros_like(red)])  # (3, height, width)
    return (grey * 0.3 + colour * 0.7).where(doublings > 0, grey).clamp(0, 1)
