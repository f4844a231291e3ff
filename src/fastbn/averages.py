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
from numpy.typing import NDArray

from . import checks
from .errors import must

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


def blend(average: Array, value: Array, share: float, taken: Array | None = None) -> None:
    """Update an average of any shape in place, in float64; where `taken` is False it stays as it is.

    A share of 0 replaces the old value whatever that was, infinity and NaN included.
    """
    new = np.asarray(value, np.float64).reshape(average.shape)
    if share:
        new = share * average.astype(np.float64) + (1.0 - share) * new
    if taken is None:
        average[...] = new
    else:
        np.copyto(average, new, where=taken.reshape(average.shape), casting="same_kind")
