"""Token merging in transformers' vision towers, as an algorithm of Pruna."""

from collections.abc import Iterable
from typing import Any, ClassVar

from ConfigSpace import CategoricalHyperparameter, UniformFloatHyperparameter, UniformIntegerHyperparameter
from pruna.algorithms.base.tags import AlgorithmTag as tags
from pruna.config.hyperparameters import Boolean
from pruna.config.smash_config import SmashConfigPrefixWrapper

from tomesd_plus.dispatch import apply_token_merging
from tomesd_plus.integrations.pruna.base import TomesdPlus, refuse_merged
from tomesd_plus.vision.config import DEFAULT_R, TowerConfig
from tomesd_plus.vision.methods import METHODS
from tomesd_plus.vision.towers import towers_of


class TomeVision(TomesdPlus):
    """
    Merge tokens in transformers' vision towers: ViT, DeiT, CLIP, SigLIP, DINOv2 and DINOv3, bare or inside a model.

    Each layer merges the tokens that are most alike, so that the layers after it run on fewer. Outputs keep their
    shapes.
    """

    algorithm_name: str = "tome_vision"
    group_tags: ClassVar[list[tags]] = [tags.PRUNER]
    references: ClassVar[dict[str, str]] = {
        "Paper": "https://arxiv.org/abs/2210.09461",
        "EViT": "https://arxiv.org/abs/2202.07800",
        "ATS": "https://arxiv.org/abs/2111.15667",
        "GitHub": "https://github.com/facebookresearch/ToMe",
    }
    compatible_before: ClassVar[Iterable[str]] = ["half", "torchao", "torch_dynamic", "torch_unstructured"]
    compatible_after: ClassVar[Iterable[str]] = ["torch_compile"]

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
                choices=list(METHODS),
                default_value="merging",
                meta={
                    "desc": "'merging' averages tokens that are alike; 'evit' keeps what the class token attends to "
                    "and fuses the rest; 'ats' samples tokens by what they add to the class token."
                },
            ),
            UniformIntegerHyperparameter(
                "r",
                lower=0,
                upper=1024,
                default_value=DEFAULT_R,
                meta={"desc": "Tokens to remove in each layer. Higher is faster, less close."},
            ),
            UniformFloatHyperparameter(
                "inflection",
                lower=-1.0,
                upper=1.0,
                default_value=0.0,
                meta={"desc": "Whether r falls (-1) or grows (1) from layer to layer, around the same mean."},
            ),
            UniformFloatHyperparameter(
                "reduction_ratio",
                lower=0.0,
                upper=0.99,
                default_value=0.0,
                meta={"desc": "Above 0, in place of r: the share of the patches to remove, evenly over the layers."},
            ),
            Boolean(
                "adaptive",
                default=False,
                meta={"desc": "In place of r: as many tokens as are in fact alike, or as the method 'ats' meets."},
            ),
            UniformFloatHyperparameter(
                "similarity",
                lower=-1.0,
                upper=1.0,
                default_value=0.9,
                meta={"desc": "Where merging is adaptive: the cosine similarity from which on tokens are merged."},
            ),
        ]

    def _look_at(self, model: Any) -> None:
        towers_of(model)

    def _check(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        method = smash_config["method"]
        if smash_config["adaptive"]:
            why = "adaptive says how much is removed"
            self._refuse_idle(smash_config, ["r", "inflection", "reduction_ratio"], why)
        elif smash_config["reduction_ratio"]:
            self._refuse_idle(smash_config, ["r", "inflection"], "reduction_ratio says how much is removed")
        if not smash_config["adaptive"] or method == "ats":
            self._refuse_idle(smash_config, ["similarity"], "similarity is for adaptive merging")
        tower_options(smash_config)
        if METHODS[method].needs_class_token and not all(tower.prefix for tower in towers_of(model)):
            raise ValueError(
                f"the method {method!r} looks at the class token, and a tower of this model has none: take 'merging'"
            )
        refuse_merged(model)

    def _switch_on(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        apply_token_merging(model, **tower_options(smash_config))


def tower_options(values: Any) -> dict[str, Any]:
    """The options of ``tome_vision``, checked.

    Raises:
        ValueError: The method cannot be adaptive.
    """
    method, r, ratio = values["method"], values["r"], values["reduction_ratio"]
    options: dict[str, Any] = {"method": method}
    if values["adaptive"]:
        if method != "ats":
            options["similarity"] = values["similarity"]
    elif ratio:
        options["ratio"] = ratio
    else:
        options["r"] = (r, values["inflection"]) if values["inflection"] else r
    TowerConfig(**options)
    return options
