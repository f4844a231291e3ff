"""Training calls that are more than one pass over a batch: in groups, or with a correction between x_hat and gamma.

Both are made of plain calls. A correction ``x_hat * p + q``, constant per channel, is one of the parameters::

    gamma' = gamma * p,   beta' = beta + gamma * q
    dx = that of gamma',   dgamma = p * sum(dy * x_hat) + q * sum(dy),   dbeta = sum(dy)

A group is a view of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import checks, functional, passes
from . import layout as layouts
from .errors import must
from .kernels import _calls
from .moments import Moments, moments
from .passes import Cache, Statistics

Array = NDArray[Any]
Correction = Callable[[Statistics], tuple[Array, Array]]


class Batch(NamedTuple):
    """What the moving statistics get of a batch: with groups, the means over them by their numbers of values.

    The variance of `statistics` is divided by the number of values m of each group, `variance` by m - ddof.
    """

    statistics: Statistics
    variance: Array
    values: int

    def moments(self) -> Moments:
        """Return the moments of a batch that is one group."""
        found = Moments(len(self.variance))
        found.count, found.mean, found.m2 = self.values, self.statistics.mean, self.statistics.variance * self.values
        return found


class Composite:
    """What the gradient of a composite call needs."""

    __slots__ = ("parts", "residual", "scale", "shift", "x", "y")

    def __init__(
        self,
        x: Array,
        parts: Sequence[tuple[slice | None, Cache]],
        scale: Array | None,
        shift: Array | None,
        y: Array,
        residual: Array | None,
    ) -> None:
        self.x = x
        self.parts = parts
        self.scale = scale
        self.shift = shift
        # Whole, as far as the parts refer to them.
        self.y = y if any(cache.y is not None for _, cache in parts) else None
        self.residual = residual if any(cache.residual is not None for _, cache in parts) else None

    def backward(self, dy: Any, out: Any) -> tuple[Array, ...]:
        """Return what `functional.batch_norm_backward` returns, for the whole batch."""
        rows, first = self.parts[0]
        if rows is None:
            dx, dgamma, dbeta, *others = functional.batch_norm_backward(dy, first, out=out)
            return dx, self._corrected(dgamma, dbeta), dbeta, *others
        x = self.x
        gradient = checks.like(dy, "dy", x)
        if first.x is None or first.lost_residual:
            functional.batch_norm_backward(gradient[rows], first)  # which says why there is none
        if out is None:
            dx = layouts.like(x, gradient.dtype)
        else:
            dx = checks.output(out, x.shape, gradient.dtype)
            for source, name in ((gradient, "dy"), (x, "x"), (self.y, "y"), (self.residual, "residual")):
                if source is not None:
                    checks.in_place_or_apart(dx, "out", source, name)
        dresidual = layouts.like(x, gradient.dtype) if first.has_residual else None
        shape = layouts.channel_shape(x.shape, first.axes)
        dgamma, dbeta = np.zeros(shape), np.zeros(shape)
        for rows, cache in self.parts:
            assert rows is not None
            _, part_dgamma, part_dbeta, *others = functional.batch_norm_backward(gradient[rows], cache, out=dx[rows])
            dgamma += part_dgamma
            dbeta += part_dbeta
            if dresidual is not None:
                dresidual[rows] = others[0]
        dtype = checks.parameter_dtype(x.dtype)
        gradients = dx, self._corrected(dgamma, dbeta).astype(dtype), dbeta.astype(dtype)
        return gradients if dresidual is None else (*gradients, dresidual)

    def _corrected(self, dgamma: Array, dbeta: Array) -> Array:
        if self.scale is None or self.shift is None:
            return dgamma
        p, q = self.scale.reshape(dgamma.shape), self.shift.reshape(dgamma.shape)
        corrected: Array = (p * dgamma + q * dbeta).astype(dgamma.dtype)
        return corrected


def forward(
    x: Array,
    *,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    axis: int | tuple[int, ...],
    layout: str | None,
    ddof: int,
    activation: Any,
    residual: Any,
    out: Any,
    groups: Sequence[slice] | None = None,
    correction: Correction | None = None,
    adjustment: tuple[Array, Array] | None = None,
    finite: bool = False,
) -> tuple[Array, Composite, Batch]:
    """Normalize checked data with its own statistics.

    Parameters
    ----------
    x, gamma, beta, epsilon, axis, layout, activation, residual, out
        As in `batch_norm`.
    ddof : {0, 1}
        Of the variance for the moving statistics.
    groups : sequence of slices, optional
        Rows that are normalized together.
    correction : callable, optional
        Gets the statistics of the batch and returns p and q, flat.
    adjustment : tuple of two arrays, optional
        Another p and q, flat, after those.
    finite : bool
        Whether statistics that are not finite are an error, found before anything is written.

    Returns
    -------
    y : ndarray
        The result.
    composite : Composite
        For the gradient.
    batch : Batch
        For the moving statistics.
    """
    axes = layouts.channel_axes(axis, layout, x.ndim)
    shape = layouts.channel_shape(x.shape, axes)
    y, added = out, residual
    rows: Sequence[slice | None] = [None]
    if groups is not None:
        rows = groups
        dtype = checks.result_dtype(x.dtype)
        y = layouts.like(x, dtype) if out is None else checks.output(out, x.shape, dtype)
        checks.in_place_or_apart(y, "out", x, "x")
        if residual is not None:
            added = checks.like(residual, "residual", x)
            checks.in_place_or_apart(y, "out", added, "residual")
    if isinstance(y, np.ndarray):  # what passes.forward gets instead of gamma and beta may be other arrays
        checks.apart(y, "out", gamma=gamma, beta=beta)
    weight, bias = checks.parameter(gamma, "gamma", shape), checks.parameter(beta, "beta", shape)

    xs = [x if part is None else x[part] for part in rows]
    counts = [layouts.values_per_channel(part.shape, axes) for part in xs]
    found: list[Statistics | None] = [None] * len(xs)
    if correction is not None or finite:
        found = [_statistics(part, axis, layout) for part in xs]
        batch = _together(found, counts, ddof)
        if finite and not np.isfinite(batch.variance).all():  # that of a mean that is not finite is not either
            where = f"others in channel {int(np.argmin(np.isfinite(batch.variance)))}"
            raise ValueError(must("x", 'have finite statistics with on_nonfinite="raise"', where))
    scale = shift = None
    if correction is not None:
        scale, shift = correction(batch.statistics)
    if adjustment is not None:
        p, q = adjustment
        scale, shift = (p, q) if scale is None or shift is None else (scale * p, shift * p + q)
    if scale is not None and shift is not None:
        bias = (shift if weight is None else shift * weight) + (0.0 if bias is None else bias)
        weight = scale if weight is None else scale * weight

    parts: list[tuple[slice | None, Cache]] = []
    channel = layouts.plain_axis(axis, layout, x)
    for part, sub, given in zip(rows, xs, found):
        if given is None and part is not None and added is None and activation is None:
            direct = _calls.forward(
                sub, weight, bias, None, None, True, 0.0, epsilon, channel, ddof, True, y[part], True, True,
                passes.team, passes.SERIAL,
            )  # fmt: skip
            if direct is not None:
                parts.append((part, Cache(*direct[1])))
                continue
        result, cache = passes.forward(
            sub,
            gamma=None if weight is None else weight.reshape(shape),
            beta=None if bias is None else bias.reshape(shape),
            moving_mean=None,
            moving_variance=None,
            training=True,
            momentum=0.0,
            epsilon=epsilon,
            axis=axis,
            layout=layout,
            ddof=ddof,
            update=False,
            activation=activation,
            residual=added if part is None or added is None else added[part],
            out=y if part is None else y[part],
            keep="unless in place",
            given=given,
        )
        assert cache is not None
        parts.append((part, cache))
    if rows[0] is None:
        y = result
    if found[0] is None:
        batch = _together([cache.statistics for _, cache in parts], counts, ddof)
    return y, Composite(x, parts, scale, shift, y, added), batch


def _statistics(x: Array, axis: Any, layout: str | None) -> Statistics:
    found = moments(x, axis=axis, layout=layout)
    return Statistics(found.mean, found.variance() if found.count else np.zeros(found.mean.shape))


def _together(found: Sequence[Statistics | None], counts: Sequence[int], ddof: int) -> Batch:
    """Return the mean over groups of their means and variances, by numbers of values."""
    means = np.stack([s.mean for s in found if s is not None])
    variances = np.stack([s.variance for s in found if s is not None])
    values = np.array(counts, np.float64)[:, None]
    shares = values / max(sum(counts), 1) if len(counts) > 1 else np.ones((1, 1))
    corrected = variances * (values / np.maximum(values - ddof, 1)) if sum(counts) else variances
    mean, variance, unbiased = ((shares * v).sum(axis=0) for v in (means, variances, corrected))
    return Batch(Statistics(mean, variance), unbiased, sum(counts))
