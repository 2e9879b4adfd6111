"""Which layers a cached step skips, and how a layer is skipped."""

from types import MethodType
from typing import TYPE_CHECKING, Any

from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UpBlock2D
from torch import Tensor, nn

if TYPE_CHECKING:
    from tomesd_plus.caching.cache import FeatureCache


def inner_layers(unet: nn.Module, branch: int) -> dict[str, nn.Module]:
    """The layers that cached steps skip: all inside of a branch of the U.

    The last of them, the *seam*, is the only one whose output goes to layers that do run. Blocks that are skipped
    whole stand for the layers in them.

    Args:
        unet: An SD UNet, whose up block ``block`` (counted from the outside) has one layer more than its down block.
        branch: ``3 · block + layer``.

    Returns:
        The layers by name; the seam comes last.

    Raises:
        TypeError: A block is not one of Stable Diffusion's.
        ValueError: There is no such branch.
    """
    ups, downs = list(getattr(unet, "up_blocks", ())), list(getattr(unet, "down_blocks", ()))
    strangers = {type(block).__name__ for block in ups if not isinstance(block, (CrossAttnUpBlock2D, UpBlock2D))}
    strangers |= {
        type(block).__name__ for block in downs if not isinstance(block, (CrossAttnDownBlock2D, DownBlock2D))
    }
    if strangers or not ups:
        found = f"has {', '.join(sorted(strangers))}" if strangers else f"is a {type(unet).__name__}"
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


class SkippableForward:
    """Stands in for the ``forward`` of one layer, which no hook of torch can keep from running.

    On full steps it runs the layer and keeps what is needed: of the seam the output, of others the shape. On cached
    steps it returns what the cache has for it; of the others, whose output nobody uses, memory that nobody wrote to.
    Outside of the UNet's calls it runs the layer. It copies and pickles with its layer.

    Args:
        cache: Knows what kind of step is under way.
        name: The layer's name in the UNet.
        layer: The layer.
        seam: True if outer layers use its output.
    """

    def __init__(self, cache: "FeatureCache", name: str, layer: nn.Module, seam: bool) -> None:
        self.cache = cache
        self.name = name
        self.layer = layer
        self.seam = seam
        self.before = layer.__dict__.get("forward")  # another's, such as accelerate's; None for the class's own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.cache.mode == "cached":
            return self._give(self.cache.outputs[self.name])
        if self.before is not None:
            output = self.before(*args, **kwargs)
        else:
            output = type(self.layer).forward(self.layer, *args, **kwargs)
        if self.cache.mode == "full":
            self.cache.outputs[self.name] = self._keep(output)
        return output

    # Copies, because FreeU writes into what it is given.

    def _keep(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(map(self._keep, output))
        return output.detach().clone() if self.seam else _shape_of(output)

    def _give(self, kept: Any) -> Any:
        if isinstance(kept, tuple):
            return tuple(map(self._give, kept))
        return kept.clone() if self.seam else kept.new_empty(kept.shape)


def _shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and device that takes the memory of one number."""
    return tensor.new_zeros(()).expand(tensor.shape)


# accelerate keeps the forward that it has wrapped under the second name, and puts it back from there.
_PLACES = ("forward", "_old_forward")


def make_skippable(layers: dict[str, nn.Module], cache: "FeatureCache") -> None:
    """Put a :class:`SkippableForward` on each layer that has none; the last layer is the seam."""
    seam = list(layers)[-1]
    for name, layer in layers.items():
        if not any(isinstance(layer.__dict__.get(place), SkippableForward) for place in _PLACES):
            layer.forward = SkippableForward(cache, name, layer, name == seam)


def skipping_cache(layer: nn.Module | None) -> "FeatureCache | None":
    """The cache that makes a layer skippable, or ``None``."""
    forwards = [] if layer is None else [layer.__dict__.get(place) for place in _PLACES]
    return next((forward.cache for forward in forwards if isinstance(forward, SkippableForward)), None)


def restore_forwards(unet: nn.Module) -> None:
    """Take every :class:`SkippableForward` off a UNet."""
    for layer in unet.modules():
        for place in _PLACES:
            forward = layer.__dict__.get(place)
            if not isinstance(forward, SkippableForward):
                continue
            if forward.before is not None:
                setattr(layer, place, forward.before)
            elif place == "forward":
                del layer.forward  # the class's own shows again
            else:
                setattr(layer, place, MethodType(type(layer).forward, layer))
