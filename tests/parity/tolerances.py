"""How far two right implementations of batch norm may be apart: derived here once, never tuned.

All computations round to u = 2**-24 (float32) or 2**-53 (float64). Notation: m values per channel, mean mu, variance v,
r = 1 / sqrt(v + epsilon), x_hat = (x - mu) * r, g(n) = n * u / (1 - n * u), which bounds the relative error of a sum or
product of n terms in any order (N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1).

Statistics of a framework, computed in the type of x:

    e_mu = g(m + 1) * mean|x|                                       the sum of m terms, and a division
    e_v  = g(m + 4) * (v + e_mu^2) + e_mu^2                         two passes: squares of x - (mu + e_mu)
    e_v  = g(m + 3) * mean(x^2) + 2 |mu| e_mu + e_mu^2 + u (mu^2 + v)     one pass: E[x^2] - E[x]^2

Keras adds 1e-7 to m where there is a mask: e_mu and e_v grow by |mu| and v times 1e-7 / m.

The factor: with rho = (e_v + 2 u (v + epsilon)) / (v + epsilon), the relative error of r is at most
e_r = rho / (2 (1 - rho)) + 4 u, the 4 u for a reciprocal square root that is approximated.

x_hat, subtracted first (flax, NumPy), or as x * a + (beta - mu * a) (PyTorch, oneDNN, TensorFlow, Keras on JAX and
ONNX Runtime):

    e_hat = (u |x - mu| + e_mu) * r + |x_hat| * (e_r + 2 u)
    folded adds u * (2 |x| + 2 |mu|) * r

    e_y = |gamma| * e_hat + 3 u (|gamma * x_hat| + |beta|)          and e_y of fastbn: 4 u (|gamma * x_hat| + |beta|)

fastbn's statistics are float64, and its products do not cancel: that is the second bound, of its four roundings. Where
x is float64 too, both sides round alike, and e_mu and e_v count twice.

Gradients in training, with d = dy, over M values (M > m where a mask leaves some out), whether written by hand or by
automatic differentiation, which forms the gradient of the variance and multiplies it by 2 (x - mu) / m, or by 2 x / m
and 2 mu / m apart where the variance was computed in one pass:

    e_beta  = g(M) * sum|d|
    e_gamma = g(M + 4) * sum|d x_hat| + sum(|d| e_hat)
    e_dx    = |gamma| r * ( |d| (e_r + 4 u) + S1 (g(M + 4) + e_r) + |x_hat| (S2 (g(M + 8) + 3 e_r) + S3)
              + S2 (e_hat + 2 r e_mu + 8 u w) )
    S1 = sum|d| / m,   S2 = sum|d x_hat| / m,   S3 = sum(|d| e_hat) / m,   w = |x_hat|, one pass: (|x| + |mu|) r

In inference the statistics are given: e_mu = e_v = 0, and dx = gamma r d. Moving statistics after a step:

    e_s <- p e_s + (1 - p) e_b + u (|s| + |b|) + 4 u (|p s| + |(1 - p) b|)

the first u for p itself, which may be rounded, the others for products and sums;
e_b is e_mu, or e_v with a factor of m / (m - 1) and two roundings more where the variance is that of m - 1.
Terms of second order are left out above: all bounds are taken times 1.1. They are for data whose bounds are small
against 1.
"""

from __future__ import annotations

import math

import numpy as np

SECOND_ORDER = 1.1
TINY = 1e-37  # where results are subnormal


def unit(dtype) -> float:
    """The unit roundoff of float32 or float64."""
    return float(np.finfo(dtype).eps) / 2


