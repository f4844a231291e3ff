"""Moments that merge: count, mean and sum of squared deviations per channel."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks, kernels
from . import layout as layouts
from . import weights as weighting
from .errors import must
from .kernels import _channels
from .passes import refuse_nan, run

Array = NDArray[Any]


class Moments:
    """Count, mean and sum of squared deviations (m2) of channels.

    Parts of a data set, in any split, merge to the moments of the whole (Chan, Golub, LeVeque 1982): over batches, over
    threads, over machines.

    Parameters
    ----------
    num_features : int, optional
        Number of channels; by default that of the first data.

    Attributes
    ----------
    count : int, float, or ndarray of shape (channels,)
        Values per channel; with weights, their sums (float). An array where channels differ: int64 where values are
        missing or masked, float64 with weights.
    mean : ndarray of float64, shape (channels,)
        In the units of the data; 0 where there are no data.
    m2 : ndarray of float64, shape (channels,)
        Sum of squared deviations from the mean, in squared units; never negative.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> a = fastbn.moments(np.array([[1.0], [2.0]]))
    >>> b = fastbn.moments(np.array([[6.0]]))
    >>> (a + b).mean, (a + b).variance()
    (array([3.]), array([4.66666667]))
    """

    def __init__(self, num_features: int | None = None) -> None:
        channels = 0 if num_features is None else checks.count(num_features, "num_features")
        self.count: int | float | Array = 0
        self.mean: Array = np.zeros(channels)
        self.m2: Array = np.zeros(channels)
        self._sized = num_features is not None

    def variance(self, ddof: int = 0) -> Array:
        """Return the variance per channel.

        Parameters
        ----------
        ddof : {0, 1}, default: 0
            m2 is divided by count - ddof, or by count where that is not positive: of one value the variance is 0 for
            either.

        Returns
        -------
        ndarray of float64, shape (channels,)
            NaN where there are no data.
        """
        degrees = checks.ddof(ddof)
        if not isinstance(self.count, int):
            return _channels.variance_counted(self.m2, self._counts(), degrees, np.nan)
        if self.count == 0:
            return np.full(self.mean.shape, np.nan)
        return _channels.variance(self.m2, max(self.count - degrees, 1))

    def _counts(self) -> Array:
        return weighting.per_channel(self.count, len(self.mean))

    def update(
        self,
        x: ArrayLike,
        *,
        axis: int | tuple[int, ...] = -1,
        layout: str | None = None,
        mask: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        nan_policy: Literal["propagate", "omit", "raise"] = "propagate",
    ) -> Self:
        """Add the values of a batch.

        Parameters
        ----------
        x : array_like of float16, bfloat16, float32, float64, uint8 or int8
            Data of any rank from 1 up; empty data change nothing.
        axis, layout, mask, sample_weight, nan_policy
            As in `batch_norm`.

        Returns
        -------
        Moments
            This object.
        """
        batch = moments(x, axis=axis, layout=layout, mask=mask, sample_weight=sample_weight, nan_policy=nan_policy)
        return self.merge(batch)

    def merge(self, other: Moments) -> Self:
        """Add the values that another object has seen.

        Parameters
        ----------
        other : Moments
            Of the same channels; it stays as it is.

        Returns
        -------
        Moments
            This object.

        Raises
        ------
        TypeError
            If other is none.
        ValueError
            If the number of channels differs, or both together have more than 2**53 values.
        """
        if not isinstance(other, Moments):
            raise TypeError(must("other", "be Moments", type(other).__name__))
        if not other._sized:
            return self
        if self._sized and other.mean.shape != self.mean.shape:
            raise ValueError(must("other", f"have {len(self.mean)} channels", len(other.mean)))
        if not self._sized:
            self.count, self.mean, self.m2 = copy(other.count), other.mean.copy(), other.m2.copy()
            self._sized = True
        elif np.any(other.count):
            count = weighting.added(self.count, other.count)
            mean, m2 = self.mean.copy(), self.m2.copy()
            if isinstance(self.count, int) and isinstance(other.count, int):
                _channels.merge_moments(self.count, mean, m2, other.count, other.mean, other.m2)
            else:
                _channels.merge_moments_counted(self._counts(), mean, m2, other._counts(), other.mean, other.m2)
            self.count, self.mean, self.m2 = count, mean, m2
        return self

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both."""
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments().merge(self).merge(other)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same numbers, NaN being itself."""
        if not isinstance(other, Moments):
            return NotImplemented
        return np.array_equal(self.count, other.count) and all(
            np.array_equal(a, b, equal_nan=True) for a, b in ((self.mean, other.mean), (self.m2, other.m2))
        )

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        """Describe the object."""
        return f"<fastbn.Moments of {len(self.mean)} channels, {weighting.described(self.count)}>"

    def to_dict(self) -> dict[str, Any]:
        """Return {"count": int, float or array, "mean": array, "m2": array}; the arrays are copies."""
        return {"count": copy(self.count), "mean": self.mean.copy(), "m2": self.m2.copy()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the object that `to_dict` described.

        Parameters
        ----------
        state : mapping
            With "count", "mean" and "m2".

        Returns
        -------
        Moments
            A new object.

        Raises
        ------
        TypeError, ValueError
            If a key is missing or unknown, or its value does not fit.
        """
        checks.mapping(state, "state")
        if set(state) != {"count", "mean", "m2"}:
            raise ValueError(must("state", "have the keys count, mean and m2", ", ".join(map(str, state)) or "none"))
        shape = checks.as_array(state["mean"], "mean").shape
        if len(shape) != 1:
            raise ValueError(must("mean", "have one dimension", f"shape {shape}"))
        result = cls(shape[0])
        result.count = weighting.checked_count(state["count"], shape[0])
        result.mean = checks.required(state["mean"], "mean", shape).astype(np.float64)
        result.m2 = checks.required(state["m2"], "m2", shape).astype(np.float64)
        empty = result._counts() == 0
        if result.mean[empty].any() or result.m2[empty].any():
            raise ValueError(must("mean and m2", "be 0 where count is 0", "other values"))
        if (result.m2 < 0).any():
            raise ValueError(must("m2", "not be negative", result.m2.min()))
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds."""
        return self.to_dict() if self._sized else {"count": 0}  # pickle's first protocols leave an empty one out

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, checked like any other state."""
        source = self.from_dict(state) if "mean" in state else type(self)()
        self.__dict__.update(source.__dict__)


