"""Training calls that are more than one pass over a batch: in groups, or with a correction between x_hat and gamma.

Both are made of plain calls. A correction ``x_hat * p + q``, constant per channel, is one of the parameters::

    gamma' = gamma * p,   beta' = beta + gamma * q
    dx = that of gamma',   dgamma = p * sum(dy * x_hat) + q * sum(dy),   dbeta = sum(dy)

A group is a view of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import activation as activations
from . import checks, functional, kernels, passes
from . import layout as layouts
from . import weights as weighting
from .errors import must
from .kernels import _calls
from .moments import Moments
from .parameters import features
from .passes import Cache, Statistics

Array = NDArray[Any]
Correction = Callable[[Statistics], tuple[Array, Array]]
Known = tuple[Statistics, Array | None]  # of a batch or a group; with the sums of its weights


class Batch(NamedTuple):
    """What the moving statistics get of a batch: with groups, the means over them by their numbers of values.

    The variance of `statistics` is divided by the number of values m of each group, `variance` by m - ddof.
    """

    statistics: Statistics
    variance: Array
    values: weighting.Count

    @property
    def counted(self) -> Any:
        """Whether any value counts, for all channels or for each."""
        return np.greater(self.values, 0)

    def moments(self) -> Moments:
        """Return the moments of a batch that is one group."""
        found = Moments(len(self.variance))
        found.count, found.mean = weighting.tidy(self.values), self.statistics.mean
        found.m2 = np.where(self.counted, self.statistics.variance, 0.0) * self.values
        return found


class Composite:
    """What the gradient of a composite call needs."""

    __slots__ = ("parts", "residual", "scale", "shift", "weights", "x", "y")

    def __init__(
        self,
        x: Array,
        parts: Sequence[tuple[slice | None, Cache]],
        scale: Array | None,
        shift: Array | None,
        y: Array,
        residual: Array | None,
        weights: weighting.Weights | None,
    ) -> None:
        self.x = x
        self.weights = weights
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
            if self.weights is not None:
                self.weights.keep_apart(dx)
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
        gradients = dx if out is None else out, self._corrected(dgamma, dbeta).astype(dtype), dbeta.astype(dtype)
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
    channels: tuple[int, ...] | None = None,
    groups: Sequence[slice] | None = None,
    correction: Correction | None = None,
    adjustment: tuple[Array, Array] | None = None,
    finite: np.dtype[Any] | None = None,
    mask: Any = None,
    sample_weight: Any = None,
    nan_policy: Any = "propagate",
) -> tuple[Array, Composite, Batch]:
    """Normalize checked data with its own statistics.

    Parameters
    ----------
    x, gamma, beta, epsilon, axis, layout, activation, residual, out, mask, sample_weight, nan_policy
        As in `batch_norm`.
    ddof : {0, 1}
        Of the variance for the moving statistics.
    channels : tuple of ints, optional
        Of a layer that is built, which may have neither gamma nor beta to tell it.
    groups : sequence of slices, optional
        Rows that are normalized together.
    correction : callable, optional
        Gets the statistics of the batch and returns p and q, flat.
    adjustment : tuple of two arrays, optional
        Another p and q, flat, after those.
    finite : dtype, optional
        In which statistics that are not finite are an error, found before anything is written.

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
    if y is not None:  # what passes.forward gets instead of gamma and beta may be other arrays
        checks.apart(checks.as_array(y, "out"), "out", gamma=gamma, beta=beta)
    weight, bias = checks.parameter(gamma, "gamma", shape), checks.parameter(beta, "beta", shape)
    if channels is not None and shape != channels:
        raise ValueError(must("x", f"have {features(channels)} channels", features(shape)))

    whole = weighting.resolved(mask, sample_weight, nan_policy, x, axes)
    if y is not None:
        checks.apart(checks.as_array(y, "out"), "out", **weighting.given(mask, sample_weight))
    if nan_policy == "raise":
        passes.refuse_nan(x, axes, whole)

    xs = [x if part is None else x[part] for part in rows]
    weights = [whole if whole is None or part is None else whole.of(part) for part in rows]
    counts = [layouts.values_per_channel(part.shape, axes) for part in xs]
    found: list[Known | None] = [None] * len(xs)
    if correction is not None or finite is not None:
        known = [_statistics(*args, axes) for args in zip(xs, counts, weights)]
        found = [*known]
        batch = _together(known, counts, weights, ddof)
        if finite is not None:
            refuse_nonfinite(Statistics(batch.statistics.mean, batch.variance), batch.counted, finite)
    scale = shift = None
    if correction is not None:
        scale, shift = correction(batch.statistics)
        if whole is not None:  # where nothing counts there is nothing to correct
            scale, shift = np.where(batch.counted, scale, 1.0), np.where(batch.counted, shift, 0.0)
    if adjustment is not None:
        p, q = adjustment
        scale, shift = (p, q) if scale is None or shift is None else (scale * p, shift * p + q)
    if scale is not None and shift is not None:
        bias = (shift if weight is None else shift * weight) + (0.0 if bias is None else bias)
        weight = scale if weight is None else scale * weight

    parts: list[tuple[slice | None, Cache]] = []
    channel = layouts.plain_axis(axis, layout, x)
    bent = activations.resolved(activation)
    for part, sub, counting, known_part in zip(rows, xs, weights, found):
        if known_part is None and counting is None and part is not None:
            direct = _calls.forward(
                sub, weight, bias, None, None, True, 0.0, epsilon, channel, ddof, True, y[part], True, True,
                passes.team, passes.SERIAL, bent=bent, residual=None if added is None else added[part],
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
            weights=counting,
            known=known_part,
        )
        assert cache is not None
        parts.append((part, cache))
    if rows[0] is None:
        y = result
    if found[0] is None:
        batch = _together([(cache.statistics, cache.total) for _, cache in parts], counts, weights, ddof)
    return y if out is None else out, Composite(x, parts, scale, shift, y, added, whole), batch


