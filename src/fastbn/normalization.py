"""Normalization with given statistics, and its inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from . import layout as layouts
from .errors import must
from .passes import forward

Array = NDArray[Any]


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
    activation: str | tuple[str, float] | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize with given statistics: ``gamma * (x - mean) / sqrt(variance + epsilon) + beta``.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        Data of any rank from 1 up.
    mean, variance : array_like of shape (channels,)
        Statistics, in the units of x and their square.
    gamma, beta : array_like of shape (channels,), optional
        Scale and shift; 1 and 0 where None.
    epsilon : float, default: 1e-3
        Added to the variance.
    axis, layout
        The channel axis, as in `batch_norm`.
    activation, residual
        As in `batch_norm`.
    out : array, optional
        Where to write the result; may be x itself, or the residual itself.

    Returns
    -------
    ndarray
        Of x's shape, dtype and order of axes in memory, but float32 for uint8 and int8.

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
        activation=activation,
        residual=residual,
        out=out,
        keep="nothing",
        names=("mean", "variance"),
    )
    return y


def denormalize(
    y: ArrayLike,
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
    """Undo `normalize`: ``(y - beta) * sqrt(variance + epsilon) / gamma + mean``.

    Parameters
    ----------
    y : array_like of float16, bfloat16, float32, float64, uint8 or int8
        Data of any rank from 1 up.
    mean, variance : array_like of shape (channels,)
        Statistics, in the units of the result and their square.
    gamma, beta : array_like of shape (channels,), optional
        Scale and shift that were applied; 1 and 0 where None. No gamma may be 0.
    epsilon : float, default: 1e-3
        Added to the variance. Where that gives 0, the result is the mean.
    axis, layout
        The channel axis, as in `batch_norm`.
    out : array, optional
        Where to write the result; may be y itself.

    Returns
    -------
    ndarray
        Of y's shape, dtype and order of axes in memory, but float32 for uint8 and int8.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, a gamma is 0, or variance + epsilon is negative. Nothing has been written then.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.denormalize(np.array([[-1.0], [1.0]]), [3.0], [4.0], epsilon=0.0)
    array([[1.],
           [5.]])
    """
    data = checks.data(y, "y")
    axes = layouts.channel_axes(axis, layout, data.ndim, "y")
    shape = layouts.channel_shape(data.shape, axes)
    center = checks.required(mean, "mean", shape)
    total = checks.required(variance, "variance", shape).astype(np.float64) + checks.epsilon(epsilon)
    scale, shift = checks.parameter(gamma, "gamma", shape), checks.parameter(beta, "beta", shape)
    if scale is not None:
        checks.not_zero(scale, "gamma", "where it is divided by")
    if (total < 0).any():
        raise ValueError(must("variance", "be at least -epsilon", total.min() - epsilon))
    if out is not None:
        result = checks.output(out, data.shape, checks.result_dtype(data.dtype))
        checks.in_place_or_apart(result, "out", data, "y")
        checks.apart(result, "out", mean=center, beta=shift)
    deviation = np.sqrt(total)
    # Inference itself, around beta, with a deviation of 1.
    return normalize(
        data,
        (np.zeros_like(total) if shift is None else shift).reshape(shape),
        np.ones(shape),
        gamma=(deviation if scale is None else deviation / scale).reshape(shape),
        beta=center.reshape(shape),
        epsilon=0.0,
        axis=axis,
        layout=layout,
        out=out,
    )
