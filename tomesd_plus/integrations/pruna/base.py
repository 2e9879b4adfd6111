"""What the algorithms have in common: how they refuse, and how they are saved and loaded."""

import warnings
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from pruna.algorithms.base.pruna_base import PrunaAlgorithmBase
from pruna.config.smash_config import SmashConfig, SmashConfigPrefixWrapper
from pruna.engine.save import SAVE_FUNCTIONS
from pruna.logging.logger import pruna_logger

from tomesd_plus.dispatch import merging_report

NEEDED = "import tomesd_plus.integrations.pruna before loading this model"
"""What a KeyError says where a saved model is loaded without the plug-in.

Pruna looks up by name, in order, what it is to apply again: so a name that says what to do stands first."""


class TomesdPlus(PrunaAlgorithmBase):
    """What the three algorithms have in common."""

    save_fn = SAVE_FUNCTIONS.reapply
    tokenizer_required: bool = False
    processor_required: bool = False
    dataset_required: bool = False
    runs_on: ClassVar[list[str]] = ["cpu", "cuda", "mps"]

    def model_check_fn(self, model: Any) -> bool:
        """
        Check if the model has what the algorithm works on; the log says what it lacks.

        Parameters
        ----------
        model : Any
            The model to check.

        Returns
        -------
        bool
            True if the model is a valid model for the algorithm, False otherwise.
        """
        try:
            self._look_at(model)
        except TypeError as error:
            pruna_logger.error(f"{self.algorithm_name}: {error}.")
            return False
        return True

    def apply(self, model: Any, smash_config: SmashConfig) -> Any:
        """
        Apply the algorithm, and have a saved model name this plug-in where it is missing.

        Parameters
        ----------
        model : Any
            The model to apply the algorithm to.
        smash_config : SmashConfig
            The SmashConfig object containing the save and load functions.

        Returns
        -------
        Any
            The model after the algorithm has been applied.
        """
        smash_config.reapply_after_load[NEEDED] = True
        return super().apply(model, smash_config)

    def _pre_smash_hook(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        """
        Refuse, before anything is changed, what hyperparameters say together, and a model that was smashed already.

        Parameters
        ----------
        model : Any
            The model to be smashed.
        smash_config : SmashConfigPrefixWrapper
            The hyperparameters.
        """
        try:
            self._check(model, smash_config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.algorithm_name}: {error}") from error

    def _apply(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> Any:
        """
        Switch on what the hyperparameters say; warnings go to Pruna's log, for `smash` and loading hide warnings.

        Parameters
        ----------
        model : Any
            The model to apply the algorithm to.
        smash_config : SmashConfigPrefixWrapper
            The hyperparameters.

        Returns
        -------
        Any
            The same model.
        """
        with warnings.catch_warnings(record=True) as told:
            warnings.filterwarnings("always", module=r"tomesd_plus\.")
            try:
                self._switch_on(model, smash_config)
            finally:
                for each in told:
                    pruna_logger.warning(f"{self.algorithm_name}: {each.message}")
        return model

    def _refuse_idle(self, smash_config: SmashConfigPrefixWrapper, names: Iterable[str], why: str) -> None:
        """Raise ValueError if one of these hyperparameters is not its default; ``why`` says they have no effect."""
        defaults = {each.name: each.default_value for each in self.get_hyperparameters()}
        given = [name for name in names if smash_config[name] != defaults[name]]
        if given:
            raise ValueError(f"{why}, so leave out {' and '.join(given)}")

    @abstractmethod
    def _look_at(self, model: Any) -> None:
        """Raise TypeError if the model has nothing to work on."""

    @abstractmethod
    def _check(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        """Raise TypeError or ValueError if the algorithm cannot be applied."""

    @abstractmethod
    def _switch_on(self, model: Any, smash_config: SmashConfigPrefixWrapper) -> None:
        """Change the model as the hyperparameters say."""


def refuse_merged(model: Any) -> None:
    """Raise ValueError if merging is on already."""
    try:
        merging_report(model)
    except ValueError:
        return
    raise ValueError(
        "token merging is on in this model already: call tomesd_plus.remove_token_merging on it first, or load it anew"
    )