class Step:
    """Exact values, in float64, of one call on x, and bounds of what a right implementation makes of it.

    All arrays have the rank of x, and broadcast against it.
    """

    def __init__(
        self,
        x,
        axis,
        epsilon,
        gamma=None,
        beta=None,
        *,
        mask=None,
        divisor=0.0,
        given=None,
        one_pass=False,
        folded=False,
    ):
        self.u = unit(x.dtype)
        axes = (axis,) if isinstance(axis, int) else axis
        self.channels = tuple(sorted(a % x.ndim for a in axes))
        self.over = tuple(a for a in range(x.ndim) if a not in self.channels)
        self.x = x.astype(np.float64)
        self.w = np.broadcast_to(1.0 if mask is None else mask, x.shape).astype(np.float64)
        self.m = self.w.sum(self.over, keepdims=True)
        self.size = math.prod(x.shape[a] for a in self.over)
        self.gamma, self.beta = self.spread(gamma, 1.0), self.spread(beta, 0.0)
        self.epsilon, self.one_pass, self.given = epsilon, one_pass, given is not None
        seen = np.where(self.w > 0, self.x, 0.0)  # what is masked may be NaN
        if given is not None:
            self.mean, self.variance = (self.spread(a, 0.0) for a in given)
            self.e_mean = self.e_variance = np.zeros_like(self.mean)
        else:
            self.mean = seen.sum(self.over, keepdims=True) / self.m
            self.variance = (self.w * (seen - self.mean) ** 2).sum(self.over, keepdims=True) / self.m
            self.e_mean = self.g(self.size + 1) * abs(seen).sum(self.over, keepdims=True) / self.m
            if one_pass:
                square = (seen**2).sum(self.over, keepdims=True) / self.m
                self.e_variance = self.g(self.size + 3) * square + 2 * abs(self.mean) * self.e_mean + self.e_mean**2
                self.e_variance += self.u * (self.mean**2 + self.variance)
            else:
                self.e_variance = self.g(self.size + 4) * (self.variance + self.e_mean**2) + self.e_mean**2
        if divisor:  # is added to m
            self.e_mean = self.e_mean + abs(self.mean) * divisor / self.m
            self.e_variance = self.e_variance + self.variance * divisor / self.m + self.e_mean**2
        if x.dtype == np.float64:
            self.e_mean, self.e_variance = 2 * self.e_mean, 2 * self.e_variance
        total = self.variance + epsilon
        rho = (self.e_variance + 2 * self.u * total) / total
        assert (rho < 0.5).all(), "data for which nothing follows from rounding errors"
        self.r = 1 / np.sqrt(total)
        self.e_r = rho / (2 * (1 - rho)) + 4 * self.u
        self.hat = (self.x - self.mean) * self.r
        self.e_hat = (self.u * abs(self.x - self.mean) + self.e_mean) * self.r + abs(self.hat) * (self.e_r + 2 * self.u)
        if folded:
            self.e_hat = self.e_hat + self.u * (2 * abs(self.x) + 2 * abs(self.mean)) * self.r
        # What batch renormalization does to x_hat: see `renormalize`.
        self.factor, self.offset = np.ones_like(self.r), np.zeros_like(self.r)
        self.e_factor, self.e_offset = np.zeros_like(self.r), np.zeros_like(self.r)

    def g(self, n):
        return n * self.u / (1 - n * self.u)

    def spread(self, parameter, otherwise):
        """A parameter in the rank of x and in float64."""
        shape = [n if a in self.channels else 1 for a, n in enumerate(self.x.shape)]
        if parameter is None:
            return np.full(shape, otherwise)
        return np.asarray(parameter, np.float64).reshape(shape)

    def flat(self, statistic):
        """A statistic in the shape of a parameter."""
        return statistic.reshape([self.x.shape[a] for a in self.channels])

    def renormalize(self, mean, deviation, rmin=None, rmax=None, dmax=None):
        """Take in r and d of batch renormalization, from averages that both sides share; clipping adds no error."""
        mean = self.spread(mean, 0.0)
        deviation = np.maximum(self.spread(deviation, 1.0), math.sqrt(self.epsilon))
        sigma = 1 / self.r
        self.factor, self.offset = sigma / deviation, (self.mean - mean) / deviation
        self.e_factor = self.factor * (self.e_r + 4 * self.u)
        self.e_offset = (self.e_mean + self.u * (abs(self.mean) + abs(mean))) / deviation + 4 * self.u * abs(
            self.offset
        )
        self.factor = np.clip(self.factor, rmin, rmax) if (rmin, rmax) != (None, None) else self.factor
        self.offset = np.clip(self.offset, -dmax, dmax) if dmax is not None else self.offset

    @property
    def y(self):
        return (self.hat * self.factor + self.offset) * self.gamma + self.beta

    @property
    def e_y(self):
        gamma = abs(self.gamma)
        inner = abs(self.factor) * self.e_hat + abs(self.hat) * self.e_factor + self.e_offset
        size = gamma * (abs(self.hat * self.factor) + abs(self.offset)) + abs(self.beta)
        return SECOND_ORDER * (gamma * inner + 9 * self.u * size) + TINY

    def gradients(self, dy):
        """Bounds of dx, dgamma and dbeta; the last two in the shape of a parameter."""
        d, hat = abs(dy.astype(np.float64)), abs(self.hat)
        scale = abs(self.gamma) * self.r * self.factor
        relative = self.e_r + np.divide(self.e_factor, self.factor, out=np.zeros_like(self.r), where=self.factor != 0)
        e_beta = self.g(self.size + 4) * d.sum(self.over, keepdims=True)
        seen = hat * abs(self.factor) + abs(self.offset)
        e_seen = self.e_hat * abs(self.factor) + hat * self.e_factor + self.e_offset
        e_gamma = self.g(self.size + 8) * (d * seen).sum(self.over, keepdims=True)
        e_gamma = e_gamma + (d * e_seen).sum(self.over, keepdims=True)
        e_dx = d * (relative + 8 * self.u)
        if not self.given:
            s1, s2, s3 = ((d * k).sum(self.over, keepdims=True) / self.m for k in (1, hat, self.e_hat))
            wide = (abs(self.x) + abs(self.mean)) * self.r if self.one_pass else hat
            inner = s1 * (self.g(self.size + 8) + relative)
            inner = inner + hat * (s2 * (self.g(self.size + 12) + 3 * self.e_r + relative) + s3)
            inner = inner + s2 * (self.e_hat + 2 * self.r * self.e_mean + 12 * self.u * wide)
            e_dx = e_dx + inner
        e_dx = SECOND_ORDER * scale * e_dx + TINY
        return e_dx, *(SECOND_ORDER * self.flat(e) + TINY for e in (e_gamma, e_beta))


