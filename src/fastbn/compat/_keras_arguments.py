"""The arguments of Keras's layer as its attributes, and its policies of types."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..errors import must
from ..layer import BatchNorm

# The types of data and of weights of a policy.
_POLICIES: Final = {
    "float32": ("float32", "float32"),
    "float64": ("float64", "float64"),
    "mixed_float16": ("float16", "float32"),
    "mixed_bfloat16": ("bfloat16", "float32"),
}


def policy(value: Any) -> str:
    """Return the name of a policy for a name, a dtype, a policy of Keras, or its configuration."""
    if value is None:
        return "float32"
    if isinstance(value, Mapping):
        config = value.get("config")
        value = config.get("name") if isinstance(config, Mapping) else value
    if not isinstance(value, str):
        value = getattr(value, "name", None) or np.dtype(value).name
    if value not in _POLICIES:
        raise ValueError(must("dtype", "be one of " + ", ".join(_POLICIES), repr(value)))
    return str(value)


def _of_core(name: str, doc: str) -> property:
    """Return an argument as the core layer has it."""

    def value(layer: Arguments) -> Any:
        return getattr(layer._core, name)

    return property(value, doc=doc)


class Arguments:
    """What `keras.BatchNormalization` says about its arguments: most are the core layer's."""

    _core: BatchNorm
    _policy: str
    _renorm_clipping: dict[str, float] | None

    @property
    def axis(self) -> int:
        """The channel axis."""
        return operator.index(self._core.axis)  # type: ignore[arg-type]  # one axis, see _keras_config.axis

    @property
    def momentum(self) -> float:
        """Share of the old moving value that is kept."""
        assert self._core.momentum is not None
        return self._core.momentum

    @property
    def epsilon(self) -> float:
        """What is added to the variance."""
        return self._core.epsilon

    @property
    def center(self) -> bool:
        """Whether there is a beta."""
        return self._core.center

    @property
    def scale(self) -> bool:
        """Whether there is a gamma."""
        return self._core.scale

    @property
    def renorm(self) -> bool:
        """Whether training is batch renormalization."""
        return self._core.renorm

    @property
    def renorm_clipping(self) -> dict[str, float] | None:
        """Bounds of batch renormalization; None where none were given, and without it."""
        return None if self._renorm_clipping is None else dict(self._renorm_clipping)

    @property
    def synchronized(self) -> bool:
        """False: there is one device."""
        return False

    renorm_momentum = _of_core("renorm_momentum", "Of the averages of batch renormalization.")
    beta_initializer = _of_core("beta_initializer", "First values of beta, in fastbn's form.")
    gamma_initializer = _of_core("gamma_initializer", "First values of gamma, in fastbn's form.")
    moving_mean_initializer = _of_core("moving_mean_initializer", "First values of the moving mean, in fastbn's form.")
    moving_variance_initializer = _of_core(
        "moving_variance_initializer", "First values of the moving variance, in fastbn's form."
    )
    beta_regularizer = _of_core("beta_regularizer", "The penalty of beta, in fastbn's form; None without one.")
    gamma_regularizer = _of_core("gamma_regularizer", "The penalty of gamma, in fastbn's form; None without one.")
    beta_constraint = _of_core("beta_constraint", "The projection of beta, in fastbn's form; None without one.")
    gamma_constraint = _of_core("gamma_constraint", "The projection of gamma, in fastbn's form; None without one.")

    @property
    def trainable(self) -> bool:
        """Whether the layer learns; False freezes it, and it infers."""
        return self._core.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._core.trainable = value

    @property
    def dtype(self) -> str:
        """The type of the weights."""
        return self.variable_dtype

    @property
    def variable_dtype(self) -> str:
        """The type of the weights."""
        return _POLICIES[self._policy][1]

    @property
    def compute_dtype(self) -> str:
        """The type that floating point inputs are cast to, and of the result."""
        return _POLICIES[self._policy][0]
