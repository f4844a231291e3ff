"""The operations without state: forward in every mode, and gradient."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import activation as activations
from . import averages, checks, kernels
from . import layout as layouts
from .errors import must
from .kernels import _calls, _channels
from .passes import SERIAL, Cache, counting, forward, kept, run, team

Array = NDArray[Any]


def batch_norm(
    x: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    moving_mean: ArrayLike | None = None,
    moving_variance: ArrayLike | None = None,
    training: bool = False,
    momentum: float | None = 0.99,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    ddof: int = 0,
    update: bool = True,
    batches: int | None = None,
    activation: str | tuple[str, float] | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    nan_policy: Literal["propagate", "omit", "raise"] = "propagate",
    out: Array | None = None,
) -> Array:
    """Normalize a batch per channel.

    With ``training=True``, mean and variance are those of the batch, and the moving arrays are updated in place::

        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta
        moving = momentum * moving + (1 - momentum) * batch

    Otherwise they are the moving arrays, which stay as they are.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        The batch, of any rank from 1 up; bfloat16 is that of the package ml_dtypes. A batch without values is allowed:
        it changes no statistics.
    gamma, beta : array_like of shape (channels,), optional
        Scale and shift; 1 and 0 where None. With several channel axes the shape is that of those axes.
    moving_mean, moving_variance : array of shape (channels,), optional
        Moving statistics, float32 or float64. Needed without training; with it, None keeps none.
    training : bool, default: False
        Whether to normalize with the statistics of the batch.
    momentum : float, default: 0.99
        Share of the OLD moving value that is kept, in [0, 1]. PyTorch's momentum is the other share. With None the
        moving statistics are the means over all batches, each with the same weight.
    epsilon : float, default: 1e-3
        Added to the variance, in its units. With 0, a channel of variance 0 gives beta.
    axis : int or tuple of ints, default: -1
        The channel axis; of a tuple, every combination of indices is a channel.
    layout : str, optional
        Names the channel axis instead: NC, NCL, NLC, NCHW, NHWC, NCDHW, NDHWC, channels_first or channels_last.
    ddof : {0, 1}, default: 0
        The variance that goes into ``moving_variance`` is divided by m - ddof, with m values per channel; the
        batch itself is always normalized with ddof 0. For m = 1 the variance is 0 for either.
    update : bool, default: True
        Whether training updates the moving arrays.
    batches : int, optional
        How many batches the moving arrays have seen before. Needed for ``momentum=None``, and used for that alone.
    activation : str or tuple, optional
        Applied in the same pass: relu, relu6, silu, gelu_tanh, leaky_relu (slope 0.01) or ("leaky_relu", slope).
    residual : array_like of x's shape and y's dtype, optional
        Added before the activation: ``y = activation(batch_norm(x) + residual)``.
    mask : array_like of bool, optional
        Which values count in the statistics: True does. Per sample, of shape (samples,) along axis 0; per position, of
        x's shape without its channel axes, or with those 1 long; or per value, of x's shape. Values that do not count
        may be NaN or infinite; y is computed for all.
    sample_weight : array_like of bool, integers or real numbers, optional
        How much values count, finite and not negative, in the same shapes. A weight of k is as good as k times the
        value. With a mask, weights count where that is True.
    nan_policy : {"propagate", "omit", "raise"}, default: "propagate"
        What NaN in x does: makes its channel NaN; is missing, so that every channel has the statistics of the values it
        has; or is a ValueError, if it would count.
    out : array, optional
        Where to write the result: of x's shape and y's dtype. May be x itself or the residual itself, but not overlap
        one of them in part.

    Returns
    -------
    ndarray
        y, of x's shape, dtype and order of axes in memory, but float32 for uint8 and int8; `out` if that was given.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape or a number does not fit, an array cannot be written, or memory is shared where it must not be.
        Nothing has been written then.

    Notes
    -----
    Sums are float64, relative to a shift, and merged by Chan's formula. The bits of the result do not depend on the
    number of threads, on strides, or on whether it is in place. x is copied only if its strides fit neither of the
    two access patterns, if it is not in native byte order, or if it is not aligned. float16, bfloat16, uint8 and int8
    are exact in the float32 that everything is computed in for them; a result is rounded from it once, to nearest, ties
    to even.

    With weights w and W their sum over a channel, ``mean = sum(w * x) / W`` and
    ``variance = sum(w * (x - mean)^2) / W``; ``moving_variance`` is divided by W - ddof, or by W where that is not
    positive. Where nothing counts a channel keeps its moving statistics, and y is beta. Where x is NaN, y is, and where
    it is infinite in such a channel.

    References
    ----------
    S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", ICML 2015.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> x = np.array([[0.0, 10.0], [2.0, 30.0]])
    >>> mean, variance = np.zeros(2), np.ones(2)
    >>> fastbn.batch_norm(
    ...     x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.5, epsilon=0.0
    ... )
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> mean, variance
    (array([ 0.5, 10. ]), array([ 1. , 50.5]))
    """
    bent = None if activation is None else activations.resolved(activation)
    channel = layouts.plain_axis(axis, layout, x)
    plain = _calls.forward(
        x, gamma, beta, moving_mean, moving_variance, training, momentum, epsilon, channel, ddof, update, out,
        False, True, team, SERIAL, mask, sample_weight, nan_policy, bent, residual,
    )  # fmt: skip
    if plain is not None:
        return plain  # type: ignore[no-any-return]
    y, _ = forward(
        x,
        gamma=gamma,
        beta=beta,
        moving_mean=moving_mean,
        moving_variance=moving_variance,
        training=training,
        momentum=averages.given_share(momentum, batches, needed=training),
        epsilon=epsilon,
        axis=axis,
        layout=layout,
        ddof=ddof,
        update=update,
        activation=activation,
        residual=residual,
        mask=mask,
        sample_weight=sample_weight,
        nan_policy=nan_policy,
        out=out,
        keep="nothing",
    )
    return y


def batch_norm_forward(
    x: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    moving_mean: ArrayLike | None = None,
    moving_variance: ArrayLike | None = None,
    training: bool = False,
    momentum: float | None = 0.99,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    ddof: int = 0,
    update: bool = True,
    batches: int | None = None,
    activation: str | tuple[str, float] | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    nan_policy: Literal["propagate", "omit", "raise"] = "propagate",
    out: Array | None = None,
    save: Literal["input", "output"] = "input",
) -> tuple[Array, Cache]:
    """Normalize a batch per channel, and keep what the gradient needs.

    The same as `batch_norm`, with a second result.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        The batch. The cache refers to it: leave it unchanged until the gradient was taken.
    gamma, beta, moving_mean, moving_variance : array_like of shape (channels,), optional
        As in `batch_norm`.
    training : bool, default: False
        As in `batch_norm`. Without training the gradient is that of a frozen layer.
    momentum, epsilon, axis, layout, ddof, update, batches, activation, residual
        As in `batch_norm`.
    mask, sample_weight : array_like, optional
        As in `batch_norm`. The cache refers to them: leave them unchanged until the gradient was taken.
    nan_policy : {"propagate", "omit", "raise"}, default: "propagate"
        As in `batch_norm`.
    out : array, optional
        As in `batch_norm`, but with ``save="input"`` it must not share memory with x, nor with a
        residual before silu, gelu_tanh or a leaky_relu of negative slope.
    save : {"input", "output"}, default: "input"
        What the cache refers to, and the gradient is taken from. With "output" that is y: x may be overwritten
        (``out=x``) or freed, so that a training step holds one array less. y must then be left unchanged, and no
        gamma may be 0. Not with an activation or a residual.
        The gradient is as exact as ``(y - beta) / gamma`` is: a beta far larger than gamma costs digits.

    Returns
    -------
    y : ndarray
        As in `batch_norm`.
    cache : Cache
        For `batch_norm_backward`; it may be used more than once. After a residual it refers to y with relu, relu6 and
        leaky_relu, and to the residual with the other activations: leave those unchanged as well.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> x = np.array([[0.0], [2.0], [4.0]])
    >>> y, cache = fastbn.batch_norm_forward(x, training=True)
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(np.ones_like(x), cache)
    >>> dbeta
    array([3.])
    """
    if checks.one_of(save, "save", ("input", "output")) == "output":
        if activation is not None or residual is not None:
            raise ValueError(must("save", 'be "input" with an activation or a residual', repr(save)))
    else:
        bent = None if activation is None else activations.resolved(activation)
        channel = layouts.plain_axis(axis, layout, x)
        plain = _calls.forward(
            x, gamma, beta, moving_mean, moving_variance, training, momentum, epsilon, channel, ddof, update, out,
            True, False, team, SERIAL, mask, sample_weight, nan_policy, bent, residual,
        )  # fmt: skip
        if plain is not None:
            return plain[0], kept(plain[1], plain[2], mask, sample_weight, nan_policy)
    y, cache = forward(
        x,
        gamma=gamma,
        beta=beta,
        moving_mean=moving_mean,
        moving_variance=moving_variance,
        training=training,
        momentum=averages.given_share(momentum, batches, needed=training),
        epsilon=epsilon,
        axis=axis,
        layout=layout,
        ddof=ddof,
        update=update,
        activation=activation,
        residual=residual,
        mask=mask,
        sample_weight=sample_weight,
        nan_policy=nan_policy,
        out=out,
        keep="output" if save == "output" else "always",
    )
    assert cache is not None
    return y, cache


def batch_norm_backward(dy: ArrayLike, cache: Cache, *, out: Array | None = None) -> tuple[Array, ...]:
    """Return the gradient of a batch norm.

    With r = 1 / sqrt(variance + epsilon) and m values per channel, through the statistics of the batch::

        dbeta = sum(dy)
        dgamma = sum(dy * (x - mean)) * r
        dx = gamma * r * (dy - dbeta / m - (x - mean) * r * dgamma / m)

    and ``dx = gamma * r * dy`` where the call normalized with moving statistics. After an activation, dy stands for dy
    times its derivative, which at 0 is 0 for relu and relu6 and the slope for leaky_relu. With a residual these three
    are told from y as it is stored: what float16 and bfloat16 round to 6 is not below it, and what they round to 0 not
    above that.

    With weights w, and W their sum over a channel, it is the gradient of what was computed: y everywhere, so dy counts
    everywhere, but x only as much as it did in the statistics::

        dx = gamma * r * (dy - w * dbeta / W - w * (x - mean) * r * dgamma / W)

    A value is missing if it is not finite and its weight is 0, or if it is NaN and nan_policy is "omit". Its dy counts
    nowhere, and its dx is 0, unless its channel's statistics are not finite. A channel where nothing counted has dx and
    dgamma 0.

    Parameters
    ----------
    dy : array_like of y's shape and dtype
        Gradient with respect to y.
    cache : Cache
        Second result of `batch_norm_forward`.
    out : array, optional
        Where to write dx: of y's shape and dtype. May be dy itself, or, if the cache is not used again, what that
        refers to: x, y or the residual.

    Returns
    -------
    dx : ndarray
        Of y's shape and dtype, in the order of axes in memory that x has.
    dgamma, dbeta : ndarray of shape (channels,)
        float32, or float64 where x is. They come also where gamma or beta was None.
    dresidual : ndarray, only if the call had a residual
        Of x's shape and y's dtype, always a new array.

    Raises
    ------
    TypeError
        If dy has another dtype than y, or cache is none.
    ValueError
        If a shape does not fit, or memory is shared where it must not be.

    References
    ----------
    S. Ioffe, C. Szegedy, ICML 2015, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> x = np.array([[0.0], [2.0], [4.0]])
    >>> _, cache = fastbn.batch_norm_forward(x, training=True, epsilon=0.0)
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(np.array([[1.0], [0.0], [2.0]]), cache)
    >>> print(dx.sum(), dgamma, dbeta)
    0.0 [1.22474487] [3.]
    """
    if not isinstance(cache, Cache):
        raise TypeError(must("cache", "come from batch_norm_forward", type(cache).__name__))
    x = cache.x
    if x is None:
        raise ValueError(must("out", "not be x in a forward call whose gradient is taken", "x, overwritten"))
    if cache.lost_residual:
        raise ValueError(
            must("out", "not be residual in a forward call whose gradient is taken", "residual, overwritten")
        )
    mean, variance = cache.statistics
    frozen = cache.mode == "inference"
    fused = cache.has_residual or cache.activation is not None
    if len(cache.axes) == 1 and (cache.weights is None or (x.size and not fused)):
        plain = _calls.backward(
            dy, x, cache.axes[0], cache.gamma, mean, variance, cache.epsilon, frozen, out, team, SERIAL,
            counting(x, cache.axes, cache.weights, cache.total), cache.activation, cache.has_residual, cache.beta,
            cache.residual, cache.y,
        )  # fmt: skip
        if plain is not None:
            if cache.sign is not None:
                plain[1][...] *= cache.sign.astype(plain[1].dtype)
            return plain
    gradient = checks.like(dy, "dy", x)
    dtype = gradient.dtype
    if out is None:
        dx = layouts.like(x, dtype)
    else:
        dx = checks.output(out, x.shape, dtype)
        checks.in_place_or_apart(dx, "out", gradient, "dy")
        checks.in_place_or_apart(dx, "out", x, "x")
        for source, name in ((cache.y, "y"), (cache.residual, "residual")):
            if source is not None:
                checks.in_place_or_apart(dx, "out", source, name)
        if cache.weights is not None:
            cache.weights.keep_apart(dx)

    shape = layouts.channel_shape(x.shape, cache.axes)
    first, second = np.zeros(math.prod(shape)), np.zeros(math.prod(shape))
    dresidual = layouts.like(x, dtype) if cache.has_residual else None
    activation = cache.activation
    if cache.weights is not None and fused and x.size:
        if activation is not None and dtype.itemsize == 2:  # what is before it would be rounded
            return (dx if out is None else out, *_from_float32(gradient, cache, dx, dresidual))
        gradient = before_activation(gradient, cache, x)  # in a pass of its own
        activation = None
    before = None if activation is None else dresidual  # where to keep the gradient before the activation
    if dresidual is not None and activation is None:
        dresidual[...] = gradient
    if x.size:
        run(
            kernels.FROZEN if frozen else kernels.GRADIENT,
            cache.axes,
            x,
            dy=gradient,
            out=dx,
            gamma=cache.gamma,
            beta=cache.beta,
            mean=mean,
            variance=variance,
            epsilon=cache.epsilon,
            first=first,
            second=second,
            residual=None if activation is None else cache.residual if cache.y is None else cache.y,
            bend=None if activation is None else activation.bend,
            by_output=activation is not None and cache.y is not None,
            kept=before,
            weights=cache.weights,
            total=cache.total,
        )
    dgamma, dbeta = (np.empty(first.shape, checks.parameter_dtype(x.dtype)) for _ in range(2))
    if cache.total is not None:  # where nothing counts, whatever else the variance stands for
        variance = np.where(cache.total > 0, variance, np.inf)
    _channels.parameter_gradients(first, second, variance, cache.epsilon, dgamma, dbeta)
    if cache.sign is not None:
        dgamma *= cache.sign.astype(dgamma.dtype)
    gradients = dx if out is None else out, dgamma.reshape(shape), dbeta.reshape(shape)
    return gradients if dresidual is None else (*gradients, dresidual)


def _from_float32(dy: Array, cache: Cache, dx: Array, dresidual: Array | None) -> tuple[Array, ...]:
    """Write dx and dresidual, found in float32 and rounded once; return what follows dx."""
    wide = batch_norm_backward(dy.astype(np.float32), cache.in_float32())
    with np.errstate(over="ignore"):
        dx[...] = wide[0]
        if dresidual is None:
            return wide[1:]
        dresidual[...] = wide[3]
    return *wide[1:3], dresidual


def before_activation(dy: Array, cache: Cache, x: Array) -> Array:
    """Return the gradient before an activation, 0 where x is missing, as a new array."""
    channels = len(cache.statistics.mean)
    result = layouts.like(x, dy.dtype)
    first, second, total = np.zeros(channels), np.zeros(channels), np.ones(channels)
    if cache.activation is None:
        result[...] = dy
    else:
        run(
            kernels.FROZEN,
            cache.axes,
            x,
            dy=dy,
            out=layouts.like(x, dy.dtype),
            gamma=cache.gamma,
            beta=cache.beta,
            mean=cache.statistics.mean,
            variance=cache.statistics.variance,
            epsilon=cache.epsilon,
            first=first,
            second=second,
            residual=cache.residual if cache.y is None else cache.y,
            bend=cache.activation.bend,
            by_output=cache.y is not None,
            kept=result,
        )
    # What is not missing stays, times 1.
    run(
        kernels.FROZEN,
        cache.axes,
        x,
        dy=result,
        out=result,
        first=first,
        second=second,
        weights=cache.weights,
        total=total,
    )
    return result
