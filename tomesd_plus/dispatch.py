"""One set of names for diffusion pipelines and for vision towers: each call goes to the room that knows the model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

TOWER_OPTIONS = ("r", "ratio", "similarity", "method", "protect", "proportional_attention")
ONLY_TOWERS = ("r", "similarity", "method", "protect")


def apply_token_merging(model: Any, config: Any = None, **options: Any) -> Any:
    """Merge tokens in a diffusion pipeline, or in transformers' vision towers.

    **Diffusion** (a diffusers pipeline with a UNet, or with a transformer of PixArt, Stable Diffusion 3 or Flux; or
    such a model or a ControlNet itself): around the attention processors that are there, in the UNet and the
    ControlNets, or in the transformer. Processors that are not diffusers' own may shuffle or count tokens, as
    HyperTile's do, or keep attention maps, so they are left alone, which a warning and the report say; one that does
    neither says it by an attribute ``permutation_equivariant = True``.

    **Vision** (transformers' ViT, DeiT, CLIP, SigLIP, DINOv2 or DINOv3, bare, inside a model, or in a pipeline such as
    ``"image-classification"``): in every layer of the vision towers, after Bolya et al., "Token Merging: Your ViT But
    Faster" (https://arxiv.org/abs/2210.09461). Outputs keep their shapes: after the last layer, and in
    ``hidden_states``, each patch has the value of the token that it went into. ``attentions`` are those among the
    tokens that were left.

    Args:
        model: A diffusers pipeline, UNet, ControlNet or transformer; or a model or pipeline of transformers with a
            vision tower.
        config: Diffusion: a :class:`~tomesd_plus.ToMeConfig`, or else the ratio. Vision: ``r``.
        options: Diffusion: fields of :class:`~tomesd_plus.ToMeConfig`. Vision, at most one of the first three:

            - ``r``: tokens to remove in each layer: a number, a list with one for each layer, or ``(r, inflection)``
              with an inflection in [−1, 1], from falling to growing. 16 by default;
            - ``ratio``: share of the patch tokens to remove in all, in [0, 1);
            - ``similarity``: as many as have a partner of at least this cosine similarity, in few fixed sizes;
            - ``method``: ``"merging"``; ``"evit"``, which keeps what the class token attends to and fuses the rest
              (https://arxiv.org/abs/2202.07800); or ``"ats"``, adaptive token sampling
              (https://arxiv.org/abs/2111.15667), which without ``r`` and ``ratio`` keeps as many as it meets;
            - ``protect``: a mask of the patches that must stay, (patches,), (rows, columns) or (batch, rows, columns);
            - ``proportional_attention``: whether a token that stands for s weighs s times; with merging by default.

    Returns:
        A report of what merging does, which follows the model as it runs: a
        :class:`~tomesd_plus.TokenMergingReport` of diffusion, a :class:`~tomesd_plus.TowerReport` of vision.

    Raises:
        TypeError: The model has nothing that can be merged, or an option is unknown or of a wrong type.
        ValueError: Merging is on already, or an option is out of range.
        RuntimeError: A vision tower of a transformers older than 5.18.

    Example:
        >>> from tomesd_plus import apply_token_merging, load_tiny_pipeline
        >>> pipe = load_tiny_pipeline()
        >>> report = apply_token_merging(pipe, ratio=0.5)
        >>> image = pipe("a large star on a blue background", num_inference_steps=2).images[0]
        >>> report.removed
        {1: 0.5, 2: 0.0, 4: 0.0}
    """
    if not _has_towers(model):
        from tomesd_plus.merging import apply

        foreign = [name for name in ONLY_TOWERS if name in options]
        if foreign:
            raise TypeError(
                f"{', '.join(foreign)}: for transformers' vision towers only, and {type(model).__name__} has none; "
                "diffusion takes ratio= and the other fields of ToMeConfig"
            )
        return apply.apply_token_merging(model, config, **options)
    foreign = [name for name in options if name not in TOWER_OPTIONS]
    if foreign or type(config).__name__ == "ToMeConfig":
        raise TypeError(
            f"{', '.join(foreign) or 'a ToMeConfig'}: not for the vision tower of {type(model).__name__}, "
            f"which takes {', '.join(TOWER_OPTIONS)}"
        )
    if config is not None and "r" in options:
        raise TypeError("r is given twice")
    from tomesd_plus.vision.apply import merge_towers
    from tomesd_plus.vision.config import TowerConfig

    return merge_towers(model, TowerConfig(**(options if config is None else options | {"r": config})))


def remove_token_merging(model: Any) -> None:
    """Undo :func:`apply_token_merging`, or ``set_attn_processor(ToMeProcessor())``: nothing of ours stays.

    Outputs are bit for bit as before. In diffusion the very processors that were there before are back; after
    ``set_attn_processor``, which has dropped them, diffusers' scaled-dot-product one is. Warns if merging is off.

    Raises:
        RuntimeError: It is called from inside of a block or layer whose tokens are merged.
    """
    _remove(model)


@contextmanager
def token_merging(model: Any, config: Any = None, **options: Any) -> Iterator[Any]:
    """Merge tokens inside a ``with`` block; takes what :func:`apply_token_merging` takes, and yields its report."""
    report = apply_token_merging(model, config, **options)
    try:
        yield report
    finally:
        _remove(model, warn=False)  # nothing may be on: a warning has said so where the block began


def _remove(model: Any, warn: bool = True) -> None:
    if _has_towers(model):
        from tomesd_plus.vision.apply import unmerge_towers

        unmerge_towers(model)
    else:
        from tomesd_plus.merging import apply

        apply.remove_token_merging(model, warn)


def merging_report(model: Any) -> Any:
    """The report of the merging that is on, however it was switched on; raises ValueError if it is off.

    Bare processors count once their model has been called.
    """
    if _has_towers(model):
        from tomesd_plus.vision.apply import towers_report

        return towers_report(model)
    from tomesd_plus.merging import apply

    return apply.merging_report(model)


def _has_towers(model: Any) -> bool:
    """True for what is transformers' own: a model, a pipeline, or a module that has such a model in it.

    Raises:
        TypeError: It is a name or a class, or nothing at all.
    """
    if model is None or isinstance(model, str | PathLike | type):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise TypeError(
            "expected a diffusers pipeline with a UNet or a transformer, or a model or pipeline of transformers with "
            f"a vision tower (ViT, DeiT, CLIP, SigLIP, DINOv2 or DINOv3), not {given}: load or make the model first"
        )
    if "transformers" not in sys.modules or hasattr(model, "unet"):
        return False
    inner = getattr(model, "_orig_mod", model)
    if _is_of_transformers(inner):
        return True
    modules = getattr(inner, "modules", None)
    return callable(modules) and not isinstance(inner, type) and any(map(_is_of_transformers, modules()))


def _is_of_transformers(thing: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(thing).__mro__)