class Moving:
    """Bounds of a moving mean and a moving variance over steps."""

    def __init__(self, mean, variance):
        self.values = [np.asarray(a, np.float64) for a in (mean, variance)]
        self.errors = [np.zeros(np.shape(a)) for a in (mean, variance)]

    def update(self, step: Step, keep: float, ddof: int = 0) -> None:
        """Take a batch in, of which a share of ``keep`` is the old value."""
        factor = step.flat(step.m) / (step.flat(step.m) - ddof)
        batch = [step.flat(step.mean), step.flat(step.variance) * factor]
        errors = [step.flat(step.e_mean), step.flat(step.e_variance) * factor + 2 * step.u * batch[1]]
        for i in range(2):
            rounding = 4 * step.u * (abs(keep * self.values[i]) + abs((1 - keep) * batch[i]))
            rounding = rounding + step.u * (abs(self.values[i]) + abs(batch[i]))
            self.errors[i] = keep * self.errors[i] + (1 - keep) * errors[i] + rounding
            self.values[i] = keep * self.values[i] + (1 - keep) * batch[i]

    @property
    def bounds(self):
        return [SECOND_ORDER * e + TINY for e in self.errors]


def assert_within(ours, theirs, bound, what: str) -> None:
    """Compare two results by a bound that has their shape, or broadcasts to it."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    apart = abs(ours.astype(np.float64) - theirs.astype(np.float64))
    if not (apart <= bound).all():
        share = np.where(apart <= bound, 0, apart / bound)
        place = np.unravel_index(np.nanargmax(np.where(np.isnan(share), np.inf, share)), ours.shape)
        raise AssertionError(
            f"{what} at {place}: {ours[place]!r} and {theirs[place]!r}, {share[place]:.3g} times the bound"
        )
