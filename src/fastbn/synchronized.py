"""Batch norm over several processes, whatever connects them: what is sent, and in which order it is put together.

Everything that depends on other processes comes in through one function, ``gather``: it takes a vector of float64,
of the same length on every rank, and returns the vectors of all ranks, in rank order, as the rows of a matrix. Every
rank then puts the same rows together in the same order, so all of them get the same bits; how the vectors travelled
does not matter.

- Forward: a rank sends (count, mean, m2) of its part, 2 C + 1 numbers; they merge by Chan's formula. A rank whose
  values do not all count alike sends a negative number for the count; then all ranks send their counts or sums of
  weights per channel in a second round, C numbers.
- Gradient: a rank sends (0, sum(dy), sum(dy * (x - mean))) of its part, 2 C + 1 numbers; they add up.

A rank without data takes part like any other: it sends zeros. A rank whose arguments do not fit sends a count of -1
before it raises, so that the others raise too, instead of waiting for it. Ranks need not agree about weights: without,
every value counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from . import activation as activations
from . import checks, functional, kernels, passes
from . import layout as layouts
from . import weights as weighting
from .errors import must
from .kernels import _channels
from .moments import Moments, moments
from .passes import Cache, Statistics

__all__ = ["backward", "forward"]

Array = NDArray[Any]
Gather = Callable[[Array], Array]

# In place of a count:
FAILED: Final = -1.0  # this rank has raised
COUNTED: Final = -2.0  # its counts of values follow
WEIGHTED: Final = -3.0  # its sums of weights follow


def refuse_failed(rows: Array) -> None:
    """Raise a RuntimeError if a rank has sent that it failed."""
    failed = np.flatnonzero(rows[:, 0] == FAILED)
    if failed.size:
        raise RuntimeError(f"rank {failed[0]} has raised an error in this call, so no rank goes on")


def to_row(part: Moments, mark: float | None = None) -> Array:
    """Return what a rank sends of its part: count, or what stands in its place, means, m2, as one vector of float64."""
    return np.concatenate((np.full(1, part.count if mark is None else mark, np.float64), part.mean, part.m2))


def merged(rows: Array) -> Moments:
    """Return the moments of all parts, merged in the order of the rows."""
    row = _channels.merge_rows(np.ascontiguousarray(rows, np.float64))
    total = Moments((len(row) - 1) // 2)
    total.count = int(row[0])
    total.mean, total.m2 = (half.copy() for half in np.split(row[1:], 2))
    return total


def merged_counted(rows: Array, counts: Array) -> Moments:
    """The same for parts whose counts, per channel, came as rows of their own."""
    whole = not (rows[:, 0] == WEIGHTED).any()
    total = Moments(counts.shape[1])
    for row, count in zip(rows, counts, strict=True):
        part = Moments(counts.shape[1])
        part.count = weighting.tidy(count.astype(np.int64) if whole else count.copy())
        part.mean, part.m2 = (half.copy() for half in np.split(row[1:], 2))
        total.merge(part)
    return total


def added(rows: Array) -> Array:
    """Return the sum of the rows, added one after the other."""
    return _channels.add_rows(np.ascontiguousarray(rows, np.float64))


def forward(
    x: Any,
    gather: Gather,
    *,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-3,
    axis: int | tuple[int, ...] = -1,
    layout: str | None = None,
    activation: Any = None,
    residual: Any = None,
    out: Array | None = None,
    keep: Literal["nothing", "always", "unless in place"] = "unless in place",
    channels: int | None = None,
    check: Callable[[Moments], None] | None = None,
    mask: Any = None,
    sample_weight: Any = None,
    nan_policy: Any = "propagate",
    correction: Callable[[Moments, Statistics], tuple[Array, Array]] | None = None,
    refuse: Callable[[Array, Array | None], None] | None = None,
) -> tuple[Array, Cache | None, Moments]:
    """Normalize a part of a batch with the statistics of the whole.

    Parameters
    ----------
    x : array_like
        This rank's part, maybe without values.
    gather : callable
        Sends a vector of float64 to all ranks, and returns those of all ranks as the rows of a matrix.
    gamma, beta, epsilon, axis, layout, activation, residual, out, mask, sample_weight, nan_policy
        As in `batch_norm`. A rank's mask and weights are of its own part.
    keep : {"unless in place", "always", "nothing"}
        What the cache is to hold.
    channels : int, optional
        Number of channels, where it is known before x is. With it, a rank whose arguments do not fit tells the others
        before it raises, so that they raise too, instead of waiting for ever.
    check : callable, optional
        Sees the pooled moments before anything is written, and may raise: then it does on every rank.
    correction : callable, optional
        Gets the pooled moments and what normalizes (mean and variance), and returns p and q per channel, float64, the
        same on every rank: ``x_hat * p + q`` stands for x_hat then. They are constants in the gradient, whose dgamma is
        that of ``gamma * p``.
    refuse : callable, optional
        Gets this rank's x and output as arrays before anything is sent, and may raise.

    Returns
    -------
    y : ndarray
        This rank's part of the result.
    cache : Cache or None
        For `backward`.
    pooled : Moments
        Of the whole batch, the same bits on every rank.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`.
    RuntimeError
        If another rank has raised.
    """
    mark: float | None = None
    try:
        data = checks.data(x, "x")
        axes = layouts.channel_axes(axis, layout, data.ndim)
        shape = layouts.channel_shape(data.shape, axes)
        if channels is not None and math.prod(shape) != channels:
            raise ValueError(must("x", f"have {channels} channels", math.prod(shape)))
        checks.epsilon(epsilon)
        weight, bias = checks.parameter(gamma, "gamma", shape), checks.parameter(beta, "beta", shape)
        added = None if residual is None else checks.like(residual, "residual", data)
        y = None
        if out is not None:
            y = checks.output(out, data.shape, checks.result_dtype(data.dtype))
            checks.in_place_or_apart(y, "out", data, "x")
            if added is not None:
                checks.in_place_or_apart(y, "out", added, "residual")
            checks.apart(y, "out", gamma=weight, beta=bias, **weighting.given(mask, sample_weight))
        if refuse is not None:
            refuse(data, y)
        activations.resolved(activation)
        weights = weighting.resolved(mask, sample_weight, nan_policy, data, axes)
        part = moments(data, axis=axes, mask=mask, sample_weight=sample_weight, nan_policy=nan_policy)
        if weights is not None:
            mark = COUNTED if weights.whole else WEIGHTED
        row = to_row(part, mark)
    except BaseException:  # Ctrl-C too: the others would wait, or take what comes next for the answer
        if channels is not None:
            failure = np.zeros(2 * channels + 1)
            failure[0] = FAILED
            gather(failure)
        raise
    rows = gather(row)
    refuse_failed(rows)
    if (rows[:, 0] < 0).any():
        pooled = merged_counted(rows, gather(weighting.per_channel(part.count, len(part.mean))))
        variance = _channels.variance_counted(
            pooled.m2, weighting.per_channel(pooled.count, len(part.mean)), 0, math.inf
        )
    else:
        pooled = merged(rows)
        variance = pooled.variance() if pooled.count else pooled.m2
    if check is not None:
        check(pooled)
    if correction is not None:
        p, q = correction(pooled, Statistics(pooled.mean, variance))
        beta = ((q if weight is None else q * weight) + (0.0 if bias is None else bias)).reshape(shape)
        gamma = (p if weight is None else p * weight).reshape(shape)
    y, cache = passes.forward(
        data,
        gamma=gamma,
        beta=beta,
        moving_mean=pooled.mean.reshape(shape),
        moving_variance=variance.reshape(shape),
        training=False,
        momentum=0.0,
        epsilon=epsilon,
        axis=axes,
        layout=None,
        ddof=0,
        update=False,
        activation=activation,
        residual=residual,
        out=out,
        keep=keep,
        weights=weights,
    )
    if cache is not None:
        cache.mode = "batch"  # the statistics are those of the batch, though not found by this call
    return y, cache, pooled


def backward(
    dy: Any, cache: Cache, gather: Gather, count: weighting.Count, *, out: Array | None = None
) -> tuple[Array, ...]:
    """Return the gradient of `forward`, through the statistics of the whole batch.

    Parameters
    ----------
    dy : array_like of y's shape and dtype
        Gradient with respect to this rank's y.
    cache : Cache
        Of `forward`.
    gather : callable
        As in `forward`.
    count : int, float or ndarray
        Values per channel of the whole batch, or the sums of their weights: the count of the pooled moments.
    out : array, optional
        As in `batch_norm_backward`.

    Returns
    -------
    dx, dgamma, dbeta : ndarray
        As of `batch_norm_backward`. dx is that of the whole; dgamma and dbeta are this rank's share, which a training
        program adds up over the ranks like every other gradient.
    dresidual : ndarray, only if the call had a residual
        Gradient with respect to the residual.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_backward`.
    RuntimeError
        If another rank has raised.
    """
    variance = cache.statistics.variance
    channels = len(variance)
    sent = np.empty(2 * channels + 1)  # the first number says whether this rank is well
    try:
        x, gradient, dx = _prepared(dy, cache, out)
        narrow = dx
        if gradient.dtype.itemsize == 2 and (cache.activation is not None or cache.weights is not None):
            cache, x, gradient = cache.in_float32(), x.astype(np.float32), gradient.astype(np.float32)
            dx = layouts.like(x)  # to be rounded once, at the end
        if cache.weights is not None:
            before = functional.before_activation(gradient, cache, x) if x.size else gradient.copy()
        elif cache.activation is not None:  # it goes through dx where nobody else wants it
            before = layouts.like(x, gradient.dtype) if cache.has_residual or out is not None else dx
        else:
            before = gradient.copy() if cache.has_residual else gradient
        sums = local_sums(gradient, x, cache, before)
    except BaseException:
        sent[:] = 0
        sent[0] = FAILED
        gather(sent)
        raise
    sent[0] = 0
    sent[1:] = sums.reshape(-1)
    rows = gather(sent)
    refuse_failed(rows)
    pooled = added(rows)[1:].reshape(2, channels)
    if cache.weights is not None:
        apply_weighted_sums(before, x, cache, cache.weights, pooled, count, dx)
    else:
        apply_sums(before, x, cache, pooled, count, dx)
    dgamma, dbeta = (np.empty(channels, checks.parameter_dtype(x.dtype)) for _ in range(2))
    _channels.parameter_gradients(sums[0], sums[1], variance, cache.epsilon, dgamma, dbeta)
    shape = layouts.channel_shape(x.shape, cache.axes)
    if dx is not narrow:
        with np.errstate(over="ignore"):
            narrow[...] = dx
            before = before.astype(narrow.dtype)
    gradients = narrow if out is None else out, dgamma.reshape(shape), dbeta.reshape(shape)
    return (*gradients, before) if cache.has_residual else gradients


def _prepared(dy: Any, cache: Cache, out: Array | None) -> tuple[Array, Array, Array]:
    """Return x, dy, and the array for dx, all checked."""
    x = cache.x
    if x is None:
        raise ValueError(must("out", "not be x in a forward call whose gradient is taken", "x, overwritten"))
    if cache.lost_residual:
        raise ValueError(
            must("out", "not be residual in a forward call whose gradient is taken", "residual, overwritten")
        )
    gradient = checks.like(dy, "dy", x)
    if out is None:
        dx = layouts.like(x, gradient.dtype)
    else:
        dx = checks.output(out, x.shape, gradient.dtype)
        for source, name in ((gradient, "dy"), (x, "x"), (cache.y, "y"), (cache.residual, "residual")):
            if source is not None:
                checks.in_place_or_apart(dx, "out", source, name)
        if cache.weights is not None:
            cache.weights.keep_apart(dx)
    return x, gradient, dx


def local_sums(dy: Array, x: Array, cache: Cache, before: Array) -> Array:
    """Return (sum(dy), sum(dy * (x - mean))) per channel, of checked arrays, as two rows of float64.

    After an activation dy stands for the gradient before it, which is written to `before`.
    """
    mean, variance = cache.statistics
    sums = np.zeros((2, len(mean)))
    if x.size and cache.weights is not None:  # what is missing is 0 in `before` already, and is left out of the sums
        arguments: dict[str, Any] = {"dy": before, "weights": cache.weights, "total": cache.total}
    else:
        activation = cache.activation
        arguments = {
            "dy": dy,
            "residual": None if activation is None else cache.residual if cache.y is None else cache.y,
            "bend": None if activation is None else activation.bend,
            "by_output": cache.y is not None,
            "kept": None if activation is None else before,
        }
    if x.size:
        passes.run(
            kernels.FROZEN,
            cache.axes,
            x,
            gamma=cache.gamma,
            beta=cache.beta,
            mean=mean,
            variance=variance,
            epsilon=cache.epsilon,
            first=sums[0],
            second=sums[1],
            **arguments,
        )
    return sums


def _per_value(sums: Array, count: weighting.Count) -> Array:
    """Return sums over the values of the whole batch divided by their number; 0 where there are none."""
    counts = weighting.per_channel(count, sums.shape[1])
    return np.stack([_channels.variance_counted(row, counts, 0, 0.0) for row in sums])


def apply_sums(dy: Array, x: Array, cache: Cache, sums: Array, count: weighting.Count, dx: Array) -> None:
    """Write ``dx = gamma r (dy - sums[0] / count - (x - mean) r^2 sums[1] / count)``, of checked arrays."""
    if x.size:
        first, second = _per_value(sums, count)
        mean, variance = cache.statistics
        passes.run(
            kernels.POOLED,
            cache.axes,
            x,
            dy=dy,
            out=dx,
            gamma=cache.gamma,
            mean=mean,
            variance=variance,
            epsilon=cache.epsilon,
            first=first,
            second=second,
        )


def apply_weighted_sums(
    dy: Array, x: Array, cache: Cache, weights: weighting.Weights, sums: Array, count: weighting.Count, dx: Array
) -> None:
    """Write ``dx = gamma r (dy - w (sums[0] / count + (x - mean) r^2 sums[1] / count))``; dy is 0 where x is missing.

    Kernels multiply by weights only with sums that they have found themselves, so the product is taken in between:
    an array of x's size, and two passes more.
    """
    if not x.size:
        return
    mean, variance = cache.statistics
    first, second = _per_value(sums, count)
    with np.errstate(all="ignore"):
        r = 1 / np.sqrt(variance + cache.epsilon)
        r[np.isinf(r)] = 0.0
        scale, shift = -r * r * second * weights.scale, -first * weights.scale
        gamma = r if cache.gamma is None else r * cache.gamma.reshape(-1)
        passed = layouts.like(x, dy.dtype)  # what comes through the statistics
        passes.run(kernels.NORMALIZE, cache.axes, x, out=passed, mean=mean, gamma=scale, beta=shift)
        if weights.array is not None:
            np.multiply(passed, weights.array, out=passed, casting="same_kind")
            np.copyto(passed, 0, where=weights.array == 0)
        if weights.omits:
            np.copyto(passed, 0, where=np.isnan(x))
        passed += dy
    passes.run(kernels.NORMALIZE, cache.axes, passed, out=dx, gamma=gamma)
