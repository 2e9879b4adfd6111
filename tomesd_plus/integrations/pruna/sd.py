"""Token merging in Stable Diffusion's UNet, as an algorithm of Pruna."""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

from ConfigSpace import CategoricalHyperparameter, UniformFloatHyperparameter
from pruna.algorithms.base.tags import AlgorithmTag as tags
from pruna.config.hyperparameters import Boolean
from pruna.config.smash_config import SmashConfigPrefixWrapper

from tomesd_plus.dispatch import apply_token_merging
from tomesd_plus.host.models import finest_level, unet_of
from tomesd_plus.integrations.pruna.base import TomesdPlus, refuse_merged
from tomesd_plus.integrations.pruna.checked import Checked
from tomesd_plus.merging.config import CHOICES, LEVELS, ToMeConfig
from tomesd_plus.schedules import AdaptiveRatio
from tomesd_plus.schedules.named import SCHEDULES, schedule_by_name

ADAPTIVE_RATIOS = 3  # equal steps up to the reduction ratio


class TomeSD(TomesdPlus):
    """
    Merge tokens in Stable Diffusion's UNet, more of them at noisy steps than at clean ones.

    Tokens that are alike are merged before self-attention and unmerged after it, so that attention, whose cost grows
    with the square of their number, runs on fewer.
    """

    algorithm_name: str = "tome_sd"
    group_tags: ClassVar[list[tags]] = [tags.PRUNER]
    references: ClassVar[dict[str, str]] = {
        "Paper": "https://arxiv.org/abs/2303.17604",
        "GitHub": "https://github.com/dbolya/tomesd",
    }
    compatible_before: ClassVar[Iterable[str]] = ["qkv_diffusers", "torchao", "torch_dynamic", "deepcache"]
    compatible_after: ClassVar[Iterable[str]] = ["tome_cache", "torch_compile"]

    def get_hyperparameters(self) -> list[Any]:
        """
        Get the hyperparameters for the algorithm.

        Returns
        -------
        list
            The hyperparameters.
        """
        return [
            CategoricalHyperparameter(
                "method",
                choices=list(CHOICES["mode"]),
                default_value="merge",
                meta={"desc": "'merge' averages tokens that are alike; 'prune' drops all but one of them."},
            ),
            UniformFloatHyperparameter(
                "reduction_ratio",
                lower=0.0,
                upper=0.75,
                default_value=0.5,
                meta={"desc": "Share of the tokens to remove, on average. Higher is faster, less close."},
            ),
            CategoricalHyperparameter(
                "schedule",
                choices=["auto", *SCHEDULES],
                default_value="auto",
                meta={
                    "desc": "How the ratio falls from noisy to clean steps. 'auto' is 'cosine', and 'steps' with "
                    "torch_compile, which compiles once for each ratio."
                },
            ),
            Boolean(
                "adaptive",
                default=False,
                meta={"desc": "Merge as many tokens as are in fact alike, at most the reduction ratio."},
            ),
            UniformFloatHyperparameter(
                "similarity",
                lower=-1.0,
                upper=1.0,
                default_value=0.9,
                meta={"desc": "Where adaptive: the cosine similarity from which on tokens count as alike."},
            ),
            CategoricalHyperparameter(
                "max_downsample",
                choices=["auto", *LEVELS],
                default_value="auto",
                meta={
                    "desc": "Merge at levels of at most this downsample. 'auto' is the finest that has "
                    "self-attention: 1 in Stable Diffusion 1.x and 2.x, 2 in XL."
                },
            ),
            Checked(
                "layers",
                checked_layers,
                default_value="self_attention",
                meta={
                    "desc": "Layers that run on merged tokens: one or a list of 'self_attention', "
                    "'cross_attention' and 'mlp', or 'block' for whole transformer blocks."
                },
            ),
            Boolean(
                "gate",
                default=False,
                meta={"desc": "Measure each kind of block both ways, once, and merge only where it pays."},
            ),
        ]

    def _look_at(self, model: Any) -> None:
        unet_of(model)

    def _check(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        if smash_config["adaptive"]:
            self._refuse_idle(smash_config, ["schedule"], "adaptive looks at the tokens, whatever the step")
        else:
            self._refuse_idle(smash_config, ["similarity"], "similarity is for adaptive merging")
        merging_of(model, smash_config)
        refuse_merged(model)

    def _switch_on(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        apply_token_merging(model, merging_of(model, smash_config))


def merging_of(model: Any, values: Any) -> ToMeConfig:
    """The options of ``tome_sd`` for a model."""
    most, schedule = values["reduction_ratio"], values["schedule"]
    if values["adaptive"]:
        steps = range(ADAPTIVE_RATIOS + 1)
        ratio: Any = AdaptiveRatio(values["similarity"], tuple(most * step / ADAPTIVE_RATIOS for step in steps))
    else:
        if schedule == "auto":
            schedule = "steps" if values["torch_compile"] else "cosine"
        ratio = schedule_by_name(schedule, most)
    level = values["max_downsample"]
    return ToMeConfig(
        ratio=ratio,
        mode=values["method"],
        max_downsample=finest_level(unet_of(model)) if level == "auto" else level,
        layers=values["layers"],
        gate="on" if values["gate"] else "off",
    )


def checked_layers(value: Any) -> str | list[str]:
    """One of ``LAYERS``, ``"block"``, or a list of several.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, str | list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"layers is a name or a list of names, not {value!r}")
    layers = ToMeConfig(layers=cast(Any, value)).layers
    if layers == "block":
        return "block"
    return layers[0] if len(layers) == 1 else [*layers]
