"""Folding a batch norm into the layer before it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from . import layout as layouts
from .errors import must
from .layer import BatchNorm
from .normalization import normalize

Array = NDArray[Any]

# Orders of a weight's axes: O output channels, I input channels, M the multiplier of a depthwise convolution, whose
# output channel is i * M + m; the others are positions.
WEIGHT_LAYOUTS: Final = (
    "OI", "OIW", "OIHW", "OIDHW",  # PyTorch, ONNX; depthwise and grouped as well
    "IO", "WIO", "HWIO", "DHWIO",  # Keras, TensorFlow
    "IOW", "IOHW", "IODHW",  # transposed convolutions of PyTorch and ONNX
    "WOI", "HWOI", "DHWOI",  # those of Keras and TensorFlow
    "WIM", "HWIM", "DHWIM",  # depthwise convolutions of Keras and TensorFlow
)  # fmt: skip


def fold(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: BatchNorm,
    *,
    axis: int | tuple[int, ...] | None = None,
    weight_layout: str | None = None,
    groups: int = 1,
) -> tuple[Array, Array]:
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
        A built layer.
    axis : int or tuple of ints, optional
        The axis of `weight` that holds the output channels: 0 for (out, in, height, width), -1 for (height, width, in,
        out) and for a dense (in, out). Of a tuple, every combination of indices is a channel, in this order.
    weight_layout : str, optional
        Names the axes instead: O output channels, I input channels, M the multiplier of a depthwise convolution. OI,
        OIW, OIHW, OIDHW; IO, WIO, HWIO, DHWIO; transposed IOW, IOHW, IODHW, WOI, HWOI, DHWOI; depthwise WIM, HWIM,
        DHWIM.
    groups : int, default: 1
        Groups of a convolution. They matter where O holds the channels of one group only, as in a transposed
        convolution of PyTorch, (in, out / groups, height, width); that needs `weight_layout`.

    Returns
    -------
    weight : ndarray
        New weight of the same shape and dtype, but float32 for uint8 and int8.
    bias : ndarray of shape (channels,)
        New bias, of the new weight's dtype.

    Raises
    ------
    TypeError, ValueError
        If bn is no built layer with moving statistics, an argument is none of these, or a shape does not fit.

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
    if not isinstance(bn, BatchNorm):
        raise TypeError(must("bn", "be a BatchNorm", type(bn).__name__))
    features = bn.moving_mean.shape
    number = checks.count(groups, "groups")
    if number == 0:
        raise ValueError(must("groups", "be at least 1", 0))
    split, axes = kernel, _channel_axes(kernel, axis, weight_layout)
    wanted = layouts.channel_shape(kernel.shape, axes)
    if number > 1 and len(axes) == 1 and wanted[0] != bn.moving_mean.size:
        split, axes = _by_group(kernel, axes[0], weight_layout, number)
    shape = layouts.channel_shape(split.shape, axes)
    if shape != features and (len(features) != 1 or int(np.prod(shape)) != features[0]):
        where = f"along axis {axis}" if weight_layout is None else f"in layout {weight_layout}"
        by = f" in {number} groups" if number > 1 else ""
        raise ValueError(must("weight", f"have {features} channels {where}{by}", wanted))
    offset = checks.parameter(bias, "bias", features)
    gamma = None if bn.gamma is None else bn.gamma.reshape(shape)
    # Both are batch norms in inference themselves: of the weight, around mean 0, and of the bias as a batch of one.
    scaled = normalize(
        split,
        np.zeros(shape),
        bn.moving_variance.reshape(shape),
        gamma=gamma,
        epsilon=bn.epsilon,
        axis=axes,
    )
    shifted = normalize(
        np.zeros(features) if offset is None else offset.astype(np.float64).reshape(features),
        bn.moving_mean,
        bn.moving_variance,
        gamma=bn.gamma,
        beta=bn.beta,
        epsilon=bn.epsilon,
        axis=tuple(range(len(features))),
    )
    return scaled.reshape(kernel.shape), shifted.astype(scaled.dtype)


def _channel_axes(kernel: Array, axis: Any, weight_layout: Any) -> tuple[int, ...]:
    """Return the axes of a weight whose indices together are the output channels."""
    if (axis is None) == (weight_layout is None):
        raise ValueError("axis or weight_layout must be given, got " + ("neither" if axis is None else "both"))
    if weight_layout is None:
        return layouts.channel_axes(axis, None, kernel.ndim, "weight")
    checks.one_of(weight_layout, "weight_layout", WEIGHT_LAYOUTS)
    if kernel.ndim != len(weight_layout):
        raise ValueError(
            must("weight", f"have {len(weight_layout)} dimensions with weight_layout {weight_layout!r}", kernel.ndim)
        )
    if "M" in weight_layout:
        return weight_layout.index("I"), weight_layout.index("M")
    return (weight_layout.index("O"),)


def _by_group(kernel: Array, axis: int, weight_layout: str | None, groups: int) -> tuple[Array, tuple[int, int]]:
    """Return a weight whose input channels come group by group, with an axis of groups, and the axes of channels."""
    if weight_layout is None:
        raise ValueError(must("weight_layout", "be given where an axis holds the channels of one group only", "None"))
    inputs = weight_layout.index("I")
    if kernel.shape[inputs] % groups:
        raise ValueError(must("weight", f"have input channels in {groups} equal groups", kernel.shape[inputs]))
    sizes = groups, kernel.shape[inputs] // groups
    split = kernel.reshape(*kernel.shape[:inputs], *sizes, *kernel.shape[inputs + 1 :])
    return split, (inputs, axis + (axis > inputs))
