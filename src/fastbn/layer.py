"""The layer: parameters, moving statistics, modes, and their life."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import activation as activations
from . import (
    averages,
    checks,
    composite,
    constraints,
    functional,
    initializers,
    modes,
    options,
    passes,
    regularizers,
    state,
)
from . import layout as layouts
from .composite import Batch, Composite
from .constraints import Constraint
from .errors import StateError, UntrainedWarning, must
from .initializers import Initializer
from .kernels import _calls
from .moments import Moments, moments
from .regularizers import Regularizer

Array = NDArray[Any]


class _Arrays(NamedTuple):
    gamma: Array | None
    beta: Array | None
    moving_mean: Array | None
    moving_variance: Array | None
    shape: tuple[int, ...]
    extra: dict[str, Array]  # of batch renormalization, by name


_PLAIN_ARRAYS = _Arrays._fields[:4]


class Record:
    """What a data set brings to a layer, for `recompute_statistics`."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.batches = 0
        self.shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype(np.float32)

    def add(self, layer: BatchNorm, x: Array) -> None:
        """Add a batch; one without values changes nothing."""
        shape = layouts.channel_shape(x.shape, layouts.channel_axes(layer.axis, layer.layout, x.ndim))
        wanted = layer._arrays.shape if layer._arrays is not None else self.shape or shape
        if shape != wanted:
            raise ValueError(must("x", f"have {_features(wanted)} channels", _features(shape)))
        if x.size:
            self._take(x, shape, moments(x, axis=layer.axis, layout=layer.layout))

    def take(self, x: Array, shape: tuple[int, ...], batch: Batch) -> None:
        """Add a batch whose moments are known."""
        self._take(x, shape, batch.moments())

    def _take(self, x: Array, shape: tuple[int, ...], found: Moments) -> None:
        if not self.batches:
            self.shape, self.dtype = shape, checks.parameter_dtype(x.dtype)
        self.moments.merge(found)
        self.batches += 1

    def check(self, layer: BatchNorm) -> None:
        """Refuse statistics that are not finite where the layer does."""
        finite = np.isfinite(self.moments.mean) & np.isfinite(self.moments.m2)
        if layer.on_nonfinite == "raise" and not finite.all():
            where = f"others in channel {int(np.argmin(finite))}"
            raise ValueError(must("batches", 'have finite statistics with on_nonfinite="raise"', where))

    def store(self, layer: BatchNorm) -> None:
        """Set the statistics of the layer."""
        if not layer.built:
            layer.build(_features(self.shape), self.dtype)
        mean, variance = self.moments.mean, self.moments.variance(layer.ddof)
        taken = None
        if layer.on_nonfinite == "skip":
            taken = np.isfinite(mean) & np.isfinite(variance)
        arrays = layer._existing()
        moving_mean, moving_variance = layer._tracked()
        with layer._lock:
            averages.blend(moving_mean, mean, 0.0, taken)
            averages.blend(moving_variance, variance, 0.0, taken)
            if layer._renorm is not None:
                layer._renorm.follow(arrays.extra, moving_variance, layer.epsilon)
            layer.batches = self.batches


# In a forked child another thread's lock would stay locked for ever.
_alive: weakref.WeakSet[BatchNorm] = weakref.WeakSet()


def _unlock_after_fork() -> None:
    for layer in _alive:
        layer._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


