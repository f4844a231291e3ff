"""What public functions and the layer share: a checked pass over data, forward, and what the gradient needs of it."""

from __future__ import annotations

import copy
import math
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import activation as activations
from . import checks, kernels, modes
from . import layout as layouts
from . import weights as weighting
from .errors import must
from .kernels import _channels
from .threads import get_num_threads

Array = NDArray[Any]

# Values per thread below which another thread costs more than it brings: starting a team takes some microseconds,
# in which one core normalizes about this many values that are in cache. Other work is counted in such values: see
# `work_of` in kernels/_plan.pxd.
VALUES_PER_THREAD: Final = 16384
SERIAL: Final = 2 * VALUES_PER_THREAD - 1


class Statistics(NamedTuple):
    """What normalized a batch: mean and variance (divided by the count, ddof 0) per channel, one-dimensional."""

    mean: Array
    variance: Array

    def finite(self, dtype: np.dtype[Any]) -> Array:
        """Return which channels are finite in the type of the moving statistics."""
        with np.errstate(over="ignore"):
            found: Array = np.isfinite(self.mean.astype(dtype)) & np.isfinite(self.variance.astype(dtype))
        return found


class Cache:
    """What `batch_norm_backward` needs of the forward call.

    It refers to x itself (with save="output" to y), not to a copy: that must not be changed before the gradient was
    taken. With an activation after a residual that goes for y too (relu, relu6 and leaky_relu) or for the residual
    (silu, gelu_tanh, leaky_relu of a negative slope), and for a mask and weights.

    Attributes
    ----------
    mode : {"train", "batch", "inference"}
        How the call normalized.
    """

    __slots__ = (
        "activation", "axes", "beta", "epsilon", "gamma", "has_residual", "mode", "residual", "sign", "statistics",
        "total", "weights", "x", "y",
    )  # fmt: skip

    def __init__(
        self,
        x: Array | None,
        axes: tuple[int, ...],
        mode: modes.Mode,
        statistics: tuple[Array, Array],
        gamma: Array | None,
        epsilon: float,
        sign: Array | None = None,
        activation: activations.Activation | None = None,
        has_residual: bool = False,
        beta: Array | None = None,
        residual: Array | None = None,
        y: Array | None = None,
        weights: weighting.Weights | None = None,
        total: Array | None = None,
    ) -> None:
        self.x = x
        self.axes = axes
        self.mode = mode
        self.statistics = Statistics(*statistics)
        self.gamma = gamma
        self.epsilon = epsilon
        self.sign = sign  # of every gamma, where x is the output: see `_channels.output_parameters`
        self.activation = activation
        self.has_residual = has_residual
        # What the derivative of the activation is found from: y alone, or beside x beta and the residual.
        self.beta = beta
        self.residual = residual
        self.y = y
        # Where values do not all count alike: how much they do, and the sum of that per channel.
        self.weights = weights
        self.total = total

    @property
    def lost_residual(self) -> bool:
        """Whether the call overwrote a residual that the gradient needs."""
        needed = self.has_residual and self.activation is not None and not self.activation.from_output
        return needed and self.residual is None

    def in_float32(self) -> Cache:
        """Return that of the same call on float32 values, for a gradient of several passes that is rounded once."""
        wide = copy.copy(self)
        for name in ("x", "y", "residual"):
            array = getattr(self, name)
            if array is not None:
                setattr(wide, name, array.astype(np.float32))
        return wide

    def __repr__(self) -> str:
        """Describe the call."""
        batch = "an overwritten batch" if self.x is None else f"a {self.x.dtype} batch of shape {self.x.shape}"
        return f"<fastbn cache of {batch}, mode {self.mode!r}>"


def kept(arguments: tuple[Any, ...], total: Array | None, mask: Any, sample_weight: Any, nan_policy: str) -> Cache:
    """Return the cache of a direct call (`fastbn.kernels._calls.forward`) from what that kept."""
    cache = Cache(*arguments)
    if total is not None and cache.x is not None:
        cache.total = total
        cache.weights = weighting.resolved(mask, sample_weight, nan_policy, cache.x, cache.axes, seen=True)
    return cache


