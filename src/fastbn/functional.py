"""The operations without state: forward in every mode, gradient, normalization with given statistics, folding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks, kernels, modes
from . import layout as layouts
from .errors import must
from .kernels import _channels
from .threads import get_num_threads

if TYPE_CHECKING:
    from .layer import BatchNorm

Array = NDArray[Any]

# Values per thread below which another thread costs more than it brings: starting a team takes some microseconds,
# in which one core normalizes about this many values that are in cache.
VALUES_PER_THREAD: Final = 16384


class Statistics(NamedTuple):
    """What normalized a batch: mean and variance (divided by the count, ddof 0) per channel, one-dimensional."""

    mean: Array
    variance: Array


class Cache:
    """What `batch_norm_backward` needs of the forward call.

    It refers to x itself, not to a copy: x must not be changed before the gradient was taken.

    Attributes
    ----------
    mode : {"train", "batch", "inference"}
        How the call normalized.
    """

    __slots__ = ("axes", "epsilon", "gamma", "mode", "statistics", "x")

    def __init__(
        self,
        x: Array | None,
        axes: tuple[int, ...],
        mode: modes.Mode,
        statistics: Statistics,
        gamma: Array | None,
        epsilon: float,
    ) -> None:
        self.x = x
        self.axes = axes
        self.mode = mode
        self.statistics = statistics
        self.gamma = gamma
        self.epsilon = epsilon

    def __repr__(self) -> str:
        """Describe the call."""
        batch = "an overwritten batch" if self.x is None else f"a {self.x.dtype} batch of shape {self.x.shape}"
        return f"<fastbn cache of {batch}, mode {self.mode!r}>"


def _team(size: int) -> int:
    """Return how many threads a call on so many values uses."""
    return 1 if size < 2 * VALUES_PER_THREAD else min(get_num_threads(), size // VALUES_PER_THREAD)


def run(
    operation: int,
    axes: tuple[int, ...],
    x: Array,
    *,
    dy: Array | None = None,
    out: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    mean: Array | None = None,
    variance: Array | None = None,
    epsilon: float = 0.0,
    first: Array | None = None,
    second: Array | None = None,
) -> None:
    """Carry out an operation on checked arrays that are not empty.

    Where the strides of an array fit neither access pattern it is copied once, and a result copied back.
    """
    wide = x.dtype.itemsize == 8
    plan = layouts.plan(
        x.shape,
        axes,
        wide,
        x.strides,
        None if dy is None else dy.strides,
        None if out is None else out.strides,
    )
    if plan is None:
        x2 = layouts.packed(x, axes)
        dy2 = out2 = None
        if dy is not None:
            dy2 = layouts.like(x2)
            dy2[...] = dy
        if out is not None:
            out2 = layouts.like(x2)
        run(
            operation,
            axes,
            x2,
            dy=dy2,
            out=out2,
            gamma=gamma,
            beta=beta,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
            first=first,
            second=second,
        )
        if out is not None:
            assert out2 is not None
            out[...] = out2
        return
    u, v = (x, None) if dy is None else (dy, x)
    kernels.run(plan, operation, u, v, out, gamma, beta, mean, variance, epsilon, first, second, _team(x.size))


def forward(
    x: Any,
    *,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    training: Any,
    momentum: Any,
    epsilon: Any,
    axis: Any,
    layout: str | None,
    ddof: Any,
    update: Any,
    out: Any,
    keep: Literal["nothing", "always", "unless in place"],
    names: tuple[str, str] = ("moving_mean", "moving_variance"),
) -> tuple[Array, Cache | None]:
    """Check, normalize, update, and keep a cache. The body of all forward functions.

    A cache refers to x, so "always" refuses to overwrite it; "unless in place" gives a cache without x then.
    """
    x = checks.data(x, "x")
    axes = layouts.channel_axes(axis, layout, x.ndim)
    shape = layouts.channel_shape(x.shape, axes)
    mode = modes.functional_mode(
        checks.flag(training, "training"), update is not None and checks.flag(update, "update")
    )
    epsilon = checks.epsilon(epsilon)
    momentum = checks.momentum(momentum)
    ddof = checks.ddof(ddof)
    weight = checks.parameter(gamma, "gamma", shape)
    bias = checks.parameter(beta, "beta", shape)
    if (moving_mean is None) != (moving_variance is None):
        raise ValueError("moving_mean and moving_variance must be given together, got only one of them")
    name_mean, name_variance = names
    updates = mode == "train" and moving_mean is not None
    if updates:
        moving_mean = checks.moving(moving_mean, "moving_mean", shape)
        moving_variance = checks.moving(moving_variance, "moving_variance", shape)
        checks.apart(moving_mean, "moving_mean", moving_variance=moving_variance)
        if keep != "nothing":  # the cache refers to x, which the update must not change
            checks.apart(moving_mean, "moving_mean", x=x)
            checks.apart(moving_variance, "moving_variance", x=x)
    elif mode == "inference":
        moving_mean = checks.required(moving_mean, name_mean, shape)
        moving_variance = checks.required(moving_variance, name_variance, shape)
    else:
        moving_mean = checks.parameter(moving_mean, "moving_mean", shape)
        moving_variance = checks.parameter(moving_variance, "moving_variance", shape)
    if out is None:
        y = layouts.like(x)
    else:
        y = checks.output(out, x.shape, x.dtype)
        if keep == "always":
            checks.apart(y, "out", x=x)  # the cache refers to x
        checks.in_place_or_apart(y, "out", x, "x")
        statistics_in = {name_mean: moving_mean, name_variance: moving_variance}
        checks.apart(y, "out", gamma=weight, beta=bias, **statistics_in)

    kept_gamma = None if keep == "nothing" or weight is None else weight.copy()
    arguments = {"gamma": weight, "beta": bias, "epsilon": epsilon, "out": y}
    if mode == "inference":
        if x.size:
            run(kernels.NORMALIZE, axes, x, mean=moving_mean, variance=moving_variance, **arguments)
        if keep == "nothing":
            return y, None
        statistics = Statistics(moving_mean.astype(np.float64), moving_variance.astype(np.float64))
    else:
        count = layouts.values_per_channel(x.shape, axes)
        statistics = batch_statistics(x, axes, count, kernels.TRAIN, **arguments)
        if updates and count:
            store_moving(moving_mean, moving_variance, statistics, count, momentum, ddof)
    if keep == "nothing":
        return y, None
    kept = None if out is not None and checks.overlap(y, x) else x
    return y, Cache(kept, axes, mode, statistics, kept_gamma, epsilon)


def batch_statistics(x: Array, axes: tuple[int, ...], count: int, operation: int, **arguments: Any) -> Statistics:
    """Carry out an operation that finds the moments of a batch, and return them; zeros for an empty batch."""
    channels = math.prod(layouts.channel_shape(x.shape, axes))
    mean, m2 = np.zeros(channels), np.zeros(channels)
    if x.size:
        run(operation, axes, x, first=mean, second=m2, **arguments)
    return Statistics(mean, _channels.variance(m2, max(count, 1)))


def store_moving(
    moving_mean: Array, moving_variance: Array, statistics: Statistics, count: int, momentum: float, ddof: int
) -> None:
    """Update checked moving arrays, of any shape, in place."""
    mean, variance = moving_mean.reshape(-1), moving_variance.reshape(-1)
    # ddof 1 turns the variance of m values, divided by m, into one divided by m - 1; of one value it stays 0.
    divisor = max(count - ddof, 1) / count
    _channels.update_moving(mean, variance, *statistics, divisor, momentum)
    for target, flat in ((moving_mean, mean), (moving_variance, variance)):
        if not np.may_share_memory(flat, target):  # several axes whose strides cannot be walked as one
            target[...] = flat.reshape(target.shape)


def batch_norm(
    x: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    moving_mean: ArrayLike | None = None,
    moving_variance: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    ddof: int = 0,
    update: bool = True,
    out: Array | None = None,
) -> Array:
    """Normalize a batch per channel.

    With ``training=True``, mean and variance are those of the batch, and the moving arrays are updated in place::

        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta
        moving = momentum * moving + (1 - momentum) * batch

    Otherwise they are the moving arrays, which stay as they are.

    Parameters
    ----------
    x : array_like of float32 or float64
        The batch, of any rank from 1 up. A batch without values is allowed: it changes no statistics.
    gamma, beta : array_like of shape (channels,), optional
        Scale and shift; 1 and 0 where None. With several channel axes the shape is that of those axes.
    moving_mean, moving_variance : array of shape (channels,), optional
        Moving statistics, float32 or float64. Needed without training; with it, None keeps none.
    training : bool, default: False
        Whether to normalize with the statistics of the batch.
    momentum : float, default: 0.99
        Share of the OLD moving value that is kept, in [0, 1]. PyTorch's momentum is the other share.
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
    out : array, optional
        Where to write the result: of x's shape and dtype. May be x itself, but not overlap it in part.

    Returns
    -------
    ndarray
        y, of x's shape, dtype and order of axes in memory; `out` if that was given.

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
    two access patterns, if it is not in native byte order, or if it is not aligned.

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
    y, _ = forward(
        x,
        gamma=gamma,
        beta=beta,
        moving_mean=moving_mean,
        moving_variance=moving_variance,
        training=training,
        momentum=momentum,
        epsilon=epsilon,
        axis=axis,
        layout=layout,
        ddof=ddof,
        update=update,
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
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    ddof: int = 0,
    update: bool = True,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """Normalize a batch per channel, and keep what the gradient needs.

    The same as `batch_norm`, with a second result.

    Parameters
    ----------
    x : array_like of float32 or float64
        The batch. The cache refers to it: leave it unchanged until the gradient was taken.
    gamma, beta, moving_mean, moving_variance : array_like of shape (channels,), optional
        As in `batch_norm`.
    training : bool, default: False
        As in `batch_norm`. Without training the gradient is that of a frozen layer.
    momentum, epsilon, axis, layout, ddof, update
        As in `batch_norm`.
    out : array, optional
        As in `batch_norm`, but it must not share memory with x.

    Returns
    -------
    y : ndarray
        As in `batch_norm`.
    cache : Cache
        For `batch_norm_backward`; it may be used more than once.

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
    y, cache = forward(
        x,
        gamma=gamma,
        beta=beta,
        moving_mean=moving_mean,
        moving_variance=moving_variance,
        training=training,
        momentum=momentum,
        epsilon=epsilon,
        axis=axis,
        layout=layout,
        ddof=ddof,
        update=update,
        out=out,
        keep="always",
    )
    assert cache is not None
    return y, cache


def batch_norm_backward(dy: ArrayLike, cache: Cache, *, out: Array | None = None) -> tuple[Array, Array, Array]:
    """Return the gradient of a batch norm.

    With r = 1 / sqrt(variance + epsilon) and m values per channel, through the statistics of the batch::

        dbeta = sum(dy)
        dgamma = sum(dy * (x - mean)) * r
        dx = gamma * r * (dy - dbeta / m - (x - mean) * r * dgamma / m)

    and ``dx = gamma * r * dy`` where the call normalized with moving statistics.

    Parameters
    ----------
    dy : array_like of x's shape and dtype
        Gradient with respect to y.
    cache : Cache
        Second result of `batch_norm_forward`.
    out : array, optional
        Where to write dx: of x's shape and dtype. May be dy itself, or x itself if the cache is not used again.

    Returns
    -------
    dx : ndarray
        Of x's shape and dtype, in the order of axes in memory that x has.
    dgamma, dbeta : ndarray of shape (channels,)
        float32, or float64 where x is. They come also where gamma or beta was None.

    Raises
    ------
    TypeError
        If dy has another dtype than x, or cache is none.
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
    gradient = checks.data(dy, "dy")
    if gradient.dtype != x.dtype:
        raise TypeError(must("dy", f"have dtype {x.dtype}", gradient.dtype))
    if gradient.shape != x.shape:
        raise ValueError(must("dy", f"have shape {x.shape}", gradient.shape))
    if out is None:
        dx = layouts.like(x)
    else:
        dx = checks.output(out, x.shape, x.dtype)
        checks.in_place_or_apart(dx, "out", gradient, "dy")
        checks.in_place_or_apart(dx, "out", x, "x")

    shape = layouts.channel_shape(x.shape, cache.axes)
    first, second = np.zeros(math.prod(shape)), np.zeros(math.prod(shape))
    mean, variance = cache.statistics
    if x.size:
        run(
            kernels.FROZEN if cache.mode == "inference" else kernels.GRADIENT,
            cache.axes,
            x,
            dy=gradient,
            out=dx,
            gamma=cache.gamma,
            mean=mean,
            variance=variance,
            epsilon=cache.epsilon,
            first=first,
            second=second,
        )
    dgamma, dbeta = np.empty(first.shape, x.dtype), np.empty(first.shape, x.dtype)
    _channels.parameter_gradients(first, second, variance, cache.epsilon, dgamma, dbeta)
    return dx, dgamma.reshape(shape), dbeta.reshape(shape)


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize with given statistics: ``gamma * (x - mean) / sqrt(variance + epsilon) + beta``.

    Parameters
    ----------
    x : array_like of float32 or float64
        Data of any rank from 1 up.
    mean, variance : array_like of shape (channels,)
        Statistics, in the units of x and their square.
    gamma, beta : array_like of shape (channels,), optional
        Scale and shift; 1 and 0 where None.
    epsilon : float, default: 1e-3
        Added to the variance.
    axis, layout
        The channel axis, as in `batch_norm`.
    out : array, optional
        Where to write the result; may be x itself.

    Returns
    -------
    ndarray
        Of x's shape, dtype and order of axes in memory.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.normalize(np.array([[1.0], [5.0]]), [3.0], [4.0], epsilon=0.0)
    array([[-1.],
           [ 1.]])
    """
    for value, name in ((mean, "mean"), (variance, "variance")):
        if value is None:
            raise ValueError(must(name, "be given", "None"))
    y, _ = forward(
        x,
        gamma=gamma,
        beta=beta,
        moving_mean=mean,
        moving_variance=variance,
        training=False,
        momentum=0.0,
        epsilon=epsilon,
        axis=axis,
        layout=layout,
        ddof=0,
        update=False,
        out=out,
        keep="nothing",
        names=("mean", "variance"),
    )
    return y


def update_moving(
    moving_mean: Array,
    moving_variance: Array,
    mean: ArrayLike,
    variance: ArrayLike,
    *,
    momentum: float,
    count: int | None = None,
    ddof: int = 0,
) -> None:
    """Update moving statistics in place: ``moving = momentum * moving + (1 - momentum) * batch``.

    Parameters
    ----------
    moving_mean, moving_variance : array of float32 or float64
        Moving statistics, of one shape.
    mean, variance : array_like
        Statistics of a batch; the variance divided by the count (ddof 0).
    momentum : float
        Share of the old value that is kept, in [0, 1].
    count : int, optional
        Values per channel in the batch, needed for ddof 1. A batch of 0 values changes nothing.
    ddof : {0, 1}, default: 0
        The variance that goes into the moving one is divided by count - ddof.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape or number does not fit, or the moving arrays are read-only or share memory.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> mean, variance = np.zeros(1), np.ones(1)
    >>> fastbn.update_moving(mean, variance, [4.0], [3.0], momentum=0.5, count=4, ddof=1)
    >>> mean, variance
    (array([2.]), array([2.5]))
    """
    shape = checks.as_array(moving_mean, "moving_mean").shape
    target_mean = checks.moving(moving_mean, "moving_mean", shape)
    target_variance = checks.moving(moving_variance, "moving_variance", shape)
    checks.apart(target_mean, "moving_mean", moving_variance=target_variance)
    statistics = Statistics(checks.required(mean, "mean", shape), checks.required(variance, "variance", shape))
    for target, name in ((target_mean, "moving_mean"), (target_variance, "moving_variance")):
        checks.apart(target, name, mean=statistics.mean, variance=statistics.variance)
    share = checks.momentum(momentum)
    degrees = checks.ddof(ddof)
    if count is None:
        if degrees:
            raise ValueError(must("count", "be given with ddof 1", "None"))
        values = 1
    else:
        values = checks.count(count)
    if values:
        store_moving(target_mean, target_variance, statistics, values, share, degrees)


def fold(weight: ArrayLike, bias: ArrayLike | None, bn: BatchNorm, *, axis: int) -> tuple[Array, Array]:
    """Fold a batch norm in inference into the dense or convolution layer before it.

    With s = gamma / sqrt(moving_variance + epsilon)::

        weight' = weight * s,   bias' = (bias - moving_mean) * s + beta

    Parameters
    ----------
    weight : array_like of float32 or float64
        Weight of the layer, of any rank.
    bias : array_like of shape (channels,) or None
        Its bias; None for none.
    bn : BatchNorm
        A built layer, with one channel axis.
    axis : int
        The axis of `weight` that holds the output channels: 0 for (out, in, height, width), -1 for (height, width, in,
        out) and for a dense (in, out).

    Returns
    -------
    weight : ndarray
        New weight of the same shape and dtype.
    bias : ndarray of shape (channels,)
        New bias, of the weight's dtype.

    Raises
    ------
    TypeError, ValueError
        If bn is no built layer, or a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm(2, epsilon=0.0)
    >>> bn.moving_mean[:] = 1.0, 2.0
    >>> bn.moving_variance[:] = 4.0, 0.25
    >>> fastbn.fold(np.ones((3, 2), np.float32), None, bn, axis=-1)
    (array([[0.5, 2. ],
           [0.5, 2. ],
           [0.5, 2. ]], dtype=float32), array([-0.5, -4. ], dtype=float32))
    """
    kernel = checks.data(weight, "weight")
    axes = layouts.channel_axes(axis, None, kernel.ndim)
    shape = layouts.channel_shape(kernel.shape, axes)
    # Both are batch norms in inference themselves: of the weight, around mean 0, and of the bias as a batch of one.
    if not hasattr(bn, "inference_parameters"):
        raise TypeError(must("bn", "be a BatchNorm", type(bn).__name__))
    parameters = bn.inference_parameters()
    if parameters.moving_mean.shape != shape:
        raise ValueError(must("weight", f"have {parameters.moving_mean.shape} channels along axis {axis}", shape))
    offset = checks.parameter(bias, "bias", shape)
    scaled = normalize(
        kernel,
        np.zeros(shape),
        parameters.moving_variance,
        gamma=parameters.gamma,
        epsilon=parameters.epsilon,
        axis=axis,
    )
    shifted = normalize(
        np.zeros(shape) if offset is None else offset.astype(np.float64),
        parameters.moving_mean,
        parameters.moving_variance,
        gamma=parameters.gamma,
        beta=parameters.beta,
        epsilon=parameters.epsilon,
    )
    return scaled, shifted.astype(kernel.dtype)
