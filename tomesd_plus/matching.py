"""Which tokens merge into which: bipartite soft matching on a grid of cells.

The method is that of Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (https://arxiv.org/abs/2303.17604),
and its reference code, tomesd 0.1.3: one destination in every cell, every other token a source; each source looks
for its most similar destination, and the sources that are most similar to theirs are merged.
"""

import torch
from torch import Tensor

from tomesd_plus.plan import MergePlan


def max_removed(height: int, width: int, cell_size: tuple[int, int]) -> int:
    """The number of sources in a grid, which is the most tokens that a plan can remove; 0 if no cell fits in."""
    cells = (height // cell_size[0]) * (width // cell_size[1])
    return height * width - cells if cells else 0


def destination_mask(
    height: int,
    width: int,
    cell_size: tuple[int, int] = (2, 2),
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Choose one destination in each cell of a token grid.

    Args:
        height, width: Size of the grid, tokens. Rows and columns that fill no cell have no destination.
        cell_size: Height and width of a cell, tokens.
        generator: Where to draw the place in each cell from; ``None`` takes each cell's first token.
        device: Where the mask is wanted. It is drawn where the generator lives, so that a generator on the CPU
            gives the same mask for every device.

    Returns:
        (height, width), bool: True at destinations.
    """
    cell_height, cell_width = cell_size
    rows, columns = height // cell_height, width // cell_width
    if generator is None:
        place = torch.zeros(rows, columns, 1, dtype=torch.int64, device=device)
    else:
        size = (rows, columns, 1)
        place = torch.randint(cell_height * cell_width, size, device=generator.device, generator=generator).to(device)
    cells = torch.zeros(rows, columns, cell_height * cell_width, dtype=torch.bool, device=device)
    cells.scatter_(2, place, torch.ones_like(place, dtype=torch.bool))
    cells = cells.view(rows, columns, cell_height, cell_width).transpose(1, 2)
    mask = torch.zeros(height, width, dtype=torch.bool, device=device)
    mask[: rows * cell_height, : columns * cell_width] = cells.reshape(rows * cell_height, columns * cell_width)
    return mask


@torch.no_grad()
def bipartite_match(metric: Tensor, mask: Tensor, destinations: int, removed: int) -> MergePlan:
    """Merge the sources that are most similar to a destination.

    Args:
        metric: What similarity (cosine) is measured on, (batch, tokens, channels).
        mask: True at destinations, (height, width) with height · width = tokens; shared by the batch.
        destinations: The number of True values in the mask, given so that no value is read from the device.
        removed: How many tokens to remove, at least 1; never more than there are sources.

    Returns:
        The plan; each sample of the batch has its own matching.
    """
    batch = metric.shape[0]
    # The very calls of tomesd, on the very dtype: the order that an unstable sort leaves decides the order of sums.
    order = mask.reshape(1, -1, 1).to(torch.int64).neg().argsort(dim=1)[..., 0]  # destinations first
    destination = order[:, :destinations].expand(batch, -1)
    source = order[:, destinations:].expand(batch, -1)

    norm = metric.norm(dim=-1, keepdim=True)
    metric = metric / norm.clamp_min(torch.finfo(norm.dtype).tiny)  # a token of zeros is similar to nothing
    channels = metric.shape[2]
    a = metric.gather(1, source[..., None].expand(-1, -1, channels))
    b = metric.gather(1, destination[..., None].expand(-1, -1, channels))
    similarity, best = (a @ b.transpose(-1, -2)).max(dim=-1)  # (batch, sources)
    ranked = similarity.argsort(dim=-1, descending=True)

    removed = min(removed, source.shape[1])
    merged, unmerged = ranked[:, :removed], ranked[:, removed:]
    return MergePlan.from_indices(
        unmerged=source.gather(1, unmerged),
        destination=destination,
        merged=source.gather(1, merged),
        target=best.gather(1, merged),
    )
