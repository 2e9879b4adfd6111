"""A hyperparameter of Pruna's configurations that takes whatever a check accepts."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ConfigSpace.hyperparameters.distributions import ConstantVectorDistribution
from ConfigSpace.hyperparameters.hyperparameter import Hyperparameter

Check = Callable[[Any], Any]


class Checked(Hyperparameter):
    """A hyperparameter whose values are what a check makes of them; each configuration keeps its own.

    Pruna's ``UnconstrainedHyperparameter`` keeps one value, that of the latest configuration, for all of them.

    Parameters
    ----------
    name : str
        The name of the hyperparameter.
    check : Callable[[Any], Any]
        Brings a value to the form that is kept, which JSON can hold, or raises ValueError with a sentence.
    default_value : Any
        The default value of the hyperparameter, in that form.
    meta : Any
        The metadata for the hyperparameter.
    """

    def __init__(self, name: str, check: Check, default_value: Any = None, meta: Any = None) -> None:
        super().__init__(
            name=name,
            default_value=default_value,
            vector_dist=ConstantVectorDistribution(np.float64(0)),  # to draw a value is to take the default
            transformer=_Numbered(check, [default_value]),
            neighborhood=_no_neighbours,
            size=1,
            neighborhood_size=0,
            value_cast=None,
            meta=meta,
        )

    def legal_value(self, value: Any) -> Any:
        """Return True, or raise the check's ValueError."""
        return self._transformer.legal_value_single(value)

    def to_vector(self, value: Any) -> Any:
        """Return the number of a value."""
        return np.float64(self._transformer.number(value))


def _no_neighbours(*_: Any, **__: Any) -> Any:
    return np.empty(0)


@dataclass
class _Numbered:
    """Numbers values in the order of their coming: ConfigSpace's configurations hold numbers only.

    Two are equal that check alike: those of copied configurations may have seen other values since.
    """

    lower_vectorized, upper_vectorized = np.float64(0), np.float64(np.inf)

    check: Check
    values: list[Any] = field(compare=False)

    def number(self, value: Any) -> int:
        kept = self.check(value)
        if kept not in self.values:
            self.values.append(kept)
        return self.values.index(kept)

    def to_value(self, vector: Any) -> Any:
        found = np.empty(len(vector), dtype=object)
        for index, number in enumerate(vector):
            found[index] = copy.deepcopy(self.values[int(number)])  # each configuration may change its own
        return found

    def to_vector(self, value: Any) -> Any:
        return np.array([self.number(each) for each in value], dtype=np.float64)

    def legal_value(self, value: Any) -> Any:
        return np.array([self.legal_value_single(each) for each in value])

    def legal_value_single(self, value: Any) -> bool:
        self.check(value)
        return True

    def legal_vector(self, vector: Any) -> Any:
        return np.array([self.legal_vector_single(each) for each in vector])

    def legal_vector_single(self, number: Any) -> bool:
        return 0 <= number < len(self.values)
