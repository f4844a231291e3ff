"""The primitives of ``tf.nn`` that batch normalization was written with in TensorFlow 1, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import averages, checks, functional, normalization
from .. import layout as layouts
from ..errors import must
from ..moments import Moments
from ..moments import moments as channel_moments

__all__ = [
    "moments",
    "weighted_moments",
    "sufficient_statistics",
    "normalize_moments",
    "batch_normalization",
    "fused_batch_norm",
    "relu",
    "relu6",
]

Array = NDArray[Any]

# The fused operation of TensorFlow 1 raised a smaller epsilon to this.
FUSED_EPSILON: Final = 1.001e-5


def moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    shift: ArrayLike | None = None,
    name: str | None = None,
    keep_dims: bool | None = None,
    keepdims: bool | None = None,
) -> tuple[Array, Array]:
    """Return mean and variance over axes: ``tf.nn.moments``.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        Data.
    axes : int or sequence of ints
        The axes that are reduced; in `fastbn.moments` it is the others that are named.
    shift, name : optional
        Ignored, as TensorFlow 1 had it.
    keep_dims, keepdims : bool, optional
        Whether reduced axes stay, with extent 1; by default they do not. Both are one argument.

    Returns
    -------
    mean, variance : ndarray
        Of x's dtype (float32 for 8-bit data), the variance divided by the count; NaN without a value. Sums are
        float64.

    Raises
    ------
    TypeError, ValueError
        If the dtype or an axis does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_nn
    >>> tf_nn.moments(np.array([[1.0, 2.0], [3.0, 6.0]]), [0])
    (array([2., 4.]), array([1., 4.]))
    """
    data, reduced = _reduction(x, axes)
    return _mean_and_variance(_moments(data, reduced), data, reduced, _keeps(keep_dims, keepdims))


def weighted_moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    frequency_weights: ArrayLike,
    name: str | None = None,
    keep_dims: bool | None = None,
    keepdims: bool | None = None,
) -> tuple[Array, Array]:
    """Return weighted mean and variance over axes: ``tf.nn.weighted_moments``.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        Data.
    axes : int or sequence of ints
        The axes that are reduced.
    frequency_weights : array_like
        Not negative, and broadcast to x: a weight of 2 counts a value twice.
    name : optional
        Ignored.
    keep_dims, keepdims : bool, optional
        Whether reduced axes stay, with extent 1; by default they do not. Both are one argument.

    Returns
    -------
    mean, variance : ndarray
        ``sum(w * x) / sum(w)`` and ``sum(w * (x - mean)**2) / sum(w)``, of x's dtype; NaN where all weights are 0.

    Raises
    ------
    TypeError, ValueError
        If a dtype, an axis or the shape of the weights does not fit, or a weight is negative.
    """
    data, reduced = _reduction(x, axes)
    weights = _broadcast(checks.as_array(frequency_weights, "frequency_weights"), data, "frequency_weights")
    found = _moments(data, reduced, np.asarray(weights, order="C"))
    return _mean_and_variance(found, data, reduced, _keeps(keep_dims, keepdims))


def sufficient_statistics(
    x: ArrayLike,
    axes: int | Sequence[int],
    shift: ArrayLike | None = None,
    keep_dims: bool | None = None,
    name: str | None = None,
    keepdims: bool | None = None,
) -> tuple[int, Array, Array, Array | None]:
    """Return count, sum and sum of squares over axes: ``tf.nn.sufficient_statistics``.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        Data.
    axes : int or sequence of ints
        The axes that are reduced.
    shift : array_like, optional
        Taken off the data first; broadcast to x.
    keep_dims, keepdims : bool, optional
        Whether reduced axes stay, with extent 1; by default they do not. Both are one argument.
    name : optional
        Ignored.

    Returns
    -------
    count : int
        Values that went into each sum.
    mean_ss, variance_ss : ndarray
        ``sum(x - shift)`` and ``sum((x - shift)**2)``, in float64: TensorFlow's float32 loses the variance of data far
        from the shift.
    shift : ndarray or None
        As it was given.

    Raises
    ------
    TypeError, ValueError
        If a dtype, an axis or the shape of the shift does not fit.
    """
    data, reduced = _reduction(x, axes)
    given = None if shift is None else checks.as_array(shift, "shift")
    if given is not None:
        data = np.subtract(data.astype(np.float64), _broadcast(given, data, "shift"), dtype=np.float64)
    found = _moments(data, reduced)
    count, keep = int(found.count), _keeps(keep_dims, keepdims)
    mean, m2 = (_kept(v, data, reduced, keep) for v in (found.mean, found.m2))
    return count, count * mean, m2 + count * mean**2, given


def normalize_moments(
    counts: float, mean_ss: ArrayLike, variance_ss: ArrayLike, shift: ArrayLike | None, name: str | None = None
) -> tuple[Array, Array]:
    """Return mean and variance from what `sufficient_statistics` returned: ``tf.nn.normalize_moments``.

    Parameters
    ----------
    counts : int
        Values that went into each sum.
    mean_ss, variance_ss : array_like
        Sum and sum of squares, less the shift.
    shift : array_like or None
        As it was given there.
    name : optional
        Ignored.

    Returns
    -------
    mean, variance : ndarray
        Of the dtype of mean_ss. What rounding of the sums may have made of a variance near 0 is 0; it is negative only
        for sums that no data has, as in TensorFlow.

    Raises
    ------
    ValueError
        If counts is not positive.
    """
    if not np.all(np.asarray(counts) > 0):
        raise ValueError(must("counts", "be positive", counts))
    first, second = np.asarray(mean_ss), np.asarray(variance_ss)
    shifted, square = first.astype(np.float64) / counts, second.astype(np.float64) / counts
    variance = square - shifted**2
    # Each term may have added a rounding to the sums.
    rounding = np.finfo(np.result_type(first, second, np.float16)).eps * counts * (abs(square) + shifted**2)
    variance = np.where((variance < 0) & (variance >= -rounding), 0, variance)
    mean = shifted if shift is None else shifted + np.asarray(shift)
    return mean.astype(first.dtype), variance.astype(first.dtype)


def batch_normalization(
    x: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    offset: ArrayLike | None,
    scale: ArrayLike | None,
    variance_epsilon: float,
    name: str | None = None,
) -> Array:
    """Return ``scale * (x - mean) / sqrt(variance + variance_epsilon) + offset``: ``tf.nn.batch_normalization``.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        Data.
    mean, variance : array_like
        Statistics, of any shape that is broadcast to x's.
    offset, scale : array_like or None
        Of any shape that is broadcast to x's.
    variance_epsilon : float
        Added to the variance.
    name : optional
        Ignored.

    Returns
    -------
    ndarray
        Of x's shape and dtype, but float32 for uint8 and int8.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape or epsilon does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_nn
    >>> tf_nn.batch_normalization(np.array([[1.0], [5.0]]), [3.0], [4.0], None, None, 0.0)
    array([[-1.],
           [ 1.]])
    """
    data = checks.data(x, "x")
    given = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    arrays = {name: None if v is None else checks.as_array(v, name) for name, v in given.items()}
    for which, array in arrays.items():
        if array is None:
            if which in ("mean", "variance"):
                raise ValueError(must(which, "be given", "None"))
        elif array.ndim > data.ndim or any(n not in (1, m) for n, m in zip(array.shape[::-1], data.shape[::-1])):
            raise ValueError(must(which, f"broadcast to shape {data.shape}", array.shape))
    shapes = [(1,) * (data.ndim - a.ndim) + a.shape for a in arrays.values() if a is not None]
    axes = tuple(axis for axis in range(data.ndim) if any(shape[axis] != 1 for shape in shapes))
    extents = tuple(data.shape[axis] for axis in axes) or (1,)

    def channels(array: Array | None) -> Array | None:
        if array is None:
            return None
        full = array.reshape((1,) * (data.ndim - array.ndim) + array.shape)
        wide = np.broadcast_to(full, tuple(n if a in axes else 1 for a, n in enumerate(data.shape)))
        return np.array(wide).reshape(extents)

    y = normalization.normalize(
        data if axes else data[..., None],
        channels(arrays["mean"]),  # type: ignore[arg-type]
        channels(arrays["variance"]),  # type: ignore[arg-type]
        gamma=channels(arrays["scale"]),
        beta=channels(arrays["offset"]),
        epsilon=variance_epsilon,
        axis=axes or -1,
    )
    return y.reshape(data.shape)


def fused_batch_norm(
    x: ArrayLike,
    scale: ArrayLike,
    offset: ArrayLike,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float = 0.001,
    data_format: str = "NHWC",
    is_training: bool = True,
    name: str | None = None,
) -> tuple[Array, Array, Array]:
    """Normalize images, and return the statistics as well: ``tf.nn.fused_batch_norm``.

    Parameters
    ----------
    x : array_like of rank 4
        Images.
    scale, offset : array_like of shape (channels,)
        Gamma and beta.
    mean, variance : array_like of shape (channels,), optional
        Statistics to normalize with; needed with is_training=False, and not allowed otherwise.
    epsilon : float, default: 0.001
        Added to the variance; at least 1.001e-5.
    data_format : {"NHWC", "NCHW"}
        Where the channels are.
    is_training : bool, default: True
        Whether to normalize with the statistics of the batch.
    name : optional
        Ignored.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype.
    mean, variance : ndarray of shape (channels,)
        Those of the batch, the variance divided by m - 1 (by 1 for m = 1), or NaN without a value; or as they were
        given.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape or an option does not fit.
    """
    data = checks.data(x, "x")
    training = checks.flag(is_training, "is_training")
    checks.one_of(data_format, "data_format", ("NHWC", "NCHW"))
    if training != (mean is None) or training != (variance is None):
        raise ValueError(
            must("mean and variance", "be given without is_training, and only then", f"is_training={training}")
        )
    y, cache = functional.batch_norm_forward(
        data,
        gamma=scale,
        beta=offset,
        moving_mean=mean,
        moving_variance=variance,
        training=training,
        epsilon=max(checks.epsilon(epsilon), FUSED_EPSILON),
        layout=data_format,
    )
    shape = layouts.channel_shape(data.shape, cache.axes)
    dtype = checks.parameter_dtype(data.dtype)
    if not training:
        return y, np.array(mean, dtype), np.array(variance, dtype)
    count = layouts.values_per_channel(data.shape, cache.axes)
    found = np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype)  # which stay without a value
    averages.update_moving(*found, *cache.statistics, momentum=0.0, count=count, ddof=1)
    return y, *found


def relu(features: ArrayLike) -> Array:
    """Return ``max(features, 0)``; as activation_fn of ``tf_contrib.batch_norm`` it is part of the same pass.

    Parameters
    ----------
    features : array_like
        Data.

    Returns
    -------
    ndarray
        Of the same shape and dtype.
    """
    array = np.asarray(features)
    return np.asarray(np.maximum(array, array.dtype.type(0)))


def relu6(features: ArrayLike) -> Array:
    """Return ``min(max(features, 0), 6)``; as activation_fn of ``tf_contrib.batch_norm`` it is part of the same pass.

    Parameters
    ----------
    features : array_like
        Data.

    Returns
    -------
    ndarray
        Of the same shape and dtype.
    """
    array = np.asarray(features)
    return np.asarray(np.minimum(relu(array), array.dtype.type(6)))


def _reduction(x: ArrayLike, axes: Any) -> tuple[Array, tuple[int, ...]]:
    """Return data, and the axes that are reduced, not negative."""
    data = checks.data(x, "x")
    given = list(axes) if isinstance(axes, Sequence | np.ndarray) else [axes]
    reduced = []
    for axis in given:
        if isinstance(axis, bool) or not hasattr(axis, "__index__"):
            raise TypeError(must("axes", "be an int or a sequence of ints", repr(axes)))
        if not -data.ndim <= axis < data.ndim:
            raise ValueError(must("axes", f"be in {-data.ndim} to {data.ndim - 1}", repr(axes)))
        reduced.append(int(axis) % data.ndim)
    if len(set(reduced)) != len(reduced):
        raise ValueError(must("axes", "name each axis once", repr(axes)))
    return data, tuple(sorted(reduced))


def _keeps(keep_dims: bool | None, keepdims: bool | None) -> bool:
    """Return whether reduced axes stay: TensorFlow 1.14 gave the argument a second name."""
    if keepdims is None:
        return bool(keep_dims)
    if keep_dims is not None:
        raise ValueError(must("keep_dims", "be None where keepdims is given", keep_dims))
    return keepdims


def _moments(data: Array, reduced: tuple[int, ...], weights: Array | None = None) -> Moments:
    """Return the moments of the axes that are kept, as channels; a single channel if there are none."""
    kept = tuple(axis for axis in range(data.ndim) if axis not in reduced)
    options: dict[str, Any] = {}
    if weights is not None:
        options["sample_weight"] = weights if kept else weights[..., None]
    return channel_moments(data if kept else data[..., None], axis=kept or -1, **options)


def _mean_and_variance(found: Moments, data: Array, reduced: tuple[int, ...], keep_dims: bool) -> tuple[Array, Array]:
    """Return both in the shape and dtype of results, NaN where nothing counted."""
    empty, dtype = np.asarray(found.count) == 0, checks.result_dtype(data.dtype)
    both = (np.where(empty, np.nan, v) for v in (found.mean, found.variance()))
    return tuple(_kept(v, data, reduced, keep_dims).astype(dtype) for v in both)  # type: ignore[return-value]


def _broadcast(array: Array, data: Array, name: str) -> Array:
    """Return an argument in the shape of the data."""
    try:
        return np.broadcast_to(array, data.shape)
    except ValueError:
        raise ValueError(must(name, f"broadcast to shape {data.shape}", array.shape)) from None


def _kept(flat: Array, data: Array, reduced: tuple[int, ...], keep_dims: bool) -> Array:
    """Return statistics, which are flat, in the shape of the axes that are kept."""
    if keep_dims:
        return flat.reshape(tuple(1 if axis in reduced else n for axis, n in enumerate(data.shape)))
    return flat.reshape(tuple(n for axis, n in enumerate(data.shape) if axis not in reduced))
