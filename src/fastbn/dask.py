"""Statistics and normalization of Dask arrays: lazy, block by block, merged in a tree.

Needs Dask: ``pip install "fastbn[dask]"``. That brings scikit-learn too, for `BatchNormScaler`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import dask
    import dask.array as da
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise ImportError('fastbn.dask needs Dask: pip install "fastbn[dask]"') from error

from . import activation as activations
from . import checks, normalization
from . import layout as layouts
from . import weights as weighting
from .errors import must
from .moments import Moments
from .moments import moments as moments_of_block
from .running import Running

Array = NDArray[Any]

__all__ = ["BatchNormScaler", "batch_norm", "moments", "normalize"]  # noqa: F822 - the scaler comes by __getattr__

# What stands for a channel on its way up the tree.
PART: Final = np.dtype([(name, np.float64) for name in ("count", "mean", "low", "m2")])


def moments(
    x: Any,
    *,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    nan_policy: Literal["propagate", "omit", "raise"] = "propagate",
    split_every: int | None = None,
) -> Any:
    """Return the moments of a Dask array, lazily.

    Parameters
    ----------
    x : dask.array.Array
        Data of a type that `fastbn.moments` takes, in any chunks: their sizes may be unknown, some may be empty, and
        they may cut the channel axis.
    axis, layout
        The channel axis, as in `batch_norm`.
    nan_policy : {"propagate", "omit", "raise"}, default: "propagate"
        What NaN does, as in `fastbn.moments`; "raise" does so when the block that has it is computed.
    split_every : int, optional
        How many parts are merged at a time; Dask's own setting by default.

    Returns
    -------
    dask.delayed.Delayed
        Of `fastbn.Moments`: call ``compute()``.

    Raises
    ------
    TypeError
        If x is no Dask array, or has another dtype.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastbn.dask
    >>> m = fastbn.dask.moments(da.ones((1000, 3), chunks=(100, 3))).compute()
    >>> m.count, m.mean
    (1000, array([1., 1., 1.]))
    """
    x, axes = _checked(x, axis, layout)
    checks.one_of(nan_policy, "nan_policy", weighting.NAN_POLICIES)
    return dask.delayed(_to_moments, pure=True)(_parts(x, axes, split_every, nan_policy))


def normalize(
    x: Any,
    mean: Any,
    variance: Any,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    activation: str | tuple[str, float] | None = None,
) -> Any:
    """Normalize a Dask array with given statistics, block by block, lazily.

    Parameters
    ----------
    x : dask.array.Array
        The data, in any chunks.
    mean, variance : array_like or dask.array.Array of shape (channels,)
        The statistics.
    gamma, beta, epsilon, axis, layout, activation
        As in `fastbn.normalize`.

    Returns
    -------
    dask.array.Array
        Of x's shape, chunks and dtype, but float32 for uint8 and int8.

    Raises
    ------
    TypeError, ValueError
        As in `fastbn.normalize`.
    """
    x, axes = _checked(x, axis, layout)
    shape = tuple(x.shape[a] for a in axes)
    epsilon = checks.epsilon(epsilon)
    activation = activations.named(activation)
    parameters = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    arguments: list[Any] = []
    for name, value in parameters.items():
        if value is None:
            if name in ("mean", "variance"):
                raise ValueError(must(name, "be given", "None"))
            arguments += [None, None]
            continue
        if not isinstance(value, da.Array):
            value = checks.required(value, name, shape).reshape(shape)
            value = da.from_array(value, chunks=tuple(x.chunks[a] for a in axes))
        elif value.shape != shape:
            raise ValueError(must(name, f"have shape {shape}", value.shape))
        value = value.rechunk(tuple(x.chunks[a] for a in axes))
        arguments += [value, axes]
    dtype = checks.result_dtype(x.dtype)
    return da.blockwise(
        partial(_normalize_block, epsilon=epsilon, axis=axes, activation=activation),
        tuple(range(x.ndim)),
        x,
        tuple(range(x.ndim)),
        *arguments,
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
        align_arrays=False,
    )


def batch_norm(
    x: Any,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    activation: str | tuple[str, float] | None = None,
    split_every: int | None = None,
) -> Any:
    """Normalize a Dask array with the statistics of all of it, lazily.

    Two passes over the chunks: one for the statistics, one to normalize. Chunks that are not persisted are computed for
    both. For statistics that stay, take `moments` and `normalize`.

    Parameters
    ----------
    x, gamma, beta, epsilon, axis, layout, activation
        As in `normalize`.
    split_every : int, optional
        As in `moments`.

    Returns
    -------
    dask.array.Array
        Of x's shape, chunks and dtype, but float32 for uint8 and int8.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`.
    """
    x, axes = _checked(x, axis, layout)
    parts = _parts(x, axes, split_every)
    mean = parts["mean"] + parts["low"]
    variance = parts["m2"] / da.maximum(parts["count"], 1)
    return normalize(x, mean, variance, gamma=gamma, beta=beta, epsilon=epsilon, axis=axes, activation=activation)


def __getattr__(name: str) -> Any:
    """Load the scaler, and scikit-learn with it, when it is asked for."""
    if name == "BatchNormScaler":
        from .dask_scaler import BatchNormScaler

        return BatchNormScaler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _checked(x: Any, axis: Any, layout: str | None) -> tuple[Any, tuple[int, ...]]:
    """Return x with at least one axis beside its channels, and the channel axes, in the order given."""
    if not isinstance(x, da.Array):
        raise TypeError(must("x", "be a dask array", type(x).__name__))
    checks.data(np.empty(0, x.dtype), "x")
    axes = layouts.channel_axes(axis, layout, x.ndim)
    for a in axes:
        if math.isnan(x.shape[a]):
            raise ValueError(
                must(
                    "x", f"have known chunk sizes along its channel axis {a} (x.compute_chunk_sizes())", "unknown ones"
                )
            )
    return x, axes


def _parts(x: Any, axes: tuple[int, ...], split_every: int | None, nan_policy: str = "propagate") -> Any:
    """Return a Dask array of PART, one per channel, whose axes are the channel axes as they are given."""
    if x.ndim == len(axes):  # nothing to reduce: one value per channel
        x, axes = x[None], tuple(a + 1 for a in axes)
    others = tuple(a for a in range(x.ndim) if a not in axes)
    ascending = tuple(sorted(axes))
    parts = da.reduction(
        x,
        chunk=partial(_part_of_block, axes=ascending, nan_policy=nan_policy),
        combine=_merge_blocks,
        aggregate=_merge_blocks,
        axis=others,
        dtype=PART,
        meta=np.empty((0,) * len(axes), PART),
        split_every=split_every,
    )
    return parts.transpose([ascending.index(a) for a in axes])


def to_part(running: Running) -> Array:
    """Return statistics as an array of PART."""
    part = np.empty(len(running.count), PART)
    for name in PART.names or ():
        part[name] = getattr(running, name)
    return part


def from_part(part: Array) -> Running:
    """Return an array of PART as statistics."""
    return Running(*(np.ascontiguousarray(part[name]).reshape(-1) for name in PART.names or ()))


def _part_of_block(block: Array, axis: Any, keepdims: bool, *, axes: tuple[int, ...], nan_policy: Any) -> Array:
    """Return the statistics of a block, with the axes that are reduced of length 1; the others are ascending."""
    part = to_part(Running.from_moments(moments_of_block(block, axis=axes, nan_policy=nan_policy)))
    return part.reshape([n if i in axes else 1 for i, n in enumerate(block.shape)])


def _merge_blocks(parts: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """Merge parts that lie along the reduced axes, in their order."""
    axis = tuple(sorted(axis))
    rows = np.moveaxis(parts, axis, range(len(axis)))
    kept = rows.shape[len(axis) :]
    total = Running.nothing(math.prod(kept))
    for row in rows.reshape(-1, math.prod(kept)) if rows.size else ():
        total.merge(from_part(row))
    result = to_part(total).reshape(kept)
    return np.expand_dims(result, axis) if keepdims else result


def _to_moments(part: Array) -> Moments:
    return from_part(part).to_moments()


def _normalize_block(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    epsilon: float,
    axis: tuple[int, ...],
    activation: Any,
) -> Array:
    arguments = {"gamma": gamma, "beta": beta, "epsilon": epsilon, "axis": axis, "activation": activation}
    return normalization.normalize(x, mean, variance, **arguments)
