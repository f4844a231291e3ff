"""The one oracle of the test suite: batch norm in extended precision, and the tolerances that follow from it.

Everything is computed in ``numpy.longdouble`` (64 bits of significand on x86-64) on the values as they are
stored, in the obvious two-pass way. Where even that should not be trusted, `fraction_moments` is exact.

Tolerances are functions of the data, the number of values and the unit roundoff; each docstring says where
its terms come from. None of them was fitted to a result.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

LD = np.longdouble
U32 = 2.0**-24
U64 = 2.0**-53


def unit(dtype) -> float:
    """Unit roundoff of a dtype: half the distance from 1 to the next number."""
    return float(np.finfo(dtype).eps) / 2


# -- arrays as rows of channels ----------------------------------------------------------------------------


def channel_axes(ndim: int, axis) -> tuple[int, ...]:
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(a % ndim for a in axes)


def channel_shape(x, axis=-1) -> tuple[int, ...]:
    x = np.asarray(x)
    return tuple(x.shape[a] for a in channel_axes(x.ndim, axis))


def rows(x, axis=-1) -> np.ndarray:
    """x as a longdouble matrix, one column per channel."""
    x = np.asarray(x)
    axes = channel_axes(x.ndim, axis)
    channels = math.prod(channel_shape(x, axis))
    values = math.prod(n for i, n in enumerate(x.shape) if i not in axes)
    return np.moveaxis(x, axes, range(-len(axes), 0)).reshape(values, channels).astype(LD)


def unrows(matrix, shape, axis=-1) -> np.ndarray:
    """The inverse of `rows`: a matrix back in the given shape."""
    axes = channel_axes(len(shape), axis)
    moved = [n for i, n in enumerate(shape) if i not in axes] + [shape[a] for a in axes]
    return np.moveaxis(np.asarray(matrix).reshape(moved), range(-len(axes), 0), axes)


def column(p, default: float) -> np.ndarray:
    """A parameter as a row vector over the channels."""
    return np.full(1, default, LD) if p is None else np.asarray(p).astype(LD).reshape(1, -1)


# -- batch norm --------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """Moments per channel: the number of values, their mean and the sum of squared deviations."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    def variance(self, ddof: int = 0) -> np.ndarray:
        return self.m2 / max(self.count - ddof, 1)


def moments(x, axis=-1) -> Exact:
    """Corrected two-pass moments in longdouble."""
    r = rows(x, axis)
    m = len(r)
    if m == 0:
        return Exact(0, np.zeros(r.shape[1], LD), np.zeros(r.shape[1], LD))
    mean = r.sum(0) / m
    d = r - mean
    slip = d.sum(0) / m
    return Exact(m, mean + slip, np.maximum((d * d).sum(0) - m * slip * slip, 0))


def fraction_moments(values) -> tuple[Fraction, Fraction]:
    """Mean and sum of squared deviations of one channel without any rounding. For small cases."""
    exact = [Fraction(float(v)) for v in values]
    mean = sum(exact, Fraction()) / len(exact)
    return mean, sum(((v - mean) ** 2 for v in exact), Fraction())


def inverse_deviation(variance, epsilon: float) -> np.ndarray:
    """1 / sqrt(variance + epsilon); 0 where both are 0, so that a constant channel is normalized to 0."""
    total = np.asarray(variance).astype(LD) + LD(epsilon)
    return np.where(total > 0, 1 / np.sqrt(np.where(total > 0, total, 1)), 0)


