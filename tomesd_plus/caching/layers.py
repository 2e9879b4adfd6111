"""Which layers a cached step skips, and how a layer is skipped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UpBlock2D
from torch import nn

from tomesd_plus.caching.calls import shape_of
from tomesd_plus.caching.config import Branch
from tomesd_plus.host.forwards import forwards_on
from tomesd_plus.host.models import finest_self_attention, unwrapped


@dataclass(frozen=True, eq=False)
class Skipped:
    """Layers that cached steps skip.

    Args:
        layers: By name, in order of execution. A block that is skipped stands for the layers in it.
        boundary: Those of them whose outputs go to layers that do run.
    """

    layers: dict[str, nn.Module]
    boundary: tuple[str, ...]


def skipped_layers(unet: nn.Module, branch: Branch) -> Skipped:
    """The layers that cached steps skip.

    Args:
        unet: An SD UNet.
        branch: ``3 · block + layer``, ``"self_attention"``, or ``"nothing"``: then there are no cached steps.

    Raises:
        TypeError: A block is not one of Stable Diffusion's.
        ValueError: There is no such branch.
    """
    unet = unwrapped(unet)
    if branch == "nothing":
        return Skipped({}, ())
    if branch == "self_attention":
        attentions = finest_self_attention(unet)
        if not attentions:
            raise TypeError(
                f"branch='self_attention' needs a UNet with transformer blocks, not a {type(unet).__name__}"
            )
        return Skipped(attentions, tuple(attentions))
    layers = _inner_layers(unet, branch)
    return Skipped(layers, (list(layers)[-1],))


def _inner_layers(unet: nn.Module, branch: int) -> dict[str, nn.Module]:
    """All layers inside of a branch of the U; the last one is its boundary.

    Args:
        unet: An SD UNet, whose up block ``block`` (counted from the outside) has one layer more than its down block.
        branch: ``3 · block + layer``.

    Raises:
        TypeError: A block is not one of Stable Diffusion's.
        ValueError: There is no such branch.
    """
    ups, downs = list(getattr(unet, "up_blocks", ())), list(getattr(unet, "down_blocks", ()))
    unsupported = {type(block).__name__ for block in ups if not isinstance(block, (CrossAttnUpBlock2D, UpBlock2D))}
    unsupported |= {
        type(block).__name__ for block in downs if not isinstance(block, (CrossAttnDownBlock2D, DownBlock2D))
    }
    if unsupported or not ups:
        found = f"has {', '.join(sorted(unsupported))}" if unsupported else f"is a {type(unet).__name__}"
        raise TypeError(f"expected a UNet of Stable Diffusion 1.x, 2.x or XL, but this {found}")
    if branch >= 3 * len(ups):
        raise ValueError(f"branch must be less than {3 * len(ups)} for a UNet of {len(ups)} blocks, not {branch}")

    block, layer = divmod(branch, 3)  # the down path runs `layer` layers of `block`, the up path one more
    down, up = downs[block], ups[-1 - block]
    names = []
    if layer == 0:
        names.append(f"down_blocks.{block}")
    else:
        names += _members(down, f"down_blocks.{block}", slice(layer, None))
        names += [f"down_blocks.{block}.downsamplers.{i}" for i in range(len(down.downsamplers or ()))]
    names += [f"down_blocks.{i}" for i in range(block + 1, len(downs))]
    names += ["mid_block"] if unet.mid_block is not None else []
    names += [f"up_blocks.{i}" for i in range(len(ups) - 1 - block)]
    running = min(layer + 1, len(up.resnets))
    names += _members(up, f"up_blocks.{len(ups) - 1 - block}", slice(0, len(up.resnets) - running))
    return {name: unet.get_submodule(name) for name in names}


def _members(block: Any, name: str, layers: slice) -> list[str]:
    """Names of a block's resnets, then of its attentions, of which the last one runs last."""
    attentions = range(len(getattr(block, "attentions", ())))
    return [f"{name}.resnets.{i}" for i in range(len(block.resnets))[layers]] + [
        f"{name}.attentions.{i}" for i in attentions[layers]
    ]


@dataclass(frozen=True, eq=False)
class Run:
    """Run the layer.

    Args:
        keep_in: Where to keep its output under its name; ``None``: it is not kept.
    """

    keep_in: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Take:
    """Take what was kept in place of running the layer."""

    output: Any


class SkippableForward:
    """Stands in for the ``forward`` of one layer, which no hook of torch can keep from running.

    On full steps it runs the layer and keeps what is needed: of the boundary the output, of others the shape. On
    cached steps it returns what the cache has for it; of the others, whose output nobody uses, memory that nobody
    wrote to. Outside of the UNet's calls it runs the layer. It copies and pickles with its layer.

    Args:
        ask: What is to be done in the layer of a name, at this step.
        name: The layer's name in the UNet.
        layer: The layer.
        boundary: True if layers that always run use its output.
    """

    __slots__ = ("ask", "before", "boundary", "layer", "name")  # hosts copy a forward's dictionary into their own

    def __init__(self, ask: Callable[[str], Run | Take], name: str, layer: nn.Module, boundary: bool) -> None:
        self.ask = ask
        self.name = name
        self.layer = layer
        self.boundary = boundary
        self.before = layer.__dict__.get("forward")  # another's, such as accelerate's; None for the class's own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.ask(self.name)
        if isinstance(answer, Take):
            return self._give(answer.output)
        if self.before is not None:
            output = self.before(*args, **kwargs)
        else:
            output = type(self.layer).forward(self.layer, *args, **kwargs)
        if answer.keep_in is not None:
            answer.keep_in[self.name] = self._keep(output)
        return output

    # Copies, because FreeU writes into what it is given.

    def _keep(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(map(self._keep, output))
        return output.detach().clone() if self.boundary else shape_of(output)

    def _give(self, kept: Any) -> Any:
        if isinstance(kept, tuple):
            return tuple(map(self._give, kept))
        return kept.clone() if self.boundary else kept.new_empty(kept.shape)


def make_skippable(skipped: Skipped, ask: Callable[[str], Run | Take]) -> None:
    """Put a :class:`SkippableForward` on each layer that has none."""
    for name, layer in skipped.layers.items():
        if not forwards_on(layer, SkippableForward):
            layer.forward = SkippableForward(ask, name, layer, name in skipped.boundary)