class BatchNorm:
    """Batch normalization with parameters and moving statistics.

    Follows Keras: a layer with ``trainable=False`` infers, whatever ``training`` says.

    =============  ====================  =========================  =====================================
    mode           normalizes with       writes moving statistics   when
    =============  ====================  =========================  =====================================
    ``train``      this batch            yes                        ``training=True``, ``trainable=True``
    ``inference``  moving statistics     no                         otherwise
    ``batch``      this batch            no                         ``track=False``
    =============  ====================  =========================  =====================================

    Parameters
    ----------
    num_features : int or tuple of ints, optional
        Number of channels (the shape of the parameters, with several channel axes); by default that of the first
        batch.
    axis : int or tuple of ints, default: -1
        The channel axis.
    layout : str, optional
        Names the channel axis instead, as in `batch_norm`.
    momentum : float or None, default: 0.99
        Share of the OLD moving value that is kept. PyTorch's momentum is the other share. With None the moving
        statistics are the means over all batches, each with the same weight.
    epsilon : float, default: 1e-3
        Added to the variance.
    center, scale : bool, default: True
        Whether there is a beta, a gamma.
    ddof : {0, 1}, default: 0
        The variance that goes into ``moving_variance`` is divided by m - ddof.
    zero_debias : bool or "mean", default: False
        Whether moving statistics are averages from 0 divided by the sum of their weights, ``1 - momentum**t`` after t
        batches: early ones are not drawn to the initial values. "mean" does that to the mean alone.
    track : bool, default: True
        False keeps no moving statistics: every call normalizes with its batch.
    on_nonfinite : {"propagate", "raise", "skip"}, default: "propagate"
        What to do with a training batch whose mean or variance is infinite or NaN in a channel: take it as it is, raise
        before anything is written (this reads the batch twice), or leave the moving statistics of that channel
        as they are.
    renorm : bool, default: False
        Batch renormalization: in training, ``y = (x_hat * r + d) * gamma + beta``, where r and d lead from the
        statistics of the batch to averages over earlier batches. Constants for the gradient.
    renorm_clipping : mapping, optional
        Bounds of r and d: any of "rmin", "rmax" and "dmax".
    renorm_momentum : float, default: 0.99
        Share of the old value that those averages keep.
    renorm_scheme : {"keras", "tf1"}, default: "keras"
        The averages that Keras and TensorFlow 2 keep, or those of `tf.layers`.
    virtual_batch_size : int, optional
        Ghost batches: in training, groups of so many rows are normalized, each by its own statistics. The moving
        statistics learn the mean over groups of means and of variances, by numbers of rows.
    virtual_groups : {"contiguous", "strided"}, default: "contiguous"
        Group g of G holds neighbouring rows, or, as in TensorFlow, the rows g, g + G, g + 2G and so on.
    allow_incomplete : bool, default: False
        Whether rows that are left over may be a last group; otherwise they are an error.
    adjustment : callable, optional
        Gets the shape of x and returns (scale, shift), of the parameters' shape or None: in training,
        ``y = (x_hat * scale + shift) * gamma + beta``. Random ones regularize.
    beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer : str, tuple or callable
        First values: "zeros", "ones", "constant", "random_normal", "random_uniform" or "truncated_normal", a tuple of a
        name and its numbers as in ("constant", 0.5), or a function of shape and dtype.
    beta_regularizer, gamma_regularizer : str, tuple or callable, optional
        Penalties of `regularization_loss`: "l1", "l2", "l1_l2", ("l2", 0.001), or a function of the array.
    beta_constraint, gamma_constraint : str, tuple or callable, optional
        Projections of `apply_constraints`: "non_neg", "unit_norm", "max_norm", "min_max_norm", ("max_norm", 3.0), or a
        function of the array.
    activation : str or tuple, optional
        Applied to the result in the same pass, as in `batch_norm`.
    dtype : {"float32", "float64"}, optional
        Of parameters and statistics. By default float32, or float64 if the layer is built by a float64 batch.
    trainable : bool, default: True
        False freezes the layer.
    name : str, optional
        For the user.

    Attributes
    ----------
    grads : dict
        "gamma" and "beta" after `backward`, as far as the layer has them, and "residual" if the call had one.
    batches : int
        Batches that reached the moving statistics.

    Notes
    -----
    Threads may share a layer: no update is lost, and each thread has the gradient of its own last call. To that end
    the layer refers to the last batch of each thread until its next call.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm(momentum=0.5, epsilon=0.0)
    >>> bn(np.array([[1.0], [3.0]]), training=True)
    array([[-1.],
           [ 1.]])
    >>> bn.moving_mean, bn.moving_variance
    (array([1.]), array([1.]))
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...] | None = None,
        *,
        axis: int | tuple[int, ...] = -1,
        layout: str | None = None,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        ddof: int = 0,
        zero_debias: bool | Literal["mean"] = False,
        track: bool = True,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        renorm_scheme: Literal["keras", "tf1"] = "keras",
        virtual_batch_size: int | None = None,
        virtual_groups: Literal["contiguous", "strided"] = "contiguous",
        allow_incomplete: bool = False,
        adjustment: options.Adjustment | None = None,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        moving_mean_initializer: Initializer = "zeros",
        moving_variance_initializer: Initializer = "ones",
        beta_regularizer: Regularizer | None = None,
        gamma_regularizer: Regularizer | None = None,
        beta_constraint: Constraint | None = None,
        gamma_constraint: Constraint | None = None,
        activation: str | tuple[str, float] | None = None,
        dtype: DTypeLike | None = None,
        trainable: bool = True,
        name: str | None = None,
    ) -> None:
        self.axis = layouts.checked_axis(axis, layout)
        self.layout = layout
        self.momentum = averages.momentum(momentum)
        self.epsilon = checks.epsilon(epsilon)
        self.center = checks.flag(center, "center")
        self.scale = checks.flag(scale, "scale")
        self.ddof = checks.ddof(ddof)
        self._options = options.checked(
            ddof=self.ddof,
            zero_debias=zero_debias,
            track=track,
            on_nonfinite=on_nonfinite,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            renorm_scheme=renorm_scheme,
            virtual_batch_size=virtual_batch_size,
            virtual_groups=virtual_groups,
            allow_incomplete=allow_incomplete,
            adjustment=adjustment,
        )
        self._renorm = self._options.renormalizer()
        self.beta_initializer = initializers.checked(beta_initializer, "beta_initializer")
        self.gamma_initializer = initializers.checked(gamma_initializer, "gamma_initializer")
        self.moving_mean_initializer = initializers.checked(moving_mean_initializer, "moving_mean_initializer")
        self.moving_variance_initializer = initializers.checked(
            moving_variance_initializer, "moving_variance_initializer"
        )
        self.beta_regularizer = regularizers.checked(beta_regularizer, "beta_regularizer")
        self.gamma_regularizer = regularizers.checked(gamma_regularizer, "gamma_regularizer")
        self.beta_constraint = constraints.checked(beta_constraint, "beta_constraint")
        self.gamma_constraint = constraints.checked(gamma_constraint, "gamma_constraint")
        self.activation = activations.named(activation)
        self.dtype = None if dtype is None else _parameter_dtype(dtype)
        self._trainable = checks.flag(trainable, "trainable")
        if name is not None and not isinstance(name, str):
            raise TypeError(must("name", "be a string or None", repr(name)))
        self.name = name
        self.grads: dict[str, Array] = {}
        self.batches = 0
        self._arrays: _Arrays | None = None
        self._may_warn = True
        self._lock = threading.Lock()
        _alive.add(self)
        self._last = threading.local()  # the cache of each thread's last call
        self._recorder: Record | None = None
        self._direct = self._may_be_direct()
        if num_features is not None:
            self.build(num_features)

    def _may_be_direct(self) -> bool:
        """Whether a training call is one pass and a plain update; a subclass may decide about modes by itself."""
        return self._options.plain and self._recorder is None and type(self).mode is BatchNorm.mode

    def _record(self, record: Record | None) -> None:
        """Add what comes in to a record, and learn nothing; None ends that."""
        self._recorder = record
        self._direct = self._may_be_direct()

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
    def adjustment(self) -> options.Adjustment | None:
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
        shape = _feature_shape(num_features)
        arrays = self._created(shape, np.dtype(np.float32) if dtype is None else _parameter_dtype(dtype))
        with self._lock:
            if self._arrays is not None:
                raise ValueError(must("num_features", "not be given to a layer that is built", num_features))
            self._arrays = arrays

    def _created(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Arrays:
        dtype = self.dtype or dtype
        gamma, beta, mean, variance = (
            initializers.create(getattr(self, f"{name}_initializer"), f"{name}_initializer", shape, dtype)
            if has
            else None
            for name, has in zip(_PLAIN_ARRAYS, self._has)
        )
        if variance is not None and not (variance >= 0).all():
            raise ValueError(must("moving_variance_initializer", "return no negative number", variance.min()))
        extra = {}
        if self._renorm is not None and mean is not None and variance is not None:
            extra = self._renorm.create(mean, variance)
        return _Arrays(gamma, beta, mean, variance, shape, extra)

    @property
    def _has(self) -> tuple[bool, bool, bool, bool]:
        """Which of the plain arrays there are."""
        return self.scale, self.center, self.track, self.track

    def _named(self, arrays: _Arrays) -> dict[str, Array]:
        """Return the arrays themselves by name."""
        return {n: v for n, v in zip(_PLAIN_ARRAYS, arrays[:4]) if v is not None} | arrays.extra

    def _existing(self) -> _Arrays:
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
        """Moving variance, initially 1. Assigning writes into the array."""
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
            with self._lock:
                target[...] = source.reshape(target.shape)

    @property
    def variables(self) -> list[Array]:
        """gamma, beta, moving_mean and moving_variance, as far as the layer has them, then `renorm_state`."""
        return [] if self._arrays is None else list(self._named(self._arrays).values())

    # -- calling -----------------------------------------------------------------------------------------------------

    def mode(self, training: bool | None = None) -> modes.Mode:
        """Return the mode of a call.

        Parameters
        ----------
        training : bool, optional
            None means False.

        Returns
        -------
        {"train", "inference", "batch"}
            As in Keras, which never is in mode "batch"; that is for layers with ``track=False``, which always are.
        """
        if not self._options.track:
            return modes.TORCH[training is not None and checks.flag(training, "training"), False]
        return modes.KERAS[training is not None and checks.flag(training, "training"), self.trainable]

    def __call__(
        self,
        x: ArrayLike,
        training: bool | None = None,
        *,
        residual: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        x : array_like of float16, bfloat16, float32, float64, uint8 or int8
            The batch.
        training : bool, optional
            Whether to normalize with, and learn from, the statistics of this batch. None means False.
        residual : array_like of x's shape and dtype, optional
            Added before the activation.
        out : array, optional
            Where to write the result. If that is x itself there is no gradient of this call, nor if it is a residual
            that the gradient of the activation needs, as in `batch_norm_forward`.

        Returns
        -------
        ndarray
            y, of x's shape, dtype and order of axes in memory, but float32 for uint8 and int8.

        Raises
        ------
        TypeError, ValueError
            As in `batch_norm`; nothing has changed then.

        Warns
        -----
        UntrainedWarning
            If inference uses statistics that no batch ever reached.
        """
        arrays = self._arrays
        plain = self._direct and self.activation is None and residual is None
        if plain and arrays is not None and type(x) is np.ndarray and x.size <= passes.SERIAL:
            y = self._call_small(x, training, arrays, out)
            if y is not None:
                return y
        mode = self.mode(training)
        data = checks.data(x, "x")
        if arrays is None:
            axes = layouts.channel_axes(self.axis, self.layout, data.ndim)
            arrays = self._created(layouts.channel_shape(data.shape, axes), checks.parameter_dtype(data.dtype))
        if not self._direct and (mode != "inference" or self._recorder is not None):
            return self._call_composite(data, arrays, mode, training is not None and bool(training), residual, out)
        with self._lock:  # a mean and a variance of the same moment
            assert arrays.moving_mean is not None
            assert arrays.moving_variance is not None
            mean, variance = arrays.moving_mean.copy(), arrays.moving_variance.copy()
        y, cache = passes.forward(
            data,
            gamma=arrays.gamma,
            beta=arrays.beta,
            moving_mean=mean,
            moving_variance=variance,
            training=mode == "train",
            momentum=0.0,
            epsilon=self.epsilon,
            axis=self.axis,
            layout=self.layout,
            ddof=self.ddof,
            update=False,
            activation=self.activation,
            residual=residual,
            out=out,
            keep="unless in place",
        )
        assert cache is not None
        if mode == "inference":
            self._warn_if_untrained(mean, variance)
        with self._lock:
            if self._arrays is None:
                self._arrays = arrays
            if mode == "train" and data.size:
                kept = self._tracked()
                count = layouts.values_per_channel(data.shape, cache.axes)
                share = averages.share(self.momentum, self.batches)
                passes.store_moving(*kept, cache.statistics, count, share, self.ddof)
                self.batches += 1
        self._last.cache = cache
        return y

    def _call_small(self, x: Array, training: Any, arrays: _Arrays, out: Any) -> Array | None:
        """Call, where everything plainly fits; otherwise return None, and nothing has happened.

        A small batch holds the lock all the time: two more copies of the statistics would cost more than that.
        """
        train = training is True and self._trainable
        if not (training is None or type(training) is bool) or (not train and self._may_warn and not self.batches):
            return None
        gamma, beta, mean, variance, _, _ = arrays
        axis = layouts.plain_axis(self.axis, self.layout, x)
        with self._lock:
            if self._arrays is not arrays:
                return None
            result = _calls.forward(
                x, gamma, beta, mean, variance, train, self.momentum, self.epsilon, axis, self.ddof, True, out,
                True, True, passes.team, passes.SERIAL,
            )  # fmt: skip
            if result is None:
                return None
            self.batches += train
        y: Array
        y, self._last.cache = result
        return y

    def _call_composite(
        self, x: Array, arrays: _Arrays, mode: modes.Mode, training: bool, residual: Any, out: Any
    ) -> Array:
        """Call, where it normalizes with the batch and there is more to do than one pass."""
        recorder = self._recorder
        # Without training the batch is normalized as a whole, by nothing but its statistics.
        trains = recorder is None and (training or mode == "train")
        chosen = self._options
        correction = None
        if trains and self._renorm is not None:
            with self._lock:
                before = {name: array.copy() for name, array in arrays.extra.items()}
            correction = partial(self._renorm.correction, before, epsilon=self.epsilon)
        with np.errstate(all="ignore"):
            y, last, batch = composite.forward(
                x,
                gamma=arrays.gamma,
                beta=arrays.beta,
                epsilon=self.epsilon,
                axis=self.axis,
                layout=self.layout,
                ddof=self.ddof,
                activation=self.activation,
                residual=residual,
                out=out,
                groups=chosen.groups(x, self.axis, self.layout) if trains else None,
                correction=correction,
                adjustment=chosen.adjusted(x, self.axis, self.layout) if trains else None,
                finite=mode == "train" and chosen.on_nonfinite == "raise",
            )
            with self._lock:
                if self._arrays is None:
                    self._arrays = arrays
                if x.size and recorder is not None:
                    recorder.take(x, self._arrays.shape, batch)
                elif x.size and mode == "train":
                    self._learn(self._arrays, batch)
        self._last.cache = last
        return y

    def _learn(self, arrays: _Arrays, batch: Batch) -> None:
        """Take a batch into the moving statistics; the lock is held."""
        assert arrays.moving_mean is not None
        assert arrays.moving_variance is not None
        taken = None
        if self._options.on_nonfinite == "skip":
            finite = np.isfinite(batch.statistics.mean) & np.isfinite(batch.statistics.variance)
            if not finite.any():
                return
            taken = None if finite.all() else finite
        mean, variance = arrays.moving_mean, arrays.moving_variance
        if self._renorm is not None:
            share = averages.share(self.momentum, self.batches)
            self._renorm.update(arrays.extra, mean, variance, batch.statistics, self.epsilon, share, taken)
        else:
            debias = self._options.zero_debias
            share = averages.share(self.momentum, self.batches, zero_debias=bool(debias))
            averages.blend(mean, batch.statistics.mean, share, taken)
            share = averages.share(self.momentum, self.batches, zero_debias=debias is True)
            averages.blend(variance, batch.variance, share, taken)
        self.batches += 1

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the gradient of this thread's last call, and set `grads`.

        Parameters
        ----------
        dy : array_like of y's shape and dtype
            Gradient with respect to y.
        out : array, optional
            Where to write the result; may be dy itself.

        Returns
        -------
        ndarray
            dx. A frozen layer, or one that inferred, gives ``gamma / sqrt(moving_variance + epsilon) * dy``.

        Raises
        ------
        ValueError
            If there was no call before, or it overwrote what its gradient needs.
        """
        cache = getattr(self._last, "cache", None)
        if cache is None:
            raise ValueError("backward must follow a call of the layer in the same thread, got none")
        if type(cache) is tuple:  # of a small call, which does not wait for it to be built
            cache = passes.Cache(*cache)
        if type(cache) is Composite:
            dx, dgamma, dbeta, *others = cache.backward(dy, out)
        else:
            dx, dgamma, dbeta, *others = functional.batch_norm_backward(dy, cache, out=out)
        grads = {"gamma": dgamma if self.scale else None, "beta": dbeta if self.center else None}
        self.grads = {name: g for name, g in grads.items() if g is not None}
        if others:
            self.grads["residual"] = others[0]
        return dx

    def _warn_if_untrained(self, mean: Array, variance: Array) -> None:
        if self._may_warn and not self.batches and not mean.any() and (variance == 1).all() and mean.size:
            self._may_warn = False
            warnings.warn(
                f"{self!r} normalizes with moving statistics that no batch has reached: mean 0, variance 1. "
                "Call it with training=True first, or load a state.",
                UntrainedWarning,
                stacklevel=3,
            )

    # -- parameters --------------------------------------------------------------------------------------------------

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
        return functional.denormalize(
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
                new.append((array, constraints.projected(constraint, array, f"{name}_constraint")))
        with self._lock:
            for array, value in new:
                array[...] = value

    # -- state -------------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make a layer like this one, without its arrays.

        Returns
        -------
        dict
            All values fit JSON, but for functions that were given as arguments.
        """
        return {
            "axis": self.axis,
            "layout": self.layout,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "ddof": self.ddof,
            **{n: dict(v) if isinstance(v, dict) else v for n, v in self._options._asdict().items()},
            **{name: getattr(self, name) for name in _BY_NAME},
            "activation": self.activation,
            "dtype": None if self.dtype is None else self.dtype.name,
            "trainable": self.trainable,
            "name": self.name,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the arrays by name, and the number of batches as "batches"; empty before building."""
        with self._lock:
            if self._arrays is None:
                return {}
            arrays = {n: v.copy() for n, v in self._named(self._arrays).items()}
            return arrays | {"batches": self.batches}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, all of it or nothing.

        Parameters
        ----------
        state_dict : mapping
            As `state_dict` returns it; "batches" may be missing. A layer that is not built is built by it.

        Raises
        ------
        TypeError
            If a value has no fitting dtype.
        ValueError
            If a name is missing or unknown, a shape differs, or a variance is negative.
        """
        needed = {n for n, has in zip(_PLAIN_ARRAYS, self._has) if has}
        if self._renorm is not None:
            needed |= set(self._renorm.names)
        if not state_dict and not self.built:
            return
        if set(state_dict) - {"batches"} != needed:
            names = ", ".join(sorted(map(str, state_dict))) or "none"
            raise ValueError(must("state_dict", "have the names " + ", ".join(sorted(needed)), names))
        batches = checks.count(state_dict.get("batches", 0), "batches")
        target = self._arrays
        if target is None:
            named = next((n for n in ("moving_mean", "gamma", "beta") if n in needed), None)
            if named is None:  # neither parameters nor statistics: there is nothing to build
                return
            first = checks.as_array(state_dict[named], named)
            target = self._created(_feature_shape(first.shape), _parameter_dtype(first.dtype, named))
        arrays = self._named(target)
        new = {}
        for name in needed:
            shape = arrays[name].shape
            new[name] = checks.required(state_dict[name], name, shape).reshape(shape)
            if name in _NOT_NEGATIVE and (new[name] < 0).any():
                raise ValueError(must(name, "not be negative", new[name].min()))
        with self._lock:
            for name, value in new.items():
                arrays[name][...] = value
            self._arrays = target
            self.batches = batches
            self._may_warn = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write arguments and arrays to an .npz file, atomically: it is whole, or as it was before.

        Parameters
        ----------
        path : path
            The file; no extension is added.

        Raises
        ------
        ValueError
            If the layer is not built.
        TypeError
            If one of its arguments is a function, which no file can hold.
        OSError
            If the file cannot be written.
        """
        self._existing()
        for name, value in self.get_config().items():
            if callable(value):
                raise TypeError(must(name, "not be a function in a layer that is saved", repr(value)))
        arrays = self.state_dict()
        batches = arrays.pop("batches")
        state.write_state(path, "batch_norm", {"config": self.get_config(), "batches": batches}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the layer that `save` wrote.

        Parameters
        ----------
        path : path
            The file. It is read with suspicion: nothing in it is executed.

        Returns
        -------
        BatchNorm
            A new layer.

        Raises
        ------
        StateError
            If the file is damaged, foreign, or makes no sense.
        OSError
            If it cannot be read.
        """
        fields, arrays = state.read_state(path, "batch_norm", fields=("config", "batches"))
        config = fields["config"]
        try:
            # Older files have fewer arguments; those of version 0.1.0 are in every one.
            if not isinstance(config, dict) or not _FIRST <= set(config) <= set(_DEFAULTS):
                raise ValueError("config must have exactly the arguments of a layer, got others")
            config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
            layer = cls(**config)
            layer.load_state_dict(arrays | {"batches": fields["batches"]})
        except (TypeError, ValueError, OverflowError) as error:
            raise StateError(f"{os.fspath(path)}: {error}") from error
        if layer.track:
            state.check_statistics(path, layer.moving_mean.reshape(-1), layer.moving_variance.reshape(-1))
        for name, array in layer.renorm_state.items():
            if not np.isfinite(array).all():
                raise StateError(f"{os.fspath(path)}: {name} must be finite")
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: arguments and arrays, not the last batch."""
        return {"config": self.get_config(), "state": self.state_dict(), "may_warn": self._may_warn}

    def __setstate__(self, content: dict[str, Any]) -> None:
        """Restore from a pickle, checked like any other state."""
        self.__init__(**content["config"])  # type: ignore[misc]
        self.load_state_dict(content["state"])
        self._may_warn = content["may_warn"]

    def __repr__(self) -> str:
        """Show the number of channels and every argument that is not the default."""
        shown = [] if self._arrays is None else [repr(_features(self._arrays.shape))]
        shown += [f"{k}={v!r}" for k, v in self.get_config().items() if v != _DEFAULTS[k]]
        return f"BatchNorm({', '.join(shown)})"


_BY_NAME = (
    "beta_initializer",
    "gamma_initializer",
    "moving_mean_initializer",
    "moving_variance_initializer",
    "beta_regularizer",
    "gamma_regularizer",
    "beta_constraint",
    "gamma_constraint",
)
_NOT_NEGATIVE = ("moving_variance", "moving_stddev", "renorm_stddev", "renorm_mean_weight", "renorm_stddev_weight")
_DEFAULTS = BatchNorm().get_config()
# The arguments that layers had in version 0.1.0.
_FIRST = {"axis", "layout", "momentum", "epsilon", "center", "scale", "ddof", "dtype", "trainable", "name"}


def _features(shape: tuple[int, ...]) -> int | tuple[int, ...]:
    return shape[0] if len(shape) == 1 else shape


def _feature_shape(num_features: Any) -> tuple[int, ...]:
    sizes = num_features if isinstance(num_features, tuple) else (num_features,)
    if not sizes:
        raise ValueError(must("num_features", "have at least one axis", "()"))
    return tuple(checks.count(n, "num_features") for n in sizes)


def _parameter_dtype(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    given: np.dtype[Any] = np.dtype(dtype)
    if given not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(must(name, "be float32 or float64", given))
    return given
