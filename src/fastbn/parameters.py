"""What a layer holds: options, parameters, moving statistics, and what follows from them alone."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import averages, checks, constraints, initializers, normalization, regularizers
from .errors import must
from .kernels import _channels
from .options import Adjustment, Options
from .renorm import Renorm

Array = NDArray[Any]


class Arrays(NamedTuple):
    """The arrays of a layer that is built, as far as it has them."""

    gamma: Array | None
    beta: Array | None
    moving_mean: Array | None
    moving_variance: Array | None
    shape: tuple[int, ...]
    extra: dict[str, Array]  # of batch renormalization, by name


PLAIN_ARRAYS = Arrays._fields[:4]
NOT_NEGATIVE = ("moving_variance", "moving_stddev", "renorm_stddev", "renorm_mean_weight", "renorm_stddev_weight")


class Parameters:
    """The part of `BatchNorm` that needs no data."""

    axis: int | tuple[int, ...]
    layout: str | None
    epsilon: float
    center: bool
    scale: bool
    dtype: np.dtype[Any] | None
    _momentum: float | None
    _trainable: bool
    _arrays: Arrays | None
    _options: Options
    _renorm: Renorm | None
    _lock: threading.Lock

    @property
    def momentum(self) -> float | None:
        """Share of the old moving value that is kept; None for the mean of all batches."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = averages.momentum(value)

    @property
    def trainable(self) -> bool:
        """Whether the layer learns; False freezes it."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = checks.flag(value, "trainable")

    def freeze(self) -> Self:
        """Make the layer infer whatever ``training`` says; `backward` goes on to work.

        Returns
        -------
        BatchNorm
            This layer, with ``trainable`` False.
        """
        self._trainable = False
        return self

    def unfreeze(self) -> Self:
        """Make the layer learn again.

        Returns
        -------
        BatchNorm
            This layer, with ``trainable`` True.
        """
        self._trainable = True
        return self

    @property
    def zero_debias(self) -> bool | str:
        """Whether moving averages are those from 0 divided by their weight; "mean" for that of the mean alone."""
        return self._options.zero_debias

    @property
    def track(self) -> bool:
        """Whether there are moving statistics."""
        return self._options.track

    @property
    def on_nonfinite(self) -> str:
        """What batch statistics that are not finite do to the moving ones."""
        return self._options.on_nonfinite

    @property
    def renorm(self) -> bool:
        """Whether training is batch renormalization."""
        return self._options.renorm

    @property
    def renorm_clipping(self) -> dict[str, float] | None:
        """Bounds of r and d, a copy."""
        bounds = self._options.renorm_clipping
        return None if bounds is None else dict(bounds)

    @property
    def renorm_momentum(self) -> float:
        """Share of the old value that the averages of batch renormalization keep."""
        return self._options.renorm_momentum

    @property
    def renorm_scheme(self) -> str:
        """Which averages batch renormalization keeps."""
        return self._options.renorm_scheme

    @property
    def renorm_state(self) -> dict[str, Array]:
        """The arrays of batch renormalization by name, themselves; empty without it."""
        return {} if self._arrays is None else dict(self._arrays.extra)

    @property
    def virtual_batch_size(self) -> int | None:
        """Rows that are normalized together in training."""
        return self._options.virtual_batch_size

    @property
    def virtual_groups(self) -> str:
        """Which rows those are."""
        return self._options.virtual_groups

    @property
    def allow_incomplete(self) -> bool:
        """Whether a last group may have fewer rows."""
        return self._options.allow_incomplete

    @property
    def adjustment(self) -> Adjustment | None:
        """What gives scale and shift of the normalized values in training."""
        return self._options.adjustment

    # -- building ----------------------------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Whether the arrays exist."""
        return self._arrays is not None

    def build(self, num_features: int | tuple[int, ...], dtype: DTypeLike | None = None) -> None:
        """Create parameters and statistics; the first call does that by itself.

        Parameters
        ----------
        num_features : int or tuple of ints
            Number of channels, or the shape of the parameters.
        dtype : {"float32", "float64"}, optional
            For a layer that has none of its own.

        Raises
        ------
        ValueError
            If the layer is built already.
        """
        shape = feature_shape(num_features)
        arrays = self._created(shape, np.dtype(np.float32) if dtype is None else parameter_dtype(dtype))
        with self._lock:
            if self._arrays is not None:
                raise ValueError(must("num_features", "not be given to a layer that is built", num_features))
            self._arrays = arrays

    def _created(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Arrays:
        dtype = self.dtype or dtype
        gamma, beta, mean, variance = (
            initializers.create(getattr(self, f"{name}_initializer"), f"{name}_initializer", shape, dtype)
            if has
            else None
            for name, has in zip(PLAIN_ARRAYS, self._has)
        )
        if variance is not None and not (variance >= 0).all():
            raise ValueError(must("moving_variance_initializer", "return no negative number", variance.min()))
        extra = {}
        if self._renorm is not None and mean is not None and variance is not None:
            extra = self._renorm.create(mean, variance)
        return Arrays(gamma, beta, mean, variance, shape, extra)

    @property
    def _has(self) -> tuple[bool, bool, bool, bool]:
        """Which of the plain arrays there are."""
        return self.scale, self.center, self.track, self.track

    def _named(self, arrays: Arrays) -> dict[str, Array]:
        """Return the arrays themselves by name."""
        return {n: v for n, v in zip(PLAIN_ARRAYS, arrays[:4]) if v is not None} | arrays.extra

    def _existing(self) -> Arrays:
        if self._arrays is None:
            raise ValueError("the layer must be built by a call or by build(num_features), got one that is not")
        return self._arrays

    def _tracked(self) -> tuple[Array, Array]:
        arrays = self._existing()
        if arrays.moving_mean is None or arrays.moving_variance is None:
            raise ValueError(must("track", "be True in a layer whose moving statistics are needed", "False"))
        return arrays.moving_mean, arrays.moving_variance

    @property
    def gamma(self) -> Array | None:
        """Scale, initially 1. Assigning writes into the array."""
        return None if self._arrays is None else self._arrays.gamma

    @gamma.setter
    def gamma(self, value: ArrayLike) -> None:
        self._assign("gamma", value)

    @property
    def beta(self) -> Array | None:
        """Shift, initially 0. Assigning writes into the array."""
        return None if self._arrays is None else self._arrays.beta

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        self._assign("beta", value)

    @property
    def moving_mean(self) -> Array:
        """Moving mean, initially 0. Assigning writes into the array."""
        return self._tracked()[0]

    @moving_mean.setter
    def moving_mean(self, value: ArrayLike) -> None:
        self._assign("moving_mean", value)

    @property
    def moving_variance(self) -> Array:
        """Moving variance, initially 1. Assigning writes into the array; no number may be negative."""
        return self._tracked()[1]

    @moving_variance.setter
    def moving_variance(self, value: ArrayLike) -> None:
        self._assign("moving_variance", value)

    def _assign(self, name: str, value: ArrayLike) -> None:
        target = getattr(self._existing(), name)
        if target is None:
            raise ValueError(must(name, "not be set in a layer built without it", "an array"))
        if value is not target:  # `layer.gamma -= step` has written already
            source = checks.required(value, name, target.shape)
            if name in NOT_NEGATIVE:
                checks.not_negative(source, name)
            with self._lock:
                target[...] = source.reshape(target.shape)

    @property
    def variables(self) -> list[Array]:
        """gamma, beta, moving_mean and moving_variance, as far as the layer has them, then `renorm_state`."""
        return [] if self._arrays is None else list(self._named(self._arrays).values())

    # -- what follows --------------------------------------------------------------------------------------------------

    def affine(self) -> tuple[Array, Array]:
        """Return what inference does as ``y = scale * x + shift``, without activation and residual.

        Returns
        -------
        scale : ndarray of shape (channels,)
            ``gamma / sqrt(moving_variance + epsilon)``, computed in float64 and rounded once to the layer's dtype.
        shift : ndarray of shape (channels,)
            ``beta - moving_mean * scale``, in the same way.

        Raises
        ------
        ValueError
            If the layer is not built, or keeps no moving statistics.

        Examples
        --------
        >>> import fastbn
        >>> bn = fastbn.BatchNorm(1, epsilon=0.0)
        >>> bn.moving_mean = [3.0]
        >>> bn.moving_variance = [4.0]
        >>> bn.affine()
        (array([0.5], dtype=float32), array([-1.5], dtype=float32))
        """
        moving_mean, moving_variance = self._tracked()
        with self._lock:
            mean, variance = moving_mean.astype(np.float64), moving_variance.astype(np.float64)
        # Inference of 0 and of a step, so that a variance of 0 is treated alike.
        deviation = np.sqrt(variance + self.epsilon)
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation != 0)
        if self.gamma is not None:
            scale = scale * self.gamma
        shift = -mean * scale
        if self.beta is not None:
            shift = shift + self.beta
        return scale.astype(moving_mean.dtype), shift.astype(moving_mean.dtype)

    def denormalize(self, y: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the x that inference makes y of; see `fastbn.denormalize`.

        Parameters
        ----------
        y : array_like of float16, bfloat16, float32, float64, uint8 or int8
            What inference gave, before activation and residual.
        out : array, optional
            Where to write the result; may be y itself.

        Returns
        -------
        ndarray
            x, of y's shape, dtype and order of axes in memory, but float32 for uint8 and int8.

        Raises
        ------
        TypeError, ValueError
            As in `fastbn.denormalize`.
        """
        moving_mean, moving_variance = self._tracked()
        with self._lock:
            mean, variance = moving_mean.copy(), moving_variance.copy()
        return normalization.denormalize(
            y,
            mean,
            variance,
            gamma=self.gamma,
            beta=self.beta,
            epsilon=self.epsilon,
            axis=self.axis,
            layout=self.layout,
            out=out,
        )

    def regularization_loss(self) -> float:
        """Return the sum of the penalties on gamma and beta; 0 without regularizers.

        Returns
        -------
        float
            In float64. It is part of neither `backward` nor `grads`: `regularization_gradients` has its gradient.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(3, gamma_regularizer=("l2", 0.5)).regularization_loss()
        1.5
        """
        return sum(
            regularizers.loss(getattr(self, f"{n}_regularizer"), getattr(self, n), f"{n}_regularizer")
            for n in ("gamma", "beta")
        )

    def regularization_gradients(self) -> dict[str, Array]:
        """Return the gradient of `regularization_loss`, to be added to `grads`.

        Returns
        -------
        dict
            "gamma" and "beta", as far as they have a regularizer. The derivative of an absolute value at 0 is 0.

        Raises
        ------
        TypeError
            If a regularizer is a function without a method ``gradient(array)``.
        """
        found = {
            n: regularizers.gradient(getattr(self, f"{n}_regularizer"), getattr(self, n), f"{n}_regularizer")
            for n in ("gamma", "beta")
        }
        return {n: g for n, g in found.items() if g is not None}

    def apply_constraints(self) -> None:
        """Project gamma and beta, as their constraints say, in place; for after an optimizer's step.

        Raises
        ------
        TypeError, ValueError
            If a function returns something else than an array of the parameter's shape. Nothing has changed then.
        """
        new = []
        for name in ("gamma", "beta"):
            constraint, array = getattr(self, f"{name}_constraint"), getattr(self, name)
            if constraint is not None and array is not None:
                checks.writable(array, name)
                new.append((array, constraints.projected(constraint, array, f"{name}_constraint")))
        with self._lock:
            _channels.put(new)


def features(shape: tuple[int, ...]) -> int | tuple[int, ...]:
    return shape[0] if len(shape) == 1 else shape


def feature_shape(num_features: Any) -> tuple[int, ...]:
    sizes = num_features if isinstance(num_features, tuple) else (num_features,)
    if not sizes:
        raise ValueError(must("num_features", "have at least one axis", "()"))
    return tuple(checks.count(n, "num_features") for n in sizes)


def parameter_dtype(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    try:
        given: np.dtype[Any] = np.dtype(dtype)
    except (SyntaxError, TypeError, ValueError):  # of a string with brackets, and of fields of one name
        raise TypeError(must(name, "be float32 or float64", repr(dtype))) from None
    if given not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(must(name, "be float32 or float64", given))
    return given