def normalize(x, mean, variance, gamma=None, beta=None, epsilon=1e-3, axis=-1) -> np.ndarray:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta with given statistics: the inference mode."""
    r = rows(x, axis)
    x_hat = (r - column(mean, 0)) * inverse_deviation(column(variance, 1), epsilon)
    return unrows(x_hat * column(gamma, 1) + column(beta, 0), np.shape(x), axis)


def train(x, gamma=None, beta=None, epsilon=1e-3, axis=-1) -> np.ndarray:
    """The same with the statistics of x itself."""
    s = moments(x, axis)
    return normalize(x, s.mean, s.variance(), gamma, beta, epsilon, axis)


def backward_train(dy, x, gamma=None, epsilon=1e-3, axis=-1):
    """dx, dgamma, dbeta through the batch statistics."""
    r, d = rows(x, axis), rows(dy, axis)
    s = moments(x, axis)
    inv = inverse_deviation(s.variance(), epsilon)
    x_hat = (r - s.mean) * inv
    dbeta, dgamma = d.sum(0), (d * x_hat).sum(0)
    m = max(s.count, 1)
    dx = column(gamma, 1) * inv * (d - dbeta / m - x_hat * (dgamma / m))
    return unrows(dx, np.shape(x), axis), dgamma, dbeta


def backward_inference(dy, x, mean, variance, gamma=None, epsilon=1e-3, axis=-1):
    """dx, dgamma, dbeta where the statistics are constants."""
    d = rows(dy, axis)
    inv = inverse_deviation(column(variance, 1), epsilon)
    x_hat = (rows(x, axis) - column(mean, 0)) * inv
    return unrows(d * column(gamma, 1) * inv, np.shape(x), axis), (d * x_hat).sum(0), d.sum(0)


def moving(old, batch, momentum: float) -> np.ndarray:
    """momentum * old + (1 - momentum) * batch, where momentum is the double that the caller gave."""
    return LD(momentum) * np.asarray(old).astype(LD) + LD(1.0 - momentum) * np.asarray(batch).astype(LD)


# -- weights -----------------------------------------------------------------------------------------------


class Weighted(NamedTuple):
    """What `weighted` gives: rows of channels where rows are needed, else one number per channel."""

    total: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    weights: np.ndarray  # rows, 0 for what is missing
    kept: np.ndarray  # rows: x, and 0 where it has no weight
    missing: np.ndarray  # rows

    @property
    def variance(self) -> np.ndarray:
        """Infinite where there is no weight: the channel is normalized to 0."""
        return np.where(self.total > 0, self.m2 / np.where(self.total > 0, self.total, 1), np.inf)


def weighted(x, weights=None, axis=-1, omit=False) -> Weighted:
    """Moments of values that count by weights of x's rank, 0 meaning not at all, whatever the value is."""
    r = rows(x, axis)
    w = np.ones_like(r) if weights is None else rows(np.broadcast_to(weights, np.shape(x)), axis)
    if omit:
        w = np.where(np.isnan(r), 0, w)
    kept = np.where(w > 0, r, 0)
    total = w.sum(0)
    safe = np.where(total > 0, total, 1)
    mean = (w * kept).sum(0) / safe
    d = np.where(w > 0, kept - mean, 0)
    slip = (w * d).sum(0) / safe
    m2 = np.maximum((w * d * d).sum(0) - total * slip * slip, 0)
    return Weighted(total, mean + slip, m2, w, kept, (w == 0) & ~np.isfinite(r))


def backward_weighted(dy, x, weights=None, gamma=None, epsilon=1e-3, axis=-1, omit=False):
    """dx, dgamma, dbeta through weighted statistics: y, and so dy, is everywhere but where a value is missing."""
    s = weighted(x, weights, axis, omit)
    inv = inverse_deviation(s.variance, epsilon)
    d = np.where(s.missing, 0, rows(dy, axis))
    x_hat = np.where(s.missing, 0, np.where(s.missing, 0, rows(x, axis)) - s.mean) * inv
    share = s.weights / np.where(s.total > 0, s.total, 1)
    dbeta, dgamma = d.sum(0), (d * x_hat).sum(0)
    dx = column(gamma, 1) * inv * (d - share * dbeta - share * x_hat * dgamma)
    return unrows(np.where(s.missing, 0, dx), np.shape(x), axis), dgamma, dbeta


