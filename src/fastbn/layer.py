"""The layer: modes, calls and gradients.

What it holds is in `parameters`, what outlives it in `persistence`, what batches make of it in `learning`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import activation as activations
from . import checks, composite, constraints, functional, initializers, modes, options, passes, regularizers
from . import layout as layouts
from . import weights as weighting
from .composite import Composite
from .constraints import Constraint
from .errors import UntrainedWarning, must, warn
from .initializers import Initializer
from .kernels import _calls
from .learning import Learning
from .parameters import Arrays, parameter_dtype
from .regularizers import Regularizer
from .threads import give_lock

if TYPE_CHECKING:
    from .record import Record

Array = NDArray[Any]


class BatchNorm(Learning):
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
    nan_policy : {"propagate", "omit", "raise"}, default: "propagate"
        What NaN in a batch does, as in `batch_norm`.
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
        Batches that reached the moving statistics: in which any value counted.

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
        nan_policy: Literal["propagate", "omit", "raise"] = "propagate",
        dtype: DTypeLike | None = None,
        trainable: bool = True,
        name: str | None = None,
    ) -> None:
        self.axis = layouts.checked_axis(axis, layout)
        self.layout = layout
        self.momentum = momentum
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
        checks.one_of(nan_policy, "nan_policy", weighting.NAN_POLICIES)
        self.nan_policy = nan_policy
        self.dtype = None if dtype is None else parameter_dtype(dtype)
        self._trainable = checks.flag(trainable, "trainable")
        if name is not None and not isinstance(name, str):
            raise TypeError(must("name", "be a string or None", repr(name)))
        self.name = name
        self.grads: dict[str, Array] = {}
        self.batches = 0
        self._arrays: Arrays | None = None
        self._may_warn = True
        give_lock(self)
        self._last = threading.local()  # the cache of each thread's last call
        self._given_record: Record | None = None
        self._direct = self._may_be_direct()
        if num_features is not None:
            self.build(num_features)

    def _may_be_direct(self) -> bool:
        """Whether a training call is one pass and a plain update; a subclass may decide about modes by itself."""
        return self._options.plain and self._given_record is None and type(self).mode is BatchNorm.mode

    def _record(self, record: Record | None) -> None:
        """Add what comes in to a record, and learn nothing; None ends that."""
        self._given_record = record
        self._direct = self._may_be_direct()

    @property
    def _recorder(self) -> Record | None:
        """What batches are added to, instead of learning from them."""
        if self._given_record is not None and not self._given_record.wanted:  # Ctrl-C has left it here
            self._record(None)
        return self._given_record

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
        mask: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
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
        mask, sample_weight : array_like, optional
            Which values count in the statistics, and how much, as in `batch_norm`; in ghost batches, in those of their
            group. The layer refers to them until the gradient was taken. Without training they say which values of x
            are missing in the gradient.
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
        if self._direct and arrays is not None and type(x) is np.ndarray and x.size <= passes.SERIAL:
            y = self._call_small(x, training, arrays, residual, mask, sample_weight, out)
            if y is not None:
                return y
        mode = self.mode(training)
        data = checks.data(x, "x")
        if arrays is None:
            axes = layouts.channel_axes(self.axis, self.layout, data.ndim)
            arrays = self._created(layouts.channel_shape(data.shape, axes), checks.parameter_dtype(data.dtype))
        if out is not None:
            checks.apart(checks.as_array(out, "out"), "out", **self._named(arrays))
        if mode == "train":
            self._refuse_unfit(arrays, data)
        if not self._direct and (mode != "inference" or self._recorder is not None):
            trains = training is not None and bool(training)
            return self._call_composite(data, arrays, mode, trains, residual, mask, sample_weight, out)
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
            mask=mask,
            sample_weight=sample_weight,
            nan_policy=self.nan_policy,
            out=out,
            keep="unless in place",
        )
        assert cache is not None
        if mode == "inference":
            self._warn_if_untrained(mean, variance)
        with self._lock:
            arrays = self._adopted(arrays)
            count: weighting.Count = layouts.values_per_channel(data.shape, cache.axes)
            if cache.weights is not None and cache.total is not None:
                count = cache.weights.counts(cache.total)
            if mode == "train" and data.size and np.any(count):
                self._learn_plainly(arrays, cache.statistics, count)
        self._last.cache = cache
        return y

    def _call_small(
        self, x: Array, training: Any, arrays: Arrays, residual: Any, mask: Any, sample_weight: Any, out: Any
    ) -> Array | None:
        """Call, where everything plainly fits; otherwise return None, and nothing has happened.

        A small batch holds the lock all the time: two more copies of the statistics would cost more than that.
        """
        train = training is True and self._trainable
        if not (training is None or type(training) is bool) or (not train and self._may_warn and not self.batches):
            return None
        gamma, beta, mean, variance, _, _ = arrays
        axis = layouts.plain_axis(self.axis, self.layout, x)
        bent = None if self.activation is None else activations.resolved(self.activation)
        with self._lock:
            if self._arrays is not arrays:
                return None
            result = _calls.forward(
                x, gamma, beta, mean, variance, train, self._momentum, self.epsilon, axis, self.ddof, True, out,
                True, True, passes.team, passes.SERIAL, mask, sample_weight, self.nan_policy, bent, residual,
                self if train else None,
            )  # fmt: skip
            if result is None:
                return None
        total = result[2]
        y: Array
        y, cache, _ = result
        if total is not None:
            cache = passes.kept(cache, total, mask, sample_weight, self.nan_policy)
        self._last.cache = cache
        return y

    def _call_composite(
        self,
        x: Array,
        arrays: Arrays,
        mode: modes.Mode,
        training: bool,
        residual: Any,
        mask: Any,
        sample_weight: Any,
        out: Any,
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
        learns = arrays.moving_mean if mode == "train" else None
        groups = chosen.groups(x, self.axis, self.layout) if trains else None
        adjustment = chosen.adjusted(x, self.axis, self.layout) if trains else None
        with np.errstate(all="ignore"):  # of averages of infinite and NaN
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
                channels=arrays.shape,
                groups=groups,
                correction=correction,
                adjustment=adjustment,
                finite=learns.dtype if learns is not None and chosen.on_nonfinite == "raise" else None,
                mask=mask,
                sample_weight=sample_weight,
                nan_policy=self.nan_policy,
            )
            with self._lock:
                arrays = self._adopted(arrays)
                counts = x.size and np.any(batch.counted)
                if counts and recorder is not None:
                    recorder.take(x, arrays.shape, batch)
                elif counts and mode == "train":
                    self._learn(arrays, batch)
        self._last.cache = last
        return y

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
        grads["residual"] = others[0] if others else None
        self.grads = {name: g for name, g in grads.items() if g is not None}
        return dx

    def _warn_if_untrained(self, mean: Array, variance: Array) -> None:
        if self._may_warn and not self.batches and not mean.any() and (variance == 1).all() and mean.size:
            self._may_warn = False
            warn(
                f"{self!r} normalizes with moving statistics that no batch has reached: mean 0, variance 1. "
                "Call it with training=True first, or load a state.",
                UntrainedWarning,
            )


BatchNorm._defaults = BatchNorm().get_config()