def moments(
    x: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    mask: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    nan_policy: Literal["propagate", "omit", "raise"] = "propagate",
) -> Moments:
    """Return count, mean and sum of squared deviations per channel.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32, float64, uint8 or int8
        Data of any rank from 1 up.
    axis, layout
        The channel axis, as in `batch_norm`. With several axes the channels of the result are flat.
    mask, sample_weight, nan_policy
        As in `batch_norm`. The count is then that of the values that count, or the sum of their weights.

    Returns
    -------
    Moments
        In float64, whatever the data are.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> m = fastbn.moments(np.array([[1.0, -2.0], [3.0, -6.0]]))
    >>> m.count, m.mean, m.variance(ddof=1)
    (2, array([ 2., -4.]), array([2., 8.]))

    Missing values, per channel:

    >>> m = fastbn.moments(np.array([[1.0, np.nan], [3.0, -6.0]]), nan_policy="omit")
    >>> m.count, m.mean
    (array([2, 1]), array([ 2., -6.]))
    """
    array = checks.data(x, "x")
    axes = layouts.channel_axes(axis, layout, array.ndim)
    result = Moments(int(np.prod(layouts.channel_shape(array.shape, axes))))
    later = nan_policy != "raise" and array.size > 0
    weights = weighting.resolved(mask, sample_weight, nan_policy, array, axes, later=later)
    if nan_policy == "raise":
        refuse_nan(array, axes, weights)
    total = None if weights is None else np.zeros(len(result.mean))
    arguments: dict[str, Any] = {"first": result.mean, "second": result.m2, "total": total}
    if array.size and not run(kernels.MOMENTS, axes, array, weights=weights, **arguments):
        assert weights is not None
        weights = weights.settled(axes)
        run(kernels.MOMENTS, axes, array, weights=weights, **arguments)
    if weights is None or total is None:
        result.count = layouts.values_per_channel(array.shape, axes)
    else:
        result.m2 *= weights.scale
        result.count = weighting.tidy(weights.counts(total))
    return result
