"""Folding a batch norm into the layer before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from . import layout as layouts
from .errors import must
from .functional import normalize
from .layer import BatchNorm

Array = NDArray[Any]


def fold(weight: ArrayLike, bias: ArrayLike | None, bn: BatchNorm, *, axis: int) -> tuple[Array, Array]:
    """Fold a batch norm in inference into the dense or convolution layer before it.

    With s = gamma / sqrt(moving_variance + epsilon)::

        weight' = weight * s,   bias' = (bias - moving_mean) * s + beta

    An activation of the layer is not part of it: apply that to the result.

    Parameters
    ----------
    weight : array_like of float16, bfloat16, float32, float64, uint8 or int8
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
        New weight of the same shape and dtype, but float32 for uint8 and int8.
    bias : ndarray of shape (channels,)
        New bias, of the new weight's dtype.

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
    if not isinstance(bn, BatchNorm):
        raise TypeError(must("bn", "be a BatchNorm", type(bn).__name__))
    # Both are batch norms in inference themselves: of the weight, around mean 0, and of the bias as a batch of one.
    if bn.moving_mean.shape != shape:
        raise ValueError(must("weight", f"have {bn.moving_mean.shape} channels along axis {axis}", shape))
    offset = checks.parameter(bias, "bias", shape)
    scaled = normalize(
        kernel,
        np.zeros(shape),
        bn.moving_variance,
        gamma=bn.gamma,
        epsilon=bn.epsilon,
        axis=axis,
    )
    shifted = normalize(
        np.zeros(shape) if offset is None else offset.astype(np.float64),
        bn.moving_mean,
        bn.moving_variance,
        gamma=bn.gamma,
        beta=bn.beta,
        epsilon=bn.epsilon,
    )
    return scaled, shifted.astype(scaled.dtype)
