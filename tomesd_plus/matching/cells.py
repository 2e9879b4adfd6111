"""The grid of cells in which tokens are matched: one destination in each, the other tokens of it are sources."""

from dataclasses import dataclass

import torch
from torch import Tensor


def max_removed(height: int, width: int, cell_size: tuple[int, int]) -> int:
    """The number of sources in a grid, which is the most tokens that a plan can remove; 0 if no cell fits in.

    Example:
        >>> max_removed(64, 64, (2, 2)), max_removed(5, 4, (2, 2)), max_removed(1, 64, (2, 2))
        (3072, 12, 0)
    """
    return (height // cell_size[0]) * (width // cell_size[1]) * (cell_size[0] * cell_size[1] - 1)


@dataclass(frozen=True, eq=False)
class Cells:
    """Destinations and sources of a grid of tokens, sorted by windows; shared by a batch.

    Args:
        tokens: Of the grid. Those in rows and columns that fill no cell are neither sources nor destinations.
        destination: Token indices, (windows, destinations).
        source: Token indices, (windows, sources).
        padding: Padding mask, True where a source stands in the list only to fill a window at the grid's edge,
            (windows, sources); ``None`` if no window needs any.
    """

    tokens: int
    destination: Tensor
    source: Tensor
    padding: Tensor | None

    def to(self, device: torch.device | str) -> "Cells":
        """The same on another device, by way of pinned memory, so that the host does not wait for a GPU."""
        if self.destination.device == torch.device(device):
            return self
        return Cells(
            self.tokens,
            _moved(self.destination, device),
            _moved(self.source, device),
            None if self.padding is None else _moved(self.padding, device),
        )


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    if torch.device(device).type != "cuda":  # to MPS, a copy not waited for may read memory that is free again
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)


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

    Example:
        >>> cells = make_cells(2, 4)  # two cells of 2 × 2 tokens, all in one window
        >>> cells.destination.tolist(), cells.source.tolist()
        ([[0, 2]], [[1, 4, 5, 3, 6, 7]])
        >>> make_cells(64, 64, window=8).source.shape  # (windows, sources)
        torch.Size([16, 192])
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
    padding = None
    if window is not None:
        tokens, padding = _windows(tokens, min(window, max(rows, columns)))
    else:
        tokens = tokens.reshape(1, rows * columns, -1)
    cells = Cells(height * width, tokens[:, :, 0].contiguous(), tokens[:, :, 1:].flatten(1), padding)
    return cells.to(device)


def _windows(tokens: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
    """Sort cells (rows, columns, tokens) by windows, (windows, cells, tokens), with their sources' padding mask."""
    rows, columns, size = tokens.shape
    down, across = -(-rows // side), -(-columns // side)
    y = torch.arange(down * side, device=tokens.device)
    x = torch.arange(across * side, device=tokens.device)
    filled = tokens[y.clamp(max=rows - 1)][:, x.clamp(max=columns - 1)]
    beyond = (y[:, None] >= rows) | (x >= columns)
    both = torch.cat([filled, beyond[..., None].to(filled)], dim=2)
    both = both.view(down, side, across, side, size + 1).transpose(1, 2).reshape(down * across, side * side, size + 1)
    padding = both[:, :, -1:].bool().expand(-1, -1, size - 1).flatten(1)
    return both[:, :, :-1], padding if rows % side or columns % side else None
