"""Which tokens merge into which: bipartite soft matching on a grid of cells.

The method is that of Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (https://arxiv.org/abs/2303.17604):
one destination in every cell, every other token of it a source; each source looks for its most similar destination,
and the sources that are most similar to theirs are merged. Here a source may look only inside its window, and no
score matrix of all sources and destinations is ever in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tomesd_plus.plan import MergePlan

MAX_SCORES = 1 << 23  # in memory at a time: 32 MB in float32, beside the tokens compared


def max_removed(height: int, width: int, cell_size: tuple[int, int]) -> int:
    """The number of sources in a grid, which is the most tokens that a plan can remove; 0 if no cell fits in."""
    return (height // cell_size[0]) * (width // cell_size[1]) * (cell_size[0] * cell_size[1] - 1)


@dataclass(frozen=True, eq=False)
class Cells:
    """Destinations and sources of a grid of tokens, sorted by windows; shared by a batch.

    Args:
        tokens: Of the grid. Those in rows and columns that fill no cell are neither sources nor destinations.
        destination: Token indices, (windows, destinations).
        source: Token indices, (windows, sources).
        twice: True where a source at the grid's edge stands in the list only to fill its window, and counts
            elsewhere, (windows, sources); ``None`` if there is no such.
    """

    tokens: int
    destination: Tensor
    source: Tensor
    twice: Tensor | None

    def to(self, device: torch.device | str) -> "Cells":
        """The same on another device, by way of pinned memory, so that the host does not wait for a GPU."""
        if self.destination.device == torch.device(device):
            return self
        return Cells(
            self.tokens,
            _moved(self.destination, device),
            _moved(self.source, device),
            None if self.twice is None else _moved(self.twice, device),
        )


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def make_cells(
    height: int,
    width: int,
    cell_size: tuple[int, int] = (2, 2),
    window: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Cells:
    """Choose one destination in each cell of a token grid; the cell's other tokens are sources.

    Args:
        height, width: Size of the grid, tokens; at least one cell must fit in.
        cell_size: Height and width of a cell, tokens.
        window: Side of the windows, cells. A source is compared with the destinations of its window. ``None``: one
            window holds the whole grid.
        generator: Where to draw the destination's place in each cell from; ``None`` takes each cell's first token. It
            may live on another device than the one wanted: one on the CPU gives the same cells for every device.
        device: Where the index tensors are wanted.
    """
    cell_height, cell_width = cell_size
    rows, columns = height // cell_height, width // cell_width
    shape = (rows, columns, 1)
    if generator is None:
        place = torch.zeros(shape, dtype=torch.int64)
    else:
        place = torch.randint(cell_height * cell_width, shape, device=generator.device, generator=generator)
    others = torch.arange(cell_height * cell_width - 1, device=place.device)
    order = torch.cat([place, others + (others >= place)], dim=2)  # the destination, then the cell's other tokens
    y = torch.arange(rows, device=place.device)[:, None, None] * cell_height + order // cell_width
    x = torch.arange(columns, device=place.device)[:, None] * cell_width + order % cell_width
    tokens = y * width + x  # (rows, columns, tokens of a cell)
    twice = None
    if window is not None:
        tokens, twice = _windows(tokens, min(window, max(rows, columns)))
    else:
        tokens = tokens.reshape(1, rows * columns, -1)
    cells = Cells(height * width, tokens[:, :, 0].contiguous(), tokens[:, :, 1:].flatten(1), twice)
    return cells.to(device)


def _windows(tokens: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
    """Sort cells (rows, columns, tokens) by windows: (windows, cells, tokens), and which sources stand there twice."""
    rows, columns, size = tokens.shape
    down, across = -(-rows // side), -(-columns // side)
    y = torch.arange(down * side, device=tokens.device)
    x = torch.arange(across * side, device=tokens.device)
    filled = tokens[y.clamp(max=rows - 1)][:, x.clamp(max=columns - 1)]
    beyond = (y[:, None] >= rows) | (x >= columns)
    both = torch.cat([filled, beyond[..., None].to(filled)], dim=2)
    both = both.view(down, side, across, side, size + 1).transpose(1, 2).reshape(down * across, side * side, size + 1)
    twice = both[:, :, -1:].bool().expand(-1, -1, size - 1).flatten(1)
    return both[:, :, :-1], twice if rows % side or columns % side else None


@torch.no_grad()
def match(metric: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """Find the most similar destination of each source.

    Args:
        metric: What similarity (cosine) is measured on, (batch, tokens, channels).
        cells: Sources and destinations.

    Returns:
        Similarity in [-1, 1], or −inf where a source stands twice; and the destination's place in its window. Both
        (batch, windows, sources).
    """
    batch, _, channels = metric.shape
    windows, destinations = cells.destination.shape
    target = metric.index_select(1, cells.destination.flatten())
    target = target / _length(target)
    target = target.view(batch, windows, destinations, channels).transpose(-1, -2)
    parts = []
    for chunk in cells.source.split(max(1, MAX_SCORES // (batch * windows * destinations)), dim=1):
        source = metric.index_select(1, chunk.flatten())
        score, best = (source.view(batch, windows, -1, channels) @ target).max(dim=-1)
        parts.append((score / _length(source).view(score.shape), best))
    similarity, best = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    if cells.twice is not None:
        similarity = similarity.masked_fill(cells.twice, -torch.inf)
    return similarity, best


def merge_most_similar(similarity: Tensor, best: Tensor, cells: Cells, removed: int) -> MergePlan:
    """Plan to merge the sources that are most similar to their destinations.

    Args:
        similarity, best: As :func:`match` returns them.
        cells: The same as there.
        removed: How many tokens to remove, at most as many as there are sources; from each sample of the batch.
    """
    destinations, sources = cells.destination.shape[1], cells.source.shape[1]
    chosen = similarity.flatten(1).topk(removed, sorted=False).indices
    place = chosen // sources * destinations + best.flatten(1).gather(1, chosen)
    return MergePlan.from_pairs(cells.source.flatten()[chosen], cells.destination.flatten()[place], cells.tokens)


def _length(vectors: Tensor) -> Tensor:
    length = vectors.norm(dim=-1, keepdim=True)
    return length.clamp_min(torch.finfo(length.dtype).tiny)  # a token of zeros is similar to nothing