def team(work: int) -> int:
    """Return how many threads a call uses for so much work."""
    return 1 if work <= SERIAL else min(get_num_threads(), work // VALUES_PER_THREAD)


def run(
    operation: int,
    axes: tuple[int, ...],
    x: Array,
    *,
    dy: Array | None = None,
    out: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    mean: Array | None = None,
    variance: Array | None = None,
    epsilon: float = 0.0,
    first: Array | None = None,
    second: Array | None = None,
    residual: Array | None = None,
    bend: activations.Bend | None = None,
    by_output: bool = False,
    kept: Array | None = None,
    weights: weighting.Weights | None = None,
    total: Array | None = None,
) -> bool:
    """Carry out an operation on checked arrays that are not empty.

    With weights, total gets their sum per channel where statistics are found, and is read by the gradient. False if
    they were unchecked and turned out not to fit: only first, second and total have been written then.

    Where the strides of an array fit neither access pattern it is copied once, and a result copied back.
    """
    plan = layouts.plan(
        x.shape,
        axes,
        checks.kind(x.dtype),
        x.strides,
        None if dy is None else dy.strides,
        None if out is None else out.strides,
        None if residual is None else residual.strides,
        None if kept is None else kept.strides,
    )
    if plan is None:
        x2 = layouts.packed(x, axes)
        dy2 = out2 = residual2 = kept2 = None
        if dy is not None:
            dy2 = layouts.like(x2, dy.dtype)
            dy2[...] = dy
        if residual is not None:
            residual2 = layouts.like(x2, residual.dtype)
            residual2[...] = residual
        if out is not None:
            out2 = layouts.like(x2, out.dtype)
        if kept is not None:  # it may be the result itself
            kept2 = out2 if kept is out else layouts.like(x2, kept.dtype)
        done = run(
            operation,
            axes,
            x2,
            dy=dy2,
            out=out2,
            gamma=gamma,
            beta=beta,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
            first=first,
            second=second,
            residual=residual2,
            bend=bend,
            by_output=by_output,
            kept=kept2,
            weights=weights,
            total=total,
        )
        if out is not None and done:
            assert out2 is not None
            out[...] = out2
        if kept is not None and kept is not out:
            assert kept2 is not None
            kept[...] = kept2
        return done
    u, v = (x, None) if dy is None else (dy, x)
    return kernels.run(
        plan, operation, u, v, out, gamma, beta, mean, variance, epsilon, first, second, team(plan.work(operation)),
        residual, bend, by_output, kept, counting(x, axes, weights, total),
    )  # fmt: skip


def counting(
    x: Array, axes: tuple[int, ...], weights: weighting.Weights | None, total: Array | None
) -> tuple[Array | None, tuple[int, ...], bool, Array, bool] | None:
    """Return what drivers want to know of weights."""
    if weights is None:
        return None
    assert total is not None
    array = weights.array
    if array is None:
        return None, (), weights.omits, total, False
    form = layouts.weights_form(x.shape, axes, x.strides, array.strides)
    if form is None:
        array = layouts.packed_weights(array, x, axes)
        form = layouts.weights_form(x.shape, axes, x.strides, array.strides)
        assert form is not None
    return array, form, weights.omits, total, not weights.checked


def refuse_nan(x: Array, axes: tuple[int, ...], weights: weighting.Weights | None) -> None:
    """Refuse NaN where a value counts."""
    if not x.size or x.dtype.kind in "iu":
        return
    channels = math.prod(layouts.channel_shape(x.shape, axes))
    kept = None if weights is None or weights.array is None else weights.array
    if kept is not None and kept.dtype != np.bool_:
        small = kept[tuple(slice(0, 1) if s == 0 else slice(None) for s in kept.strides)]
        kept = np.broadcast_to(small > 0, x.shape)
    totals = []
    for omits in (True, False):
        total = np.full(channels, float(layouts.values_per_channel(x.shape, axes)))
        if omits or kept is not None:
            chosen = weighting.Weights(kept, omits)
            first, second = np.zeros(channels), np.zeros(channels)
            run(kernels.MOMENTS, axes, x, first=first, second=second, weights=chosen, total=total)
        totals.append(total)
    missing = totals[1] - totals[0]
    if missing.any():
        got = f"{int(missing.sum())}, of them {int(missing[missing > 0][0])} in channel {int(np.argmax(missing > 0))}"
        raise ValueError(must("x", 'have no NaN with nan_policy="raise"', got))


def forward(
    x: Any,
    *,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    training: Any,
    momentum: Any,
    epsilon: Any,
    axis: Any,
    layout: str | None,
    ddof: Any,
    update: Any,
    out: Any,
    keep: Literal["nothing", "always", "unless in place", "output"],
    names: tuple[str, str] = ("moving_mean", "moving_variance"),
    activation: Any = None,
    residual: Any = None,
    mask: Any = None,
    sample_weight: Any = None,
    nan_policy: Any = "propagate",
    weights: weighting.Weights | None = None,
    known: tuple[Statistics, Array | None] | None = None,
) -> tuple[Array, Cache | None]:
    """Check, normalize, update, and keep a cache. The body of all forward functions.

    Training takes the statistics of the batch, and the sum of its weights, from `known`, if they were found before.
    Where somebody has checked `weights` they stand for mask, sample_weight and nan_policy.

    A cache refers to x, so "always" refuses to overwrite it; "unless in place" gives a cache without x then. The same
    goes for a residual from which an activation's derivative will be found. With "output" it refers to y, and there is
    neither activation nor residual.
    """
    x = checks.data(x, "x")
    axes = layouts.channel_axes(axis, layout, x.ndim)
    shape = layouts.channel_shape(x.shape, axes)
    mode = modes.functional_mode(
        checks.flag(training, "training"), update is not None and checks.flag(update, "update")
    )
    epsilon = checks.epsilon(epsilon)
    momentum = checks.momentum(momentum)
    ddof = checks.ddof(ddof)
    weight = checks.parameter(gamma, "gamma", shape)
    bias = checks.parameter(beta, "beta", shape)
    if keep == "output" and weight is not None:
        checks.not_zero(weight, "gamma", 'with save="output"')
    if (moving_mean is None) != (moving_variance is None):
        raise ValueError("moving_mean and moving_variance must be given together, got only one of them")
    bend = activations.resolved(activation)
    added = None if residual is None else checks.like(residual, "residual", x)
    if weights is None:
        later = mode != "inference" and known is None and nan_policy != "raise" and x.size > 0
        weights = weighting.resolved(mask, sample_weight, nan_policy, x, axes, later=later)
    given = weighting.given(mask, sample_weight)
    kept_residual = None if keep == "nothing" or bend is None or bend.from_output else added
    name_mean, name_variance = names
    updates = mode == "train" and moving_mean is not None
    if updates:
        moving_mean = checks.moving(moving_mean, "moving_mean", shape)
        moving_variance = checks.moving(moving_variance, "moving_variance", shape)
        checks.apart(moving_mean, "moving_mean", moving_variance=moving_variance)
        if keep in ("always", "unless in place"):  # the cache refers to x, which the update must not change
            checks.apart(moving_mean, "moving_mean", x=x, residual=kept_residual)
            checks.apart(moving_variance, "moving_variance", x=x, residual=kept_residual)
        checks.apart(moving_mean, "moving_mean", **given)
        checks.apart(moving_variance, "moving_variance", **given)
    elif mode == "inference":
        moving_mean = checks.required(moving_mean, name_mean, shape)
        moving_variance = checks.required(moving_variance, name_variance, shape)
    else:
        moving_mean = checks.parameter(moving_mean, "moving_mean", shape)
        moving_variance = checks.parameter(moving_variance, "moving_variance", shape)
    if out is None:
        y = layouts.like(x, checks.result_dtype(x.dtype))
    else:
        y = checks.output(out, x.shape, checks.result_dtype(x.dtype))
        if keep == "always":
            checks.apart(y, "out", x=x, residual=kept_residual)  # the cache refers to them
        checks.in_place_or_apart(y, "out", x, "x")
        if added is not None:
            checks.in_place_or_apart(y, "out", added, "residual")
        statistics_in = {name_mean: moving_mean, name_variance: moving_variance}
        checks.apart(y, "out", gamma=weight, beta=bias, **statistics_in, **given)
    result: Array = y if out is None else out  # of whatever class that is
    if nan_policy == "raise":
        refuse_nan(x, axes, weights)

    # Copied before anything is written: an update in place must not change a gradient that is still due.
    by_output = bend is not None and bend.from_output and added is not None
    kept_beta = None if bias is None or keep == "nothing" or bend is None or by_output else bias.copy()
    kept_gamma = None if keep == "nothing" or weight is None else weight.copy()
    arguments = {
        "gamma": weight, "beta": bias, "epsilon": epsilon, "out": y,
        "residual": added, "bend": None if bend is None else bend.bend,
    }  # fmt: skip
    if mode == "inference":
        if x.size:
            run(kernels.NORMALIZE, axes, x, mean=moving_mean, variance=moving_variance, **arguments)
        if keep == "nothing":
            return result, None
        statistics = Statistics(moving_mean.astype(np.float64), moving_variance.astype(np.float64))
        total = None if weights is None else np.ones(len(statistics.mean))  # which the gradient does not look at
    else:
        total = None if weights is None else np.zeros(math.prod(shape))
        values = layouts.values_per_channel(x.shape, axes)
        count: weighting.Count = values
        if known is None:
            found = batch_statistics(x, axes, values, kernels.TRAIN, weights=weights, total=total, **arguments)
            if found is None:
                assert weights is not None
                weights = weights.settled(axes)
                found = batch_statistics(x, axes, values, kernels.TRAIN, weights=weights, total=total, **arguments)
            elif weights is not None:
                weights = weights._replace(checked=True)
            assert found is not None
            statistics = found
        else:
            statistics, total = known
            if x.size:
                run(kernels.NORMALIZE, axes, x, mean=statistics.mean, variance=statistics.variance, **arguments)
        if weights is not None:
            assert total is not None
            count = weights.counts(total)
        if updates and (count.any() if isinstance(count, np.ndarray) else count):
            _channels.put(updated_moving(moving_mean, moving_variance, statistics, count, momentum, ddof))
    if keep == "nothing":
        return result, None
    if keep == "output":
        mean, variance, scale, sign = _channels.output_parameters(weight, bias, statistics.variance, epsilon)
        return result, Cache(y, axes, mode, (mean, variance), scale, 0.0, sign, weights=weights, total=total)
    kept = None if out is not None and checks.overlap(y, x) else x
    if out is not None and checks.overlap(y, kept_residual):
        kept_residual = None
    return result, Cache(
        kept,
        axes,
        mode,
        statistics,
        kept_gamma,
        epsilon,
        activation=bend,
        has_residual=added is not None,
        beta=kept_beta,
        residual=kept_residual,
        y=y if by_output else None,
        weights=weights,
        total=total,
    )


def batch_statistics(
    x: Array,
    axes: tuple[int, ...],
    count: int,
    operation: int,
    *,
    weights: weighting.Weights | None = None,
    total: Array | None = None,
    **arguments: Any,
) -> Statistics | None:
    """Carry out an operation that finds the moments of a batch, and return them; zeros for an empty batch.

    With weights, a channel without any has mean 0 and an infinite variance, which make y beta and the gradient 0. None
    if the weights were unchecked and turned out not to fit: nothing has been written then.
    """
    channels = math.prod(layouts.channel_shape(x.shape, axes))
    mean, m2 = np.zeros(channels), np.zeros(channels)
    if x.size and not run(operation, axes, x, first=mean, second=m2, weights=weights, total=total, **arguments):
        return None
    if total is not None:
        return Statistics(mean, _channels.variance_counted(m2, total, 0, math.inf))
    return Statistics(mean, _channels.variance(m2, max(count, 1)))


def updated_moving(
    moving_mean: Array,
    moving_variance: Array,
    statistics: Statistics,
    count: weighting.Count,
    momentum: float,
    ddof: int,
) -> list[tuple[Array, Array]]:
    """Return what checked moving arrays, of any shape, become, for `_channels.put`; channels of count 0 keep theirs."""
    mean, variance = moving_mean.flatten(), moving_variance.flatten()
    # ddof 1 turns the variance of m values, divided by m, into one divided by m - 1; of one value it stays 0.
    if isinstance(count, int):
        divisor = max(count - ddof, 1) / count
        _channels.update_moving(mean, variance, *statistics, divisor, momentum)
    else:
        counts = count if isinstance(count, np.ndarray) else weighting.per_channel(count, len(mean))
        counts = np.ascontiguousarray(counts, np.float64)
        _channels.update_moving_counted(mean, variance, *statistics, counts, ddof, momentum)
    return [(target, flat.reshape(target.shape)) for target, flat in ((moving_mean, mean), (moving_variance, variance))]
