"""Keras: its ``BatchNormalization`` on NumPy arrays.

The layer has the arguments, defaults, order of weights, modes and numbers of Keras 3 (``keras.layers``), which are
those of TensorFlow 2 but for several axes, fused kernels and virtual batches. All arithmetic is the core layer's.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks, regularizers
from .. import layout as layouts
from ..errors import must
from ..layer import BatchNorm
from . import _keras_config, _weights
from ._keras_arguments import Arguments, policy

Array = NDArray[Any]

_numbers = itertools.count()


def _next_name() -> str:
    number = next(_numbers)
    return f"batch_normalization_{number}" if number else "batch_normalization"


class _Last(threading.local):
    """The type of data that the core layer had in this thread's last call; a copy of the layer begins anew."""

    dtype: str | None = None

    def __reduce__(self) -> Any:
        return _Last, ()


class BatchNormalization(Arguments):
    """``keras.layers.BatchNormalization`` on NumPy arrays.

    A layer with ``trainable=False`` infers, whatever ``training`` says. ``training=None`` means False.

    Parameters
    ----------
    axis : int, default: -1
        The channel axis.
    momentum : float, default: 0.99
        Share of the old moving value that is kept.
    epsilon : float, default: 1e-3
        Added to the variance.
    center, scale : bool, default: True
        Whether there is a beta, a gamma.
    beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer : str, dict or callable
        Names ("zeros"), configurations or objects of Keras, or functions of shape and dtype. Seeds are not used.
    beta_regularizer, gamma_regularizer : str, dict or callable, optional
        "L1", "L2", "L1L2", configurations or objects of Keras, or functions of the array; see `losses`.
    beta_constraint, gamma_constraint : str, dict or callable, optional
        "non_neg", "unit_norm", "max_norm", "min_max_norm", configurations or objects of Keras, or functions of the
        array; see `apply_constraints`.
    renorm : bool, default: False
        Train by batch renormalization.
    renorm_clipping : dict, optional
        Bounds rmin, rmax and dmax; a missing one is no bound.
    renorm_momentum : float, default: 0.99
        Of the averages of batch renormalization.
    synchronized : bool, default: False
        Must be False: there is one device.
    trainable : bool, default: True
        False freezes the layer, which infers then.
    dtype : str, optional
        The policy: "float32" (the default), "float64", "mixed_float16" or "mixed_bfloat16". Floating point inputs are
        cast to its data type, as Keras does.
    name : str, optional
        By default "batch_normalization", with a number from the second on.

    Attributes
    ----------
    built : bool
        Whether the weights exist.
    grads : dict
        "gamma" and "beta" after `backward`, as far as the layer has them.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.5, epsilon=0.0)
    >>> layer(np.array([[1.0], [3.0]], np.float32), training=True)
    array([[-1.],
           [ 1.]], dtype=float32)
    >>> layer.get_weights()[2:]
    [array([1.], dtype=float32), array([1.], dtype=float32)]
    """

    supports_masking = True

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        trainable: bool = True,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        if momentum is None:
            raise TypeError(must("momentum", "be a real number", "None"))
        if checks.flag(synchronized, "synchronized"):
            raise ValueError(must("synchronized", "be False: there is one device", True))
        self._policy = policy(dtype)
        given = {
            "beta_initializer": beta_initializer,
            "gamma_initializer": gamma_initializer,
            "moving_mean_initializer": moving_mean_initializer,
            "moving_variance_initializer": moving_variance_initializer,
            "beta_regularizer": beta_regularizer,
            "gamma_regularizer": gamma_regularizer,
            "beta_constraint": beta_constraint,
            "gamma_constraint": gamma_constraint,
        }
        self._core = BatchNorm(
            axis=_keras_config.axis(axis),
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            **{argument: _keras_config.read(argument, value) for argument, value in given.items()},
            renorm=renorm,
            renorm_clipping=renorm_clipping if renorm else None,
            renorm_momentum=renorm_momentum,
            trainable=trainable,
            dtype=self.variable_dtype,
            name=name,
        )
        self.name = _next_name() if name is None else name
        self._renorm_clipping = None if renorm_clipping is None else dict(renorm_clipping)
        if renorm and self._renorm_clipping is None:
            self._renorm_clipping = {}
        self._ndim: int | None = None
        self._last = _Last()

    @property
    def core(self) -> BatchNorm:
        """The layer of fastbn that does the work."""
        return self._core

    # -- weights -----------------------------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self._core.built

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Create the weights; the first call does that by itself.

        Parameters
        ----------
        input_shape : sequence of ints or None
            Shape of a batch; only the number of channels must be known.

        Raises
        ------
        ValueError
            If there is no channel axis in the shape, its size is unknown, or the layer is built already.
        """
        shape = tuple(input_shape)
        (channel,) = layouts.channel_axes(self._core.axis, None, len(shape))
        channels = shape[channel]
        if channels is None:
            raise ValueError(must("input_shape", f"say how many channels there are on axis {self.axis}", shape))
        self._core.build(channels)
        self._ndim = len(shape)

    def _named(self) -> dict[str, Array]:
        """Return the weights themselves by name, in the order of Keras; empty before building."""
        core = self._core
        if not core.built:
            return {}
        plain = {n: getattr(core, n) for n in _keras_config.ORDER[:4]}
        everything = {n: v for n, v in plain.items() if v is not None} | core.renorm_state
        return {n: everything[n] for n in _keras_config.ORDER if n in everything}

    def _existing(self) -> dict[str, Array]:
        """Return the same, but refuse a layer that is not built."""
        named = self._named()
        if not named:
            raise ValueError("the layer must be built by a call or by build(input_shape), got one that is not")
        return named

    @property
    def gamma(self) -> Array | None:
        """The scale itself; None without one, and before building."""
        return self._named().get("gamma")

    @property
    def beta(self) -> Array | None:
        """The shift itself; None without one, and before building."""
        return self._named().get("beta")

    @property
    def moving_mean(self) -> Array | None:
        """The moving mean itself; None before building."""
        return self._named().get("moving_mean")

    @property
    def moving_variance(self) -> Array | None:
        """The moving variance itself; None before building."""
        return self._named().get("moving_variance")

    @property
    def moving_stddev(self) -> Array | None:
        """The moving standard deviation itself, of batch renormalization; None without it, and before building."""
        return self._named().get("moving_stddev")

    @property
    def renorm_mean(self) -> Array | None:
        """The average of the means itself, of batch renormalization; None without it, and before building."""
        return self._named().get("renorm_mean")

    @property
    def renorm_stddev(self) -> Array | None:
        """The average of the deviations itself, of batch renormalization; None without it, and before building."""
        return self._named().get("renorm_stddev")

    @property
    def weights(self) -> list[Array]:
        """All weights, themselves: gamma, beta, moving_mean, moving_variance; then those of renorm."""
        return list(self._named().values())

    @property
    def trainable_weights(self) -> list[Array]:
        """Gamma and beta, as far as there are; empty for a frozen layer."""
        return [v for n, v in self._named().items() if n in _keras_config.TRAINABLE and self.trainable]

    @property
    def non_trainable_weights(self) -> list[Array]:
        """The moving statistics; all weights of a frozen layer."""
        return [v for n, v in self._named().items() if n not in _keras_config.TRAINABLE or not self.trainable]

    variables = weights
    trainable_variables = trainable_weights
    non_trainable_variables = non_trainable_weights

    def get_weights(self) -> list[Array]:
        """Return copies of all weights, in the order of `weights`."""
        return [v.copy() for v in self.weights]

    def set_weights(self, weights: Sequence[ArrayLike]) -> None:
        """Set all weights, or none if one of them does not fit.

        Parameters
        ----------
        weights : sequence of array_like
            In the order of `weights`.

        Raises
        ------
        ValueError
            If the layer is not built, their number or a shape differs, or a variance is negative.
        """
        named = self._existing()
        values = list(weights)
        if len(values) != len(named):
            raise ValueError(must("weights", f"be {len(named)} arrays ({', '.join(named)})", len(values)))
        found = {n: _weights.array(v, n) for n, v in zip(named, values)}
        self._core.load_state_dict({**found, "batches": self._core.batches})

    def count_params(self) -> int:
        """Return how many numbers the weights have.

        Raises
        ------
        ValueError
            If the layer is not built.
        """
        return sum(v.size for v in self._existing().values())

    @property
    def losses(self) -> list[float]:
        """The penalties of the regularizers, gamma's first; empty for a frozen layer."""
        core = self._core
        found = ((getattr(core, f"{n}_regularizer"), getattr(self, n), n) for n in _keras_config.TRAINABLE)
        return [
            regularizers.loss(regularizer, value, f"{n}_regularizer")
            for regularizer, value, n in found
            if regularizer is not None and value is not None and self.trainable
        ]

    def apply_constraints(self) -> None:
        """Project gamma and beta as their constraints say; Keras does that after each step of an optimizer."""
        self._core.apply_constraints()

    # -- calling -----------------------------------------------------------------------------------------------------

    def __call__(self, inputs: ArrayLike, training: bool | None = None, mask: ArrayLike | None = None) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        inputs : array_like
            The batch. What is floating point is cast to `compute_dtype`, integers to `variable_dtype`.
        training : bool, optional
            Whether to normalize with, and learn from, this batch. None means False.
        mask : array_like of bool, optional
            Of the shape of the inputs without their last axis. Where it is False, values take no part in the
            statistics; they are normalized all the same, and may be NaN.

        Returns
        -------
        ndarray
            Of the shape of the inputs and of `compute_dtype`.

        Raises
        ------
        TypeError, ValueError
            If a type, a shape or the number of axes does not fit; nothing has changed then.
        """
        x = checks.as_array(inputs, "inputs")
        if x.dtype.kind not in "iufb" and x.dtype.name != "bfloat16":
            raise TypeError(must("inputs", "be real numbers", x.dtype))
        if self._ndim is not None and x.ndim != self._ndim:
            raise ValueError(must("inputs", f"have {self._ndim} axes, as the layer was built with", x.ndim))
        options: dict[str, Any] = {}
        if mask is not None:
            weights = _mask(mask, x.shape)
            if self._core.mode(training) == "train":  # otherwise there are no statistics that it could be for
                options["mask"] = weights
        # A mixed policy would round integers before they are normalized.
        dtype = self.variable_dtype if x.dtype.kind in "iub" else self.compute_dtype
        y = self._core(_cast(x, dtype), training, **options)
        self._ndim, self._last.dtype = x.ndim, dtype
        return _cast(y, self.compute_dtype)

    call = __call__

    def backward(self, dy: ArrayLike) -> Array:
        """Return the gradient of the last call with respect to its inputs, and set `grads`.

        Parameters
        ----------
        dy : array_like
            Gradient with respect to the result, cast to `compute_dtype`.

        Returns
        -------
        ndarray
            dx, of `compute_dtype`. Penalties of regularizers take no part.
        """
        given = _cast(checks.as_array(dy, "dy"), self.compute_dtype)
        dx = self._core.backward(_cast(given, self._last.dtype or self.compute_dtype))
        return _cast(dx, self.compute_dtype)

    @property
    def grads(self) -> dict[str, Array]:
        """Gradients of gamma and beta after `backward`, as far as there are."""
        return self._core.grads

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the shape of the result, which is that of the inputs.

        Parameters
        ----------
        input_shape : sequence of ints or None
            Shape of a batch.

        Returns
        -------
        tuple
            The same.

        Raises
        ------
        ValueError
            If there is no channel axis in it.
        """
        shape = tuple(input_shape)
        layouts.channel_axes(self._core.axis, None, len(shape))
        return shape

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """Return the mask for the layers that follow, which is the one that came in.

        Parameters
        ----------
        inputs : object
            Not looked at.
        previous_mask : object, optional
            The mask.

        Returns
        -------
        object
            The mask.
        """
        return previous_mask

    # -- configuration -----------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the arguments as Keras serializes them; Keras makes a layer like this one from it."""
        core = self._core
        policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": self._policy}}
        return {
            "name": self.name,
            "trainable": core.trainable,
            "dtype": policy | {"registered_name": None},
            "axis": core.axis,
            "momentum": core.momentum,
            "epsilon": core.epsilon,
            "center": core.center,
            "scale": core.scale,
            **{argument: _keras_config.write(argument, getattr(core, argument)) for argument in _keras_config.NAMED},
            "synchronized": self.synchronized,
            "renorm": core.renorm,
            "renorm_clipping": self.renorm_clipping,
            "renorm_momentum": core.renorm_momentum,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return a layer from a configuration, this class's or Keras's own.

        Parameters
        ----------
        config : mapping
            As `get_config` returns it.

        Returns
        -------
        BatchNormalization
            A new layer, not built.

        Raises
        ------
        ValueError
            If there is an entry that the layer does not know. What the first layer of a tf.keras model says about the
            model's inputs (``batch_input_shape``) is left out.
        """
        return cls(**_keras_config.arguments(config))

    def __repr__(self) -> str:
        """Show the name and whether it is built."""
        return f"<BatchNormalization name={self.name}, built={self.built}>"


def _cast(x: Array, dtype: str) -> Array:
    """Cast to the data type of a policy; what fastbn reads as float32 by itself stays."""
    if x.dtype.name == dtype or (dtype == "float32" and x.dtype.name in ("uint8", "int8")):
        return x
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16

        return x.astype(bfloat16, order="K")
    return x.astype(dtype, order="K")


def _mask(value: Any, shape: tuple[int, ...]) -> Array:
    """Return a mask over values: without the last axis of the inputs it says the same for all of that."""
    mask = checks.as_array(value, "mask")
    if mask.ndim != len(shape) - 1:
        raise ValueError(must("mask", f"have {len(shape) - 1} axes, one less than the inputs", mask.ndim))
    if any(n not in (1, wanted) for n, wanted in zip(mask.shape, shape)):
        raise ValueError(must("mask", f"have shape {shape[:-1]}", mask.shape))
    return np.broadcast_to(mask.astype(bool)[..., np.newaxis], shape)
