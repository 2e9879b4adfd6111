"""What is read off diffusers' image transformers and their calls: PixArt, Stable Diffusion 3 and Flux."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from tomesd_plus.host.arguments import argument, positions
from tomesd_plus.host.models import unwrapped
from tomesd_plus.host.reading import Reading
from tomesd_plus.host.transient import ThreadLocal, Transient

KNOWN: tuple[type[nn.Module], ...] = (PixArtTransformer2DModel, SD3Transformer2DModel, FluxTransformer2DModel)
FLUX_SCALE = 1000  # Flux is called with timesteps divided by this
TRUSTED_CALLS = 2  # at one place of the scheduler: with true guidance Flux is called twice a step
ROUNDING = 2**-7  # of a timestep in bfloat16, twice over


def transformer_of(pipe: Any) -> nn.Module | None:
    """The transformer of a pipeline, or the transformer itself, without ``torch.compile`` around it.

    Returns:
        ``None`` if it has a UNet, or is no transformer of diffusers.

    Raises:
        TypeError: It is a transformer whose blocks are not known here.
    """
    model = unwrapped(getattr(pipe, "transformer", pipe))
    if hasattr(pipe, "unet") or not isinstance(model, nn.Module):
        return None
    if is_known_transformer(model):
        return model
    if type(model).__module__.startswith("diffusers.models.transformers.") or hasattr(pipe, "transformer"):
        raise TypeError(
            f"tokens are merged in the transformers of PixArt, Stable Diffusion 3 and Flux, not in a "
            f"{type(model).__name__}: its blocks are not known here"
        )
    return None


def is_known_transformer(model: Any) -> bool:
    """True for a transformer of :data:`KNOWN`, or of a class below it that is called and runs like it."""
    return any(isinstance(model, kind) and type(model).forward is kind.forward for kind in KNOWN)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """A transformer's blocks by name, in the order in which they run."""
    lists = ("transformer_blocks", "single_transformer_blocks")
    found = {name: getattr(model, name) for name in lists if hasattr(model, name)}
    return {f"{name}.{index}": block for name, blocks in found.items() for index, block in enumerate(blocks)}


def matches_flows(model: nn.Module) -> bool:
    """True if a transformer was trained by flow matching, so that its timesteps are 1,000 σ."""
    return not isinstance(model, PixArtTransformer2DModel)


class _Ids(ThreadLocal):
    """The position ids of a thread's last call of Flux, and the grid that was read off them."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None  # held, so that its memory cannot become another's
        self.version: int | None = None
        self.grid: tuple[int, int] | None = None


class _Place(ThreadLocal):
    """Where in the scheduler a thread's last call of Flux stood."""

    def __init__(self) -> None:
        self.at: tuple[int, int | None] | None = None  # which timesteps, and the scheduler's step
        self.calls = 0  # that have stood there
        self.trusted = False  # the generation's first timestep was the scheduler's
        self.number: float | None = None  # the value that was read last
        self.given: Tensor | float | None = None  # the timestep that was made of it
        self.latents: tuple[Tensor, int | None] | None = None  # of that call, with their version

    def is_branch(self, number: float, latents: tuple[Tensor, int | None]) -> bool:
        """True if a call is of the last one's step, as those of guidance's branches are."""
        before = self.latents
        return number == self.number and before is not None and before[0] is latents[0] and before[1] == latents[1]