def weighted_tolerances(x, weights=None, axis=-1, omit=False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For total, relative; for the mean, absolute; for m2, relative.

    As `mean_tolerance` and `variance_tolerance`, and a product with a weight rounds each term once more. A part is
    summed as it is where its mean is at most 8 deviations: 64 times the sum of squares is rounded then, else one that
    is relative to the mean.
    """
    s = weighted(x, weights, axis, omit)
    n = len(s.kept)
    d = np.where(s.weights > 0, s.kept - s.mean, 0)
    total = np.where(s.total > 0, s.total, 1)
    average = (s.weights * np.abs(s.kept)).sum(0) / total
    mean = 2 * U64 * depth(n) * (average + np.abs(d).max(0, initial=0))
    variance = np.where(s.m2 > 0, s.m2 / total, 1)
    step = 2 * U64 * depth(n) * np.sqrt(1 + s.mean**2 / variance)
    spread = (d**2).max(0, initial=0) / variance
    return np.full(len(total), U64 * depth(n)), mean, 2 * step + step**2 + 2 * U64 * depth(n) * (65 + spread)


def weighted_gradient_tolerances(dy, x, weights=None, gamma=None, epsilon=1e-3, axis=-1, omit=False):
    """Absolute, for dx, dgamma and dbeta: as `gradient_tolerances`, the share of a weight in place of 1 / m."""
    s = weighted(x, weights, axis, omit)
    u = unit(np.asarray(x).dtype)
    safe = unrows(np.where(s.missing, 0, rows(x, axis)), np.shape(x), axis).astype(np.asarray(x).dtype)
    d = np.where(s.missing, 0, np.abs(rows(dy, axis)))
    inv = inverse_deviation(s.variance, epsilon)
    x_hat = np.abs((rows(safe, axis) - s.mean) * inv)
    _, t_mean, t_m2 = weighted_tolerances(x, weights, axis, omit)
    variance = np.where(np.isfinite(s.variance), s.variance, 0)
    e = rows(apply_tolerance(safe, s.mean, variance, None, None, epsilon, axis), axis) + inv * t_mean + x_hat * t_m2
    share = s.weights / np.where(s.total > 0, s.total, 1)
    sums = 8 * u + U64 * depth(len(d))
    size_beta, size_gamma = d.sum(0), (d * x_hat).sum(0)
    tol_beta, tol_gamma = sums * size_beta, sums * size_gamma + (d * e).sum(0)
    terms = d + share * size_beta + share * x_hat * size_gamma
    inherited = share * tol_beta + share * x_hat * tol_gamma + share * e * size_gamma
    tiny = 4 * float(np.finfo(np.asarray(x).dtype).smallest_subnormal)
    tol_dx = np.abs(column(gamma, 1)) * inv * ((12 * u + t_m2) * terms + inherited) + tiny
    return unrows(tol_dx, np.shape(x), axis), tol_gamma + tiny, tol_beta + tiny


# -- activations -------------------------------------------------------------------------------------------

GELU = 2 * np.sqrt(LD(2) / np.pi)
SMOOTH = {"silu": (LD(1), LD(0)), "gelu_tanh": (GELU, LD(0.044715) * GELU)}


def slope_of(activation) -> float:
    return activation[1] if isinstance(activation, tuple) else 0.01


def sigmoid(z, activation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The t of z * sigmoid(t), that sigmoid, and its derivative in z."""
    k1, k3 = SMOOTH[activation]
    z = np.clip(np.asarray(z, LD), -1000, 1000)
    t = k1 * z + k3 * z**3
    e = np.exp(-np.abs(t))
    return t, np.where(t > 0, 1, e) / (1 + e), e / (1 + e) ** 2 * (k1 + 3 * k3 * z**2)


def activate(z, activation) -> np.ndarray:
    z = np.asarray(z, LD)
    if activation is None:
        return z
    if activation in SMOOTH:
        return np.where(z == -np.inf, 0, z) * sigmoid(z, activation)[1]
    if activation == "relu":
        return np.where(z <= 0, 0, z)
    if activation == "relu6":
        return np.where(z <= 0, 0, np.where(z >= 6, 6, z))
    return np.where(z <= 0, LD(slope_of(activation)) * z, z)


def activation_derivative(z, activation) -> np.ndarray:
    z = np.asarray(z, LD)
    if activation is None:
        return np.ones_like(z)
    if activation in SMOOTH:
        _, s, ds = sigmoid(z, activation)
        return s + np.clip(z, -1000, 1000) * ds
    if activation in ("relu", "relu6"):
        flat = (z <= 0) | ((z >= 6) & (activation == "relu6"))
        return np.where(flat, LD(0), LD(1))
    return np.where(z <= 0, LD(slope_of(activation)), LD(1))


# -- tolerances --------------------------------------------------------------------------------------------


def depth(n: int) -> float:
    """Float64 roundings between a value and the total of n values.

    Blocks are cut by shape and merged in order or as a tree; within a block each lane adds one after another.
    The product of lane length and number of merges is unknown here, so this takes the root of n (blocks as
    long as there are many), plus the pairwise depth.
    """
    return math.sqrt(n) + 2 * math.log2(n + 1) + 4


def condition(x, axis=-1) -> np.ndarray:
    """k = sqrt(1 + mean^2 / variance), the condition number of the variance (Chan, Golub, LeVeque 1983)."""
    s = moments(x, axis)
    var = s.variance()
    return np.sqrt(1 + s.mean**2 / np.where(var > 0, var, 1))


def mean_tolerance(x, axis=-1) -> np.ndarray:
    """Absolute, for a mean kept in float64, whatever the data are stored in.

    u64 * depth * (average |x| + largest |x - mean|): each value and partial sum is rounded once per level,
    relative to a shift that is one of the values, perhaps the furthest.
    """
    r = rows(x, axis)
    m = max(len(r), 1)
    away = np.abs(r - r.sum(0) / m).max(0, initial=0)
    return U64 * depth(m) * (np.abs(r).sum(0) / m + away)


def variance_tolerance(x, axis=-1) -> np.ndarray:
    """Relative, for a variance kept in float64, whatever the data are stored in.

    Pairwise updating: k * u64 * depth (the means that a merge subtracts are rounded to u64 * |mean|), and its
    square where a mean off by k * u64 * depth deviations adds its own square. Blocks are summed relative to
    one of their own values, which may be the one furthest from the mean: 1 + spread^2 times the sum of
    squares is rounded then.
    """
    r = rows(x, axis)
    if not len(r):
        return np.zeros(r.shape[1], LD)
    s = moments(x, axis)
    spread = ((r - s.mean) ** 2).max(0) / np.where(s.m2 > 0, s.variance(), 1)
    step = U64 * depth(len(r)) * condition(x, axis)
    return 2 * step + step**2 + U64 * depth(len(r)) * (1 + spread)


def apply_tolerance(x, mean, variance, gamma=None, beta=None, epsilon=1e-3, axis=-1) -> np.ndarray:
    """Absolute, for the output where the statistics are given.

    (x - m_hi) * a + b' in the dtype of x: the difference, a, the product and the sum are each rounded once, 4
    u of |gamma * x_hat|; b' = beta - m_lo * a twice and the sum once, 3 u of |beta|; m_lo = mean - m_hi is at
    most u * |mean| and rounded to u^2 * |mean|, and the part of it in x - m_hi and in b' cancel: 3 u^2 *
    |mean| * a. In float64 there is no second part: u * |mean| * a more for a mean that arrives rounded.
    """
    x = np.asarray(x)
    u, tiny = unit(x.dtype), float(np.finfo(x.dtype).smallest_subnormal)
    scale = np.abs(column(gamma, 1)) * inverse_deviation(column(variance, 1), epsilon)
    center = np.abs(column(mean, 0))
    away = np.abs(rows(x, axis) - column(mean, 0))
    spare = 3 * u * u * center if x.dtype.itemsize == 4 else u * center
    tolerance = u * (5 * away * scale + 3 * np.abs(column(beta, 0))) + (spare + 2 * tiny) * scale + 2 * tiny
    return unrows(np.broadcast_to(tolerance, away.shape), x.shape, axis)


def activation_tolerance(z, z_tolerance, activation, dtype) -> np.ndarray:
    """Absolute, for act(z) where z is off by its tolerance.

    No slope of these functions is above 1.13, but that of leaky_relu. The relu family rounds at most a slope and a
    product. The smooth ones: t is rounded three times, and its coefficients once each, 5 u of |t| that sigmoid'(t)
    passes on; exp is within 4 u, the sum, the reciprocal and two products take one each: 8 u of |y|. Below the
    normal numbers exp and y are off by the smallest number, which z multiplies.
    """
    u, tiny = unit(dtype), float(np.finfo(dtype).smallest_subnormal)
    z = np.asarray(z, LD)
    if activation is None:
        return z_tolerance + 0 * z
    if activation not in SMOOTH:
        y = np.abs(activate(z, activation))
        return max(1.0, abs(slope_of(activation))) * z_tolerance + 2 * u * y + tiny
    t, s, _ = sigmoid(z, activation)
    y = np.abs(np.where(z == -np.inf, 0, z) * s)
    return 1.13 * z_tolerance + u * (8 * y + 5 * np.abs(z * t) * s * (1 - s)) + tiny * (1 + np.abs(z))


def derivative_tolerance(z, z_tolerance, activation, dtype) -> np.ndarray:
    """Absolute, for act'(z) of a smooth activation: a second derivative is at most 1.2, and the terms s and
    z s' are rounded like the value, with t' four times more; sigmoid'' / sigmoid' is at most 1."""
    u, tiny = unit(dtype), float(np.finfo(dtype).smallest_subnormal)
    z = np.clip(np.asarray(z, LD), -1000, 1000)
    t, s, ds = sigmoid(z, activation)
    passed_on = 5 * np.abs(t) * (s * (1 - s) + np.abs(z * ds))
    return 1.2 * z_tolerance + u * (8 * s + 14 * np.abs(z * ds) + passed_on) + tiny * (1 + np.abs(z) ** 3)


def train_tolerance(x, gamma=None, beta=None, epsilon=1e-3, axis=-1) -> np.ndarray:
    """Absolute, for the output of training: `apply_tolerance`, a mean off by its tolerance, and half the
    relative tolerance of the variance on |gamma * x_hat|."""
    s = moments(x, axis)
    var = s.variance()
    scale = np.abs(column(gamma, 1)) * inverse_deviation(var, epsilon)
    away = np.abs(rows(x, axis) - s.mean) * scale
    stats = scale * mean_tolerance(x, axis) + away * variance_tolerance(x, axis) / 2
    return apply_tolerance(x, s.mean, var, gamma, beta, epsilon, axis) + unrows(stats, np.shape(x), axis)


def gradient_tolerances(dy, x, mean, variance, gamma=None, epsilon=1e-3, axis=-1, through_batch=True):
    """Absolute, for dx, dgamma and dbeta.

    x_hat is off by e = `apply_tolerance` of the plain normalization plus the errors of the batch statistics.
    A sum over a channel is off by u64 * depth of the average magnitude, and a float32 result is rounded once
    (products and lanes in float32 within a block: 8 u). dx multiplies and subtracts three terms, 8 u of each
    of their magnitudes, and inherits e times the average |dy * x_hat| and the error of the mean of dy *
    x_hat.
    """
    x, dy = np.asarray(x), np.asarray(dy)
    u, r, d = unit(x.dtype), rows(x, axis), rows(dy, axis)
    m = max(len(r), 1)
    inv = inverse_deviation(column(variance, 1), epsilon)
    x_hat = (r - column(mean, 0)) * inv
    e = rows(apply_tolerance(x, mean, variance, None, None, epsilon, axis), axis)
    e_inv = 2 * u
    if through_batch:
        e = e + inv * mean_tolerance(x, axis) + np.abs(x_hat) * variance_tolerance(x, axis) / 2
        e_inv = e_inv + variance_tolerance(x, axis) / 2
    sums = 8 * u + U64 * depth(m)
    size_beta, size_gamma = np.abs(d).sum(0), np.abs(d * x_hat).sum(0)
    tol_beta = sums * size_beta
    tol_gamma = sums * size_gamma + (np.abs(d) * e).sum(0)
    terms = np.abs(d)
    inherited = 0
    if through_batch:
        terms = terms + np.abs(d.sum(0)) / m + np.abs(x_hat) * size_gamma / m
        inherited = tol_beta / m + np.abs(x_hat) * tol_gamma / m + e * size_gamma / m
    tiny = 4 * float(np.finfo(x.dtype).smallest_subnormal)
    tol_dx = np.abs(column(gamma, 1)) * inv * ((8 * u + e_inv) * terms + inherited) + tiny
    return unrows(tol_dx, x.shape, axis), tol_gamma + tiny, tol_beta + tiny


def moving_tolerance(old, batch, momentum: float, dtype, batch_tolerance=0) -> np.ndarray:
    """Absolute, for a moving statistic of the given dtype: two products and a sum, each rounded to it at most
    once, and the share of the batch statistic's own tolerance."""
    size = abs(momentum) * np.abs(np.asarray(old).astype(LD)) + abs(1 - momentum) * np.abs(np.asarray(batch))
    return 3 * unit(dtype) * size + abs(1 - momentum) * batch_tolerance + float(np.finfo(dtype).smallest_subnormal)


# -- comparisons -------------------------------------------------------------------------------------------


def assert_within(actual, expected, tolerance, what: str = "values") -> None:
    """Every value within its own tolerance; otherwise say where the worst one is and by how much it
    misses."""
    actual = np.asarray(actual)
    expected = np.asarray(expected).reshape(actual.shape)
    tolerance = np.broadcast_to(np.asarray(tolerance, LD), expected.shape)
    error = np.abs(actual.astype(LD) - expected)
    bad = ~(error <= tolerance)
    if bad.any():
        ratio = np.where(bad, error / np.where(tolerance > 0, tolerance, np.finfo(LD).tiny), 0)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), error.shape)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} outside the tolerance; worst at {tuple(map(int, worst))}: "
            f"got {actual[worst]!r}, expected {expected[worst]!r}, "
            f"error {float(error[worst]):.3g}, allowed {float(tolerance[worst]):.3g}"
        )


def same_bytes(a, b) -> bool:
    """Whether arrays of one dtype and shape hold the same bytes, without a copy where both lie in one piece."""
    whole = a.flags.c_contiguous and b.flags.c_contiguous and a.ndim and a.itemsize in (1, 2, 4, 8)
    if not whole:
        return a.tobytes() == b.tobytes()
    return np.array_equal(*(v.view(f"u{v.itemsize}") for v in (a, b)))


def assert_same_bits(actual, expected, what: str = "values") -> None:
    """Equal shape, dtype and bytes (so NaN equals NaN, and -0.0 does not equal 0.0)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if not same_bytes(actual, expected):
        differ = np.flatnonzero([a.tobytes() != b.tobytes() for a, b in zip(actual.ravel(), expected.ravel())])
        first = differ[0]
        raise AssertionError(
            f"{what}: {len(differ)} of {actual.size} differ in bits; first at flat index {first}: "
            f"{actual.ravel()[first]!r} and {expected.ravel()[first]!r}"
        )
