"""The feature cache, skipped calls and presets, as an algorithm of Pruna."""

import json
from collections.abc import Iterable
from typing import Any, ClassVar

from ConfigSpace import CategoricalHyperparameter, UniformFloatHyperparameter, UniformIntegerHyperparameter
from pruna.algorithms.base.tags import AlgorithmTag as tags
from pruna.config.hyperparameters import Boolean
from pruna.config.smash_config import SmashConfigPrefixWrapper

from tomesd_plus.caching import FeatureCacheConfig
from tomesd_plus.caching.cache import feature_cache_on
from tomesd_plus.host.models import denoiser_of, unet_of
from tomesd_plus.integrations.pruna.base import TomesdPlus, refuse_merged
from tomesd_plus.integrations.pruna.checked import Checked
from tomesd_plus.presets import PRESETS, Preset, apply_preset, preset_by_name, preset_from


class TomeCache(TomesdPlus):
    """
    Run the denoiser in full on some steps only, and on the others its outer layers, or nothing.

    What is left out follows the trend of the last full steps. A preset says what runs at which step, and what merges
    there; its content is saved with the model.
    """

    algorithm_name: str = "tome_cache"
    group_tags: ClassVar[list[tags]] = [tags.CACHER]
    references: ClassVar[dict[str, str]] = {
        "DeepCache": "https://arxiv.org/abs/2312.00858",
        "TaylorSeer": "https://arxiv.org/abs/2503.06923",
    }
    compatible_before: ClassVar[Iterable[str]] = ["qkv_diffusers", "torchao", "torch_dynamic", "tome_sd"]
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
            UniformIntegerHyperparameter(
                "interval",
                lower=1,
                upper=50,
                default_value=3,
                meta={"desc": "A full step every so many steps - 1 disables caching. Higher is faster, less close."},
            ),
            UniformFloatHyperparameter(
                "forecast",
                lower=0.0,
                upper=1.0,
                default_value=0.85,
                meta={
                    "desc": "How far skipped layers follow the trend of the last two full steps: 0 as DeepCache; "
                    "closest near 1 at an interval of 2, and near 0.85 beyond."
                },
            ),
            CategoricalHyperparameter(
                "skip",
                choices=["layers", "calls"],
                default_value="layers",
                meta={
                    "desc": "What the steps between leave out: the inner layers of a UNet, or whole calls, of any "
                    "denoiser, whose outputs are forecast. Calls are faster, and less close."
                },
            ),
            Checked(
                "preset",
                checked_preset,
                meta={
                    "desc": "In place of the others: 'quality', 'balanced' or 'fast', or what tomesd_plus.tune has "
                    "found: the Preset, its file's path, or the file's content, as which it is saved with the model."
                },
            ),
            Boolean(
                "force",
                default=False,
                meta={"desc": "Keep a preset by name also where it is refused: at few steps, or with some solvers."},
            ),
        ]

    def _look_at(self, model: Any) -> None:
        denoiser_of(model)

    def _check(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        chosen = smash_config["preset"]
        if chosen is not None:
            given = "a preset says what runs at which step"
            self._refuse_idle(smash_config, ["interval", "forecast", "skip"], given)
        elif smash_config["skip"] == "calls":
            self._refuse_idle(smash_config, ["forecast"], "what skipped calls give is always forecast")
        if not isinstance(chosen, str):
            self._refuse_idle(smash_config, ["force"], "force keeps a preset by name where it is refused")
        preset = preset_of(smash_config)
        if preset.merging is not None:
            if smash_config["tome_sd"]:
                raise ValueError("the preset merges tokens itself, so leave out tome_sd, or give an interval instead")
            refuse_merged(model)
        if preset.cache is not None and preset.cache.skips_layers:
            unet_of(model)
        if feature_cache_on(denoiser_of(model)) is not None:
            raise ValueError(
                "a feature cache is on in this model already: call tomesd_plus.remove_feature_cache on it first, or "
                "load it anew"
            )

    def _switch_on(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        chosen = smash_config["preset"]
        by_name = isinstance(chosen, str)  # which is refused at some steps
        apply_preset(model, chosen if by_name else preset_of(smash_config), force=smash_config["force"])


def preset_of(values: Any) -> Preset:
    """What ``tome_cache`` switches on."""
    chosen = values["preset"]
    if chosen is None:
        skips_calls = values["skip"] == "calls"
        cache = FeatureCacheConfig(
            values["interval"],
            branch="nothing" if skips_calls else 0,
            forecast=0.0 if skips_calls else values["forecast"],
        )
        return Preset(f"a full step every {values['interval']}", None, cache, merging_inside=None)
    return preset_by_name(chosen) if isinstance(chosen, str) else _from_content(chosen)


def checked_preset(value: Any) -> Any:
    """A preset as it is saved: its name if it has one, or the content of its file, as JSON has it.

    Raises:
        ValueError: There is no such name or file, or it holds no preset.
    """
    if value is None or (isinstance(value, str) and value in PRESETS):
        return value
    preset = _from_content(value) if isinstance(value, dict) else preset_from(value)
    return json.loads(preset.to_json())


def _from_content(content: dict[str, Any]) -> Preset:
    """A preset from its file's content."""
    where = "what is given as preset"
    try:
        text = json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be JSON: {error}") from error
    return Preset.from_json(text, where)