def refuse_nonfinite(statistics: Statistics, counted: Any, dtype: np.dtype[Any]) -> None:
    """Raise where statistics of channels that count are not finite in a dtype."""
    sound = statistics.finite(dtype) | ~counted
    if not sound.all():
        where = f"others in channel {int(np.argmin(sound))}"
        raise ValueError(must("x", 'have finite statistics with on_nonfinite="raise"', where))


def _statistics(x: Array, count: int, weights: weighting.Weights | None, axes: tuple[int, ...]) -> Known:
    total = None if weights is None else np.zeros(math.prod(layouts.channel_shape(x.shape, axes)))
    found = passes.batch_statistics(x, axes, count, kernels.MOMENTS, weights=weights, total=total)
    assert found is not None  # the weights were checked
    return found, total


def _together(
    found: Sequence[Known], counts: Sequence[int], weights: Sequence[weighting.Weights | None], ddof: int
) -> Batch:
    """Return the mean over groups of their means and variances, by numbers of values or sums of weights."""
    means, variances = (np.stack(arrays) for arrays in zip(*(statistics for statistics, _ in found)))
    if weights[0] is not None:
        totals = [w.counts(total) for w, (_, total) in zip(weights, found) if w is not None and total is not None]
        return _together_weighted(means, variances, np.stack(totals), ddof)
    values = np.array(counts, np.float64)[:, None]
    shares = values / max(sum(counts), 1) if len(counts) > 1 else np.ones((1, 1))
    corrected = variances * (values / np.maximum(values - ddof, 1)) if sum(counts) else variances
    mean, variance, unbiased = ((shares * v).sum(axis=0) for v in (means, variances, corrected))
    return Batch(Statistics(mean, variance), unbiased, sum(counts))


def _together_weighted(means: Array, variances: Array, values: Array, ddof: int) -> Batch:
    """The same with values of each group and channel; where there are none, mean 0 and an infinite variance."""
    whole = values.sum(axis=0)
    counted = values > 0
    shares = values / np.where(whole > 0, whole, 1)
    if len(values) == 1:
        shares = np.ones(values.shape)
    corrected = variances * np.where(values > ddof, values / np.where(values > ddof, values - ddof, 1), 1.0)
    mean, variance, unbiased = (
        np.where(counted, shares * np.where(counted, v, 0.0), 0.0).sum(axis=0) for v in (means, variances, corrected)
    )
    empty = whole == 0
    variance[empty] = unbiased[empty] = np.inf
    return Batch(Statistics(mean, variance), unbiased, whole)
