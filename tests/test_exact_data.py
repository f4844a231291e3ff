"""On data whose moments every summation order gets exactly, the statistics are exact to the last bit.

Values come in pairs around a mean that is a power of two, and differ from it in few enough low bits that no
sum of values or of squared deviations is ever rounded in float32. So any error, however small, is a wrong
loop: a value left out, counted twice, or weighted wrongly.
"""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import reference as ref

from fastbn import batch_norm, moments

# (outer, channels, inner). Lane and block remainders, prime sizes, one channel, one value.
SHAPES = (
    (1, 1, 1),
    (2, 1, 1),
    (1, 3, 1),
    (5, 33, 27),
    (17, 23, 1),
    (2, 256, 784),
    (4, 200, 272),
    (1, 19, 864),
    (1, 257, 784),
    (1, 1024, 476),
    (2, 128, 4),
    (64, 3, 49),
    (1, 2, 100_003),
    (100_003, 2, 1),
    (30_011, 10, 1),
)


def exact_fill(outer: int, channels: int, inner: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x of shape (outer, channels, inner), its exact means and exact sums of squared deviations.

    A channel of L values has mean 2^e. With f = (24 - ceil(log2 L)) / 2 - 1 free bits, but at least 3,
    deviations are +- j * 2^(e-f) for j < 2^f / 2. Their squares are multiples of 4^(e-f) below 4^e / 4: L of
    them fit 24 bits.
    """
    length = outer * inner
    rng = np.random.default_rng([outer, channels, inner])
    free = max((24 - math.ceil(math.log2(max(length, 2)))) // 2 - 1, 3)
    e = np.arange(channels) % 7 - 2
    half = length // 2
    j = rng.integers(0, 2 ** (free - 1), (half, channels))
    values = np.zeros((length, channels))
    values[0 : 2 * half : 2], values[1 : 2 * half : 2] = j, -j
    means, step = np.ldexp(1.0, e), np.ldexp(1.0, e - free)
    m2 = (values**2).sum(0) * step**2
    x = means + values * step
    assert (x == x.astype(np.float32)).all()
    return x.reshape(outer, inner, channels).transpose(0, 2, 1).astype(np.float32), means, m2


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_and_variance_are_exact(shape, dtype):
    x, means, m2 = exact_fill(*shape)
    planar = np.ascontiguousarray(x, dtype)
    interleaved = np.ascontiguousarray(planar.transpose(0, 2, 1))
    count = shape[0] * shape[2]
    for array, axis in (
        (planar, 1),
        (interleaved, -1),
        (interleaved.transpose(0, 2, 1), 1),
        (planar[::-1], 1),
    ):
        s = moments(array, axis=axis)
        assert s.count == count
        ref.assert_same_bits(s.mean.astype(np.float32), means.astype(np.float32), "mean")
        ref.assert_same_bits(s.m2.astype(np.float32), m2.astype(np.float32), "m2")
        for ddof in (0, 1):
            mean, variance = cases.batch_statistics(array, axis=axis, ddof=ddof)
            ref.assert_same_bits(mean.astype(np.float32), means.astype(np.float32), "mean")
            expected = m2 / (count - ddof) if count > 1 else np.zeros_like(m2)
            ref.assert_same_bits(variance.astype(np.float32), expected.astype(np.float32), "variance")


@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
def test_output_and_sparse_integer_gradients(shape, rng):
    """Gradients of integers -2..2, few of them not 0: the sum of dy is exact as well."""
    x, means, m2 = exact_fill(*shape)
    dy = (rng.integers(-2, 3, x.shape) * (rng.random(x.shape) < 0.05)).astype(np.float32)
    channels = shape[1]
    gamma = np.ldexp(0.125, np.arange(channels) % 7).astype(np.float32)
    beta = (((np.arange(channels) % 3) - 1) * np.ldexp(1.0, np.arange(channels) % 7) / 512).astype(np.float32)
    for array, g, axis in (
        (x.copy(), dy, 1),
        (np.ascontiguousarray(x.transpose(0, 2, 1)), np.ascontiguousarray(dy.transpose(0, 2, 1)), -1),
    ):
        result = cases.training_results(array, g, gamma=gamma, beta=beta, axis=axis)
        expected = ref.train(array, gamma, beta, axis=axis)
        ref.assert_within(result["y"], expected, ref.train_tolerance(array, gamma, beta, axis=axis), "y")
        assert (result["dbeta"] == ref.rows(g, axis).sum(0)).all()
        dx, dgamma, _ = ref.backward_train(g, array, gamma, axis=axis)
        variance = m2 / (shape[0] * shape[2])
        tolerances = ref.gradient_tolerances(g, array, means, variance, gamma, axis=axis)
        ref.assert_within(result["dx"], dx, tolerances[0], "dx")
        ref.assert_within(result["dgamma"], dgamma, tolerances[1], "dgamma")


def test_every_value_counts_once():
    """One value at every position in turn: its share of mean and sum of squares is the same anywhere."""
    for outer, channels, inner in ((3, 5, 67), (67, 3, 1), (9, 1, 33)):
        m = outer * inner
        for position in range(m):
            x = np.zeros((m, channels), np.float32)
            x[position] = m
            array = x.reshape(outer, inner, channels)
            for view, axis in ((array, -1), (np.ascontiguousarray(array.transpose(0, 2, 1)), 1)):
                s = moments(view, axis=axis)
                # Merges round the mean a few times, and the outlier as a shift costs m * u64: far below 1 /
                # m.
                np.testing.assert_allclose(s.mean, 1, rtol=1e-14)
                np.testing.assert_allclose(s.m2, m * (m - 1), rtol=1e-12)


def test_momentum_one_and_zero_are_exact():
    x, means, m2 = exact_fill(5, 9, 27)
    mean, variance = cases.moving(9)
    kept = mean.copy(), variance.copy()
    batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=1.0, axis=1)
    ref.assert_same_bits(mean, kept[0])
    ref.assert_same_bits(variance, kept[1])
    batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.0, axis=1)
    ref.assert_same_bits(mean, means.astype(np.float32))
    ref.assert_same_bits(variance, (m2 / 135).astype(np.float32))
