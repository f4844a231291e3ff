"""The part of a layer of TensorFlow 1 that needs no data: its variables, made or found by its first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import layout as layouts
from .. import options as core
from ..errors import must
from . import _graph
from ._graph import GraphKeys, RegularizationLoss, Reuse, Variable, VariableScope, get_collection
from ._normalization import Settings
from ._scopes import variable_scope
from ._variables import get_variable
from .tf_nn import FUSED_EPSILON


class LayerVariables:
    """What `tf_layers.BatchNormalization` keeps."""

    axis: Any
    momentum: float
    epsilon: float
    center: bool
    scale: bool
    renorm: bool
    fused: bool
    trainable: bool
    virtual_batch_size: int | None
    adjustment: Any
    _options: core.Options
    _reuse: Reuse
    _activation: Any
    _dtype: np.dtype[Any] | None
    _base_name: str
    _scope: VariableScope | None
    _collections: Callable[[str], list[str] | None]  # where new variables go, by their names in the layer
    _variables: dict[str, Variable]
    _losses: list[RegularizationLoss]
    _settings: Settings | None
    _graph: _graph.Graph | None
    _ndim: int

    _order: tuple[str, ...] = ("gamma", "beta")

    @property
    def built(self) -> bool:
        """Whether the variables exist."""
        return self._settings is not None

    @property
    def scope_name(self) -> str:
        """Name of the scope that the variables are in; the first call finds it."""
        if self._scope is None:
            raise ValueError(must("the layer", "be called before it has a scope", "one that was not"))
        return self._scope.name

    def build(self, input_shape: Sequence[int | None], dtype: DTypeLike | None = None) -> None:
        """Make the variables, or find them; the first call does that by itself.

        Parameters
        ----------
        input_shape : sequence of ints or None
            Shape of the inputs; only the number of channels must be known.
        dtype : {"float32", "float64"}, optional
            For a layer that has none of its own.

        Raises
        ------
        ValueError
            If an axis or a virtual_batch_size does not fit, the number of channels is unknown, or a variable exists
            that must not, or the reverse.
        """
        shape = tuple(input_shape)
        if any(shape[axis] is None for axis in layouts.channel_axes(self.axis, None, len(shape))):
            raise ValueError(must("input_shape", f"say how many channels there are on axis {self.axis}", shape))
        known = tuple(0 if extent is None else extent for extent in shape)
        with _graph.graph().attempt():
            self._build(known, np.dtype(np.float32) if dtype is None else np.dtype(dtype))

    def _build(self, input_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        axes = layouts.channel_axes(self.axis, None, len(input_shape))
        fused = self.fused and self._fusable(axes, len(input_shape))
        shape: tuple[int, ...] = tuple(n if a in axes else 1 for a, n in enumerate(input_shape))
        if self.virtual_batch_size is not None:
            if 0 in axes:
                raise ValueError(must("axis", "not be that of the samples with virtual_batch_size", repr(self.axis)))
            shape = (shape[0], 1, *shape[1:])  # TensorFlow splits the first axis in two
        elif len(axes) == 1:
            shape = (input_shape[axes[0]],)
        settings = Settings(
            axes=tuple(sorted(axes)),
            momentum=self.momentum,
            epsilon=max(self.epsilon, FUSED_EPSILON) if fused else self.epsilon,
            ddof=int(fused),
            options=self._options,
            activation=self._activation,
        )
        if self._scope is None:
            named = bool(self._reuse)
            with variable_scope(self._base_name if named else None, self._base_name) as scope:
                self._scope = scope
        variables, losses = self._made(shape, self._dtype or dtype, self._scope)
        self._variables, self._losses = variables, losses
        self.fused = fused
        self._ndim = len(input_shape)
        self._settings = settings
        self._graph = _graph.graph()

    def _fusable(self, axes: tuple[int, ...], ndim: int) -> bool:
        plain = not self.renorm and self.virtual_batch_size is None and self.adjustment is None
        return plain and ndim == 4 and axes in ((1,), (3,))

    def _made(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], scope: VariableScope
    ) -> tuple[dict[str, Variable], list[RegularizationLoss]]:
        """Return the variables by name, in TensorFlow's order, and the penalties of new ones."""
        existing = set(_graph.graph().variables)
        made: dict[str, Variable] = {}
        with variable_scope(scope, reuse=self._reuse):
            for name in self._order:
                if self.scale if name == "gamma" else self.center:
                    made[name] = get_variable(
                        name,
                        shape,
                        dtype,
                        getattr(self, f"{name}_initializer"),
                        getattr(self, f"{name}_regularizer"),
                        self.trainable,
                        self._collections(name),
                        getattr(self, f"{name}_constraint"),
                    )
            for name in ("moving_mean", "moving_variance"):
                made[name] = get_variable(
                    name,
                    shape,
                    dtype,
                    getattr(self, f"{name}_initializer"),
                    trainable=False,
                    collections=self._collections(name),
                )
            renormalizer = self._options.renormalizer()
            if renormalizer is not None:
                first = renormalizer.create(made["moving_mean"].value, made["moving_variance"].value)
                for name in renormalizer.names:
                    made[name] = get_variable(
                        name,
                        first[name].shape,
                        dtype,
                        first[name],
                        trainable=False,
                        collections=self._collections(name),
                    )
        new = [v for v in made.values() if v.regularizer is not None and v.op_name not in existing]
        listed = get_collection(GraphKeys.REGULARIZATION_LOSSES)
        return made, [loss for loss in listed if getattr(loss, "variable", None) in new]

    @property
    def gamma(self) -> Variable | None:
        """Scale, or None."""
        return self._variables.get("gamma")

    @property
    def beta(self) -> Variable | None:
        """Shift, or None."""
        return self._variables.get("beta")

    @property
    def moving_mean(self) -> Variable | None:
        """Moving mean; None before the first call."""
        return self._variables.get("moving_mean")

    @property
    def moving_variance(self) -> Variable | None:
        """Moving variance; None before the first call."""
        return self._variables.get("moving_variance")

    @property
    def variables(self) -> list[Variable]:
        """gamma, beta, moving_mean and moving_variance, in this order, as far as the layer has them."""
        return list(self._variables.values())

    @property
    def trainable_variables(self) -> list[Variable]:
        """gamma and beta; none if the layer is not trainable."""
        return [v for n, v in self._variables.items() if self.trainable and n in ("gamma", "beta")]

    @property
    def non_trainable_variables(self) -> list[Variable]:
        """The others."""
        trainable = self.trainable_variables
        return [v for v in self.variables if v not in trainable]

    @property
    def losses(self) -> list[RegularizationLoss]:
        """The penalties of gamma and beta, as far as there are such."""
        return list(self._losses)
