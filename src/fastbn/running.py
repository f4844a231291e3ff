"""Statistics of columns that arrive in pieces, as exact far from zero as around it.

`fastbn.Moments` keeps a mean as one float64. At 1e15 the next one is 0.125 away, so single rows of deviation 1 would no
longer move it. Here a mean is a sum of two float64, and a count is one per column, because values may be missing and
rows may have weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from .moments import Moments, moments

Array = NDArray[Any]

# (mean / deviation)^2 from which a column counts as far from zero. In one pass the means of parts are rounded, by up to
# u = 1.1e-16 of them, and so is what squares of deviations are relative to. That moves a variance by a share of about
# u mean / deviation: 1e-12 where the mean is 10000 deviations. Such columns are read once more.
FAR: Final = 1e8
BLOCK: Final = 65536  # values that are converted at a time


@dataclass
class Running:
    """Count, mean (mean + low) and sum of squared deviations per column, all of shape (columns,), in float64."""

    count: Array
    mean: Array
    low: Array
    m2: Array

    @classmethod
    def nothing(cls, columns: int) -> Self:
        """Return the statistics of no data."""
        return cls(*np.zeros((4, columns)))

    @classmethod
    def of(cls, x: Array, weight: Array | None = None) -> tuple[Self, Array]:
        """Return the statistics of a table, and which columns have values that are infinite, or too large.

        Parameters
        ----------
        x : ndarray of float16, float32 or float64, shape (rows, columns)
            NaN is a missing value. Memory is read once; twice where values are missing, and once more for columns far
            from zero.
        weight : ndarray of float64, shape (rows,), optional
            Weights of rows, not negative.

        Returns
        -------
        Running
            The statistics; NaN where a value is infinite.
        ndarray of bool, shape (columns,)
            Columns whose statistics are not finite. Infinite values without weight do not show.
        """
        found = moments(x, sample_weight=weight)
        result, sound = cls.from_moments(found), finite(found)
        if not sound.all():
            # The others keep their numbers: no column depends on what is missing in another.
            present = moments(x, sample_weight=weight, nan_policy="omit")
            result._put(~sound, cls.from_moments(present)._only(~sound))
            sound |= finite(present)
        with np.errstate(all="ignore"):
            far = (result.mean * result.mean * result.count > FAR * result.m2) & (result.m2 > 0)
        if far.any():
            center = result.mean[far]
            rest = cls.from_moments(_centered(x, far, center, weight))
            rest.mean, rest.low = two_sum(center, rest.mean)
            result._put(far, rest)
        return result, ~sound

    def _only(self, columns: Array) -> Self:
        return type(self)(self.count[columns], self.mean[columns], self.low[columns], self.m2[columns])

    def _put(self, columns: Array, part: Running) -> None:
        self.count[columns], self.mean[columns] = part.count, part.mean
        self.low[columns], self.m2[columns] = part.low, part.m2

    @classmethod
    def from_moments(cls, part: Moments) -> Self:
        """Return the same statistics in this form."""
        columns = len(part.mean)
        count = np.broadcast_to(np.asarray(part.count, np.float64), columns).copy()
        return cls(count, part.mean.copy(), np.zeros(columns), part.m2.copy())

    def to_moments(self, *, weighted: bool = False) -> Moments:
        """Return the same statistics as `fastbn.Moments`, with a mean of one float64.

        Parameters
        ----------
        weighted : bool
            Whether counts are sums of weights, also where these are whole numbers.
        """
        count = self.count
        if not weighted and not (count % 1).any():
            count = count.astype(np.int64)
        if len(count) == 0:
            count = np.zeros((), count.dtype)
        elif (count == count[0]).all():
            count = count[0]
        state = {"count": count if count.ndim else count.item(), "mean": self.mean + self.low, "m2": self.m2}
        return Moments.from_dict(state)

    def copy(self) -> Self:
        """Return a copy."""
        return type(self)(self.count.copy(), self.mean.copy(), self.low.copy(), self.m2.copy())

    def decay(self, share: float, columns: Array) -> None:
        """Let everything seen so far of some columns count for less."""
        shares = np.where(columns, share, 1.0)
        self.count = self.count * shares
        self.m2 = self.m2 * shares

    def merge(self, other: Running) -> Self:
        """Add what another object has seen, by Chan's formula, with a mean of two parts.

        Returns
        -------
        Running
            This object.
        """
        total = self.count + other.count
        with np.errstate(all="ignore"):
            share = np.where(total > 0, other.count / total, 0.0)
            d = (other.mean - self.mean) + (other.low - self.low)
            mean, low = two_sum(self.mean, self.low + d * share)
            m2 = self.m2 + other.m2 + d * d * (self.count * share)
        new, same = self.count == 0, other.count == 0
        self.mean = np.where(new, other.mean, np.where(same, self.mean, mean))
        self.low = np.where(new, other.low, np.where(same, self.low, low))
        self.m2 = np.where(new, other.m2, np.where(same, self.m2, m2))
        self.count = total
        return self

    def variance(self) -> Array:
        """Return m2 / count, NaN where there are no data."""
        with np.errstate(all="ignore"):
            return np.where(self.count > 0, self.m2 / self.count, np.nan)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b as its float64 and what that rounding left over (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def finite(part: Moments) -> Array:
    """Return whether the statistics of each column are finite; then all that counts in them is."""
    both: Array = np.isfinite(part.mean) & np.isfinite(part.m2)
    return both


def _centered(x: Array, columns: Array, center: Array, weight: Array | None) -> Moments:
    """Return the moments of some columns relative to a center each, in blocks of rows.

    Near the center, which is where the values are of columns that are far from zero, differences are exact.
    """
    total = Moments(len(center))
    rows = max(1, BLOCK // len(center))
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        z = (x[block] if columns.all() else x[block][:, columns]) - center  # float64, as the center is
        total.update(z, sample_weight=None if weight is None else weight[block], nan_policy="omit")
    return total


def of_sparse(x: Any, weight: Array | None = None) -> Running:
    """Return the statistics of the columns of a CSR or CSC matrix, zeros included, in blocks of its stored values.

    Parameters
    ----------
    x : sparse matrix or array in CSR or CSC form
        NaN is a missing value.
    weight : ndarray of float64, shape (rows,), optional
        Weights of rows.
    """
    if not x.has_canonical_format:  # entries of one place are one value, their sum
        x = x.copy()
        x.sum_duplicates()
    rows, columns = x.shape
    everything = float(rows) if weight is None else float(weight.sum())
    present, lost, sums, rest, m2, stored = np.zeros((6, columns))
    holes = bool(np.isnan(x.data).any())
    for block in _stored(x, weight, holes):
        block.add(present, block.weight)
        block.add(sums, block.value if block.weight is None else block.weight * block.value)
        if block.missing is not None:
            block.add(lost, block.missing)
        if block.weight is not None and weight is not None:
            counts = block.weight if block.missing is None else block.weight + block.missing
            block.add(stored, (counts > 0).astype(np.float64))
    count = everything - lost
    zeros = count - present
    if weight is not None:  # where no zero counts, only the rounding of both sums would be left
        zeros[stored == np.count_nonzero(weight)] = 0
    with np.errstate(all="ignore"):
        mean = np.where(count > 0, sums / count, 0)
        for block in _stored(x, weight, holes):
            d = block.value - block.spread(mean)
            share = d if block.weight is None else block.weight * d
            block.add(rest, share)
            block.add(m2, share * d)
        # What the mean's rounding left over is its second part, and is taken out of the squares.
        rest -= zeros * mean
        m2 += zeros * mean * mean
        low = np.where(count > 0, rest / count, 0)
        m2 = np.where(count > 0, np.maximum(m2 - rest * low, 0), 0)
    return Running(count, *two_sum(mean, low), m2)


@dataclass
class _Block:
    """Some stored values of a sparse matrix; one that is missing stands there as 0 with weight 0."""

    value: Array
    weight: Array | None  # None: all 1
    missing: Array | None  # the weights of what is missing
    column: Array  # of each value; of CSC, of each run of values
    runs: tuple[Array, Array] | None  # of CSC: where runs start, and how long they are

    def add(self, total: Array, numbers: Array | None) -> None:
        """Add a number per value, or 1, to the totals of the columns."""
        if self.runs is None:
            total += np.bincount(self.column, numbers, len(total))
        elif numbers is None:
            total[self.column] += self.runs[1]
        else:
            total[self.column] += np.add.reduceat(numbers, self.runs[0])

    def spread(self, numbers: Array) -> Array:
        """Return the number of its column for each value."""
        chosen: Array = numbers[self.column]
        return chosen if self.runs is None else np.repeat(chosen, self.runs[1])


def _stored(x: Any, weight: Array | None, holes: bool) -> Iterator[_Block]:
    """What is stored in a matrix, in blocks."""
    step = max(BLOCK, x.shape[1])
    for start in range(0, x.nnz, step):  # arrays may be longer than that
        stop = min(start + step, x.nnz)
        column, runs, w, gone = x.indices[start:stop], None, None, None
        if x.format == "csc" or weight is not None:
            first, last = np.searchsorted(x.indptr, (start, stop - 1), side="right") - 1
            lengths = np.diff(np.clip(x.indptr[first : last + 2], start, stop))
            lines, lengths = first + np.flatnonzero(lengths), lengths[lengths > 0]
            if x.format == "csc":
                w = None if weight is None else weight[column]
                column, runs = lines, (np.cumsum(lengths) - lengths, lengths)
            elif weight is not None:
                w = np.repeat(weight[lines], lengths)
        value = x.data[start:stop].astype(np.float64)
        if holes:
            missing = np.isnan(value)
            value[missing] = 0
            gone = missing.astype(np.float64) if w is None else missing * w
            w = (~missing).astype(np.float64) if w is None else ~missing * w
        yield _Block(value, w, gone, column, runs)
