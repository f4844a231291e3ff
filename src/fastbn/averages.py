"""Averages over batches: which share of the old value stays, and how new values come in.

All of them have one form, ``average = share * average + (1 - share) * batch``. With t batches, this one included:

==================  =======================================  ====================================================
average             share                                    what it is
==================  =======================================  ====================================================
momentum p          p                                        exponential, with (1 - p) p^(t - i) of batch i
momentum None       (t - 1) / t                              the mean of all batches
p, zero_debias      p (1 - p^(t - 1)) / (1 - p^t)            exponential from 0, divided by its weight 1 - p^t
==================  =======================================  ====================================================

The last two do not depend on the initial value, and need no other state than t: what a debiased average would keep
beside itself is ``average * (1 - p^t)``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from . import weights as weighting
from .errors import must
from .kernels import _channels
from .passes import Statistics, updated_moving

Array = NDArray[Any]


def momentum(value: Any) -> float | None:
    """Return a momentum as users write it, checked: a number in [0, 1], or None."""
    return None if value is None else checks.momentum(value)


def share(momentum: float | None, batches: int, *, zero_debias: bool = False) -> float:
    """Return the share of the old value that stays.

    Parameters
    ----------
    momentum : float or None
        In [0, 1]; None for the mean of all batches.
    batches : int
        Batches before this one.
    zero_debias : bool
        Whether the average is that from 0, divided by the sum of its weights. With momentum 1 nothing ever comes in.

    Returns
    -------
    float
        In [0, 1].
    """
    if momentum is None:
        return batches / (batches + 1)
    if not zero_debias or momentum == 1:
        return momentum
    if momentum == 0 or not batches:
        return 0.0
    log = math.log(momentum)
    return momentum * math.expm1(batches * log) / math.expm1((batches + 1) * log)


def given_share(momentum: Any, batches: Any, *, zero_debias: Any = False, needed: Any = True) -> Any:
    """Return the share for arguments of a function; a plain momentum is left for others to check.

    Where no batch comes in nothing is `needed`.
    """
    debiased = checks.flag(zero_debias, "zero_debias")
    before = None if batches is None else checks.count(batches, "batches")
    if momentum is not None and not debiased:
        return momentum
    if before is None:
        if needed:
            argument = "zero_debias=True" if debiased else "momentum=None"
            raise ValueError(must("batches", f"be given with {argument}", "None"))
        return 0.0
    return share(None if momentum is None else checks.momentum(momentum), before, zero_debias=debiased)


def blended(average: Array, value: Array, share: float, taken: Array | None = None) -> Array:
    """Return an average of any shape, updated in float64; where `taken` is False it is as it was.

    A share of 0 replaces the old value whatever that was, infinity and NaN included.
    """
    new = np.asarray(value, np.float64).reshape(average.shape)
    with np.errstate(all="ignore"):
        if share:
            new = share * average.astype(np.float64) + (1.0 - share) * new
        new = np.asarray(new, average.dtype)
    return new if taken is None else np.where(taken.reshape(average.shape), new, average)


def update_moving(
    moving_mean: Array,
    moving_variance: Array,
    mean: ArrayLike,
    variance: ArrayLike,
    *,
    momentum: float | None,
    count: int | float | ArrayLike | None = None,
    ddof: int = 0,
    batches: int | None = None,
    zero_debias: bool = False,
) -> None:
    """Update moving statistics in place: ``moving = momentum * moving + (1 - momentum) * batch``.

    Parameters
    ----------
    moving_mean, moving_variance : array of float32 or float64
        Moving statistics, of one shape.
    mean, variance : array_like
        Statistics of a batch; the variance divided by the count (ddof 0).
    momentum : float or None
        Share of the old value that is kept, in [0, 1]. With None the moving statistics are the means over all batches.
    count : int, float or array_like of shape (channels,), optional
        Values per channel in the batch, or the sum of their weights, as in `Moments`; needed for ddof 1. A channel of
        count 0 stays as it is.
    ddof : {0, 1}, default: 0
        The variance that goes into the moving one is divided by count - ddof.
    batches : int, optional
        How many batches the moving arrays have seen before. Needed for ``momentum=None`` and for `zero_debias`.
    zero_debias : bool, default: False
        Whether the moving statistics are averages from 0 divided by the sum of their weights, ``1 - momentum**t`` after
        t batches, so that the first batch replaces what they were.

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
    share = checks.momentum(given_share(momentum, batches, zero_debias=zero_debias))
    degrees = checks.ddof(ddof)
    if count is None:
        if degrees:
            raise ValueError(must("count", "be given with ddof 1", "None"))
        values: weighting.Count = 1
    else:
        values = weighting.checked_count(count, math.prod(shape))
    if np.any(values):
        _channels.put(updated_moving(target_mean, target_variance, statistics, values, share, degrees))