class TransformerReader:
    """Reads the calls of one transformer, or of one ControlNet beside it; copies and pickles, without the pipeline.

    Args:
        pipe: The pipeline whose scheduler tells Flux's steps, or the transformer by itself.
    """

    def __init__(self, pipe: Any) -> None:
        # Not held; what cannot be referred to so, a stand-in for a pipeline, is not asked.
        self._pipe: Transient[weakref.ref[Any]] = Transient(weakref.ref(pipe) if _referable(pipe) else None)
        self._ids, self._place = _Ids(), _Place()
        self._thread: Transient[weakref.ref[threading.Thread]] = Transient()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        """Read a call.

        Args:
            model: A transformer of :data:`KNOWN` or its ControlNet, or the same compiled.
            args, kwargs: As a forward pre-hook with keyword arguments is given them.
        """
        inner = unwrapped(model)
        places = positions(type(inner))
        given = _Arguments(places, args, kwargs)
        hidden_states, timestep, text = (
            given[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")
        )
        between, length = _between_blocks(inner, given), 0 if text is None else text.shape[1]
        if "img_ids" not in places:  # all but Flux
            patch = inner.config.patch_size
            rows, columns = (side // patch for side in hidden_states.shape[-2:])
            return Reading(hidden_states[..., :rows, :columns], timestep, text, length, between=between)
        size, ids = self._grid(given["img_ids"]), given["img_ids"]
        if size is None or size[0] * size[1] != hidden_states.shape[1]:
            why = f"the position ids of its {ids.shape[-2]} tokens are not those of one grid, row by row"
            size, between = (1, hidden_states.shape[1]), why
            grid = hidden_states[:, :, :1].transpose(1, 2).unflatten(-1, size)
            return Reading(grid, self._timestep(timestep, hidden_states), text, length, obstacle=why, between=why)
        grid = hidden_states[:, :, :1].transpose(1, 2).unflatten(-1, size)  # (batch, 1, rows, columns), a view
        return Reading(grid, self._timestep(timestep, hidden_states), text, length, between=between)

    def _grid(self, ids: Tensor) -> tuple[int, int] | None:
        """Rows and columns, read once for all calls that are given the same ids."""
        version = _version(ids)
        held = self._ids
        if held.tensor is not ids or held.version != version:
            held.tensor, held.version, held.grid = ids, version, grid_of(ids)
        return held.grid

    def _timestep(self, timestep: Tensor | float, latents: Tensor) -> Tensor | float:
        """The scheduler's own timestep of this step, a view, or the call's as a number on the scheduler's scale.

        Flux is given a new tensor at each call, whose value a GPU would have to be waited for. The scheduler says
        where it stands, and its timesteps are copied to the host once a generation. Once a generation, too, the value
        is read, to see that it is this scheduler's; and where so many calls stand at one place that it cannot be, or
        another thread is under way, whose pipeline may have another scheduler. If that has gone on between two calls
        of a step, they still get one timestep.
        """
        scheduler: Any = getattr(None if self._pipe.value is None else self._pipe.value(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor):
            return FLUX_SCALE * _number(timestep)
        step, place = getattr(scheduler, "step_index", None), self._place
        at = (timesteps.data_ptr(), step)
        place.calls = place.calls + 1 if place.at == at else 1
        place.at = at
        index = (getattr(scheduler, "begin_index", None) or 0) if step is None else step
        ended, first = index >= len(timesteps), self._first_thread()
        if not (ended or _on_host(timestep) or step is None or place.calls > TRUSTED_CALLS or not first):
            return timesteps[index] if place.trusted else FLUX_SCALE * _number(timestep)
        number = FLUX_SCALE * _number(timestep)
        close = not ended and _close(float(timesteps[index]), number)
        trusted = close if step is None else place.trusted and close
        version = _version(latents)
        if trusted != place.trusted and place.is_branch(number, (latents, version)):
            return cast(Tensor | float, place.given)
        place.trusted, place.number, place.latents = trusted, number, (latents, version)
        place.given = timesteps[index] if trusted else number
        return place.given

    def _first_thread(self) -> bool:
        """True in the thread that reads calls first, of those alive."""
        thread = threading.current_thread()
        first = None if self._thread.value is None else self._thread.value()
        if first is None or not first.is_alive():
            self._thread.value, first = weakref.ref(thread), thread
        return first is thread


@dataclass(frozen=True)
class _Arguments:
    """A call's arguments by name."""

    places: dict[str, int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return argument(self.places, self.args, self.kwargs, name)


def grid_of(ids: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a picture's tokens, by their position ids; waits for the device.

    Args:
        ids: (tokens, 3), or with a batch before that: which picture, row, column.

    Returns:
        ``None`` if they are not those of one picture, row by row.

    Example:
        >>> rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
        >>> grid_of(torch.stack([torch.zeros(2, 3), rows, columns], dim=-1).flatten(0, 1))
        (2, 3)
    """
    places = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float32)
    if places.ndim != 2 or places.shape[-1] != 3 or not len(places):
        return None
    rows, columns = (int(side) + 1 for side in (places[-1] - places[0])[1:].tolist())
    if rows < 1 or columns < 1 or rows * columns != len(places):
        return None
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    expected = torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)
    return (rows, columns) if torch.equal(places - places[0], expected.float()) else None


def _between_blocks(model: nn.Module, given: _Arguments) -> str | None:
    """Why tokens cannot stay merged from one block to the next, or ``None``."""
    added = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")
    if any(given[name] is not None for name in added):
        return "a ControlNet adds to all tokens between the blocks"
    if given["skip_layers"]:
        return "blocks are skipped in this call"
    if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
        return "blocks are run again for gradients, each by itself"
    if getattr(model, "is_cache_enabled", False):
        return "a cache of diffusers decides which blocks run"
    return None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _number(timestep: Tensor | float) -> float:
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)


def _on_host(timestep: Tensor | float) -> bool:
    return not isinstance(timestep, Tensor) or timestep.device.type == "cpu"


def _close(scheduled: float, called: float) -> bool:
    return abs(scheduled - called) <= ROUNDING * abs(scheduled)


def _referable(pipe: Any) -> bool:
    return bool(type(pipe).__weakrefoffset__)
