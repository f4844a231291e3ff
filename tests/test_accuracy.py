"""Statistics, outputs and gradients are as close to exact arithmetic as the documentation says.

The limits in `test_mean_offsets` and `test_hard_data` are the promised ones, as plain numbers. Everything is
compared with longdouble arithmetic on the float32 or float64 values as they are stored.
"""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES

from fastbn import batch_norm, batch_norm_backward, batch_norm_forward, moments

pytestmark = pytest.mark.kernels

MEANS = (0.0, 1.0, 1e2, 1e3, 1e5, 1e7)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("case", BOTH, ids=cases.name)
def test_mean_offsets(case, mean):
    shape, axis = case
    x, dy = cases.normal(shape, mean=mean), cases.normal(shape, seed=1)
    gamma = np.ones(shape[axis], np.float32)
    result = cases.training_results(x, dy, gamma=gamma, beta=0 * gamma, axis=axis)
    exact = ref.moments(x, axis)
    variance = exact.variance()
    got_mean, got_variance = cases.batch_statistics(x, axis=axis)
    scale = np.maximum(np.abs(exact.mean), np.sqrt(variance))
    assert (np.abs(got_mean - exact.mean) <= 1e-7 * scale).all()
    assert (np.abs(got_variance - variance) <= 1e-6 * variance).all()
    assert np.abs(result["y"] - ref.train(x, axis=axis)).max() <= 3e-6
    dx, dgamma, dbeta = ref.backward_train(dy, x, axis=axis)
    assert np.abs(result["dx"] - dx).max() <= 1e-5
    tolerances = ref.gradient_tolerances(dy, x, exact.mean, variance, axis=axis)
    for name, expected, tolerance in zip(("dx", "dgamma", "dbeta"), (dx, dgamma, dbeta), tolerances, strict=True):
        ref.assert_within(result[name], expected, tolerance, name)


def outlier(z):
    flat = np.ones_like(z)
    flat[:] = 1 + 0.01 * z  # ones, but for float32 noise, so that the rest is not constant
    flat[0] = 1e6
    return flat


def outlier_among_ones(z):
    flat = np.ones_like(z)
    flat[0] = 1e6
    return flat


HARD = {
    "outlier first": outlier,
    "outlier among ones": outlier_among_ones,
    "sorted": lambda z: np.sort(1000 + z, axis=0),
    "sorted down": lambda z: np.sort(1000 + z, axis=0)[::-1],
    "drifting": lambda z: z + 1000 * np.linspace(0, 1, len(z))[:, None],
    "steps": lambda z: z + 1e4 * np.floor(np.linspace(0, 7, len(z)))[:, None],
    "alternating": lambda z: z + 1e5 * (-1.0) ** np.arange(len(z))[:, None],
    "tiny": lambda z: 1e-17 * z,
    "tiny with offset": lambda z: 1e-17 * (z + 100),
    "huge": lambda z: 1e18 * z,
    "huge with offset": lambda z: 1e18 * (z + 100),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("case", BOTH, ids=cases.name)
def test_hard_data(case, kind):
    shape, axis = case
    z = ref.rows(cases.normal(shape, np.float64, seed=2), axis).astype(np.float64)
    x = ref.unrows(HARD[kind](z), shape, axis).astype(np.float32)
    exact = ref.moments(x, axis)
    mean, variance = cases.batch_statistics(x, axis=axis)
    scale = np.maximum(np.abs(exact.mean), np.sqrt(exact.variance()))
    assert (np.abs(variance - exact.variance()) <= 2e-6 * exact.variance()).all()
    assert (np.abs(mean - exact.mean) <= 1e-7 * scale).all()
    s = moments(x, axis=axis)
    np.testing.assert_allclose(s.variance(), variance, rtol=1e-12)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BOTH[::2], ids=cases.name)
def test_outputs_and_gradients_within_the_derived_tolerance(case, dtype):
    shape, axis = case
    x, dy = cases.normal(shape, dtype, mean=30, deviation=2), cases.normal(shape, dtype, seed=1)
    gamma, beta = cases.parameters(shape[axis], dtype)
    result = cases.training_results(x, dy, gamma=gamma, beta=beta, axis=axis)
    exact = ref.moments(x, axis)
    mean, variance = cases.batch_statistics(x, axis=axis)
    ref.assert_within(mean, exact.mean, ref.mean_tolerance(x, axis), "mean")
    ref.assert_within(variance, exact.variance(), ref.variance_tolerance(x, axis) * exact.variance(), "variance")
    expected = ref.train(x, gamma, beta, axis=axis)
    ref.assert_within(result["y"], expected, ref.train_tolerance(x, gamma, beta, axis=axis), "y")
    gradients = ref.backward_train(dy, x, gamma, axis=axis)
    tolerances = ref.gradient_tolerances(dy, x, exact.mean, exact.variance(), gamma, axis=axis)
    for name, value, tolerance in zip(("dx", "dgamma", "dbeta"), gradients, tolerances, strict=True):
        ref.assert_within(result[name], value, tolerance, name)


SCALES = [(np.float32, s) for s in (1e-30, 1e-19, 1e-17, 1e18, 1e20, 1e30)]
SCALES += [(np.float64, s) for s in (1e-145, 1e-100, 1e100, 1e145)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("case", [((40, 3, 9), 1), ((300, 3), -1)], ids=cases.name)
def test_gradients_at_any_scale(case, dtype, scale):
    """No coefficient of the gradient under- or overflows where dx itself does not."""
    shape, axis = case
    x = (cases.normal(shape, np.float64, mean=1) * scale).astype(dtype)
    dy = cases.normal(shape, dtype, mean=0.5, seed=1)
    exact = ref.moments(x, axis)
    _, cache = batch_norm_forward(x, training=True, epsilon=0.0, axis=axis)
    gradients = ref.backward_train(dy, x, epsilon=0.0, axis=axis)
    tolerances = ref.gradient_tolerances(dy, x, exact.mean, exact.variance(), epsilon=0.0, axis=axis)
    results = batch_norm_backward(dy, cache)
    for name, got, value, tolerance in zip(("dx", "dgamma", "dbeta"), results, gradients, tolerances, strict=True):
        ref.assert_within(got, value, tolerance, name)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("case", BOTH[::3], ids=cases.name)
def test_inference_with_float64_statistics_keeps_both_parts_of_the_mean(case, mean):
    shape, axis = case
    x = cases.normal(shape, mean=mean)
    gamma, beta = cases.parameters(shape[axis])
    moving_mean, moving_variance = cases.moving(shape[axis], np.float64)
    moving_mean += mean + 0.1 * math.pi
    y = batch_norm(x, gamma=gamma, beta=beta, moving_mean=moving_mean, moving_variance=moving_variance, axis=axis)
    arguments = (x, moving_mean, moving_variance, gamma, beta, 1e-3, axis)
    ref.assert_within(y, ref.normalize(*arguments), ref.apply_tolerance(*arguments), "y")


def test_float32_deviations_are_rounded_once():
    """1 / sqrt is found within 6.1e-13, so that a scale is next to always the float32 that is nearest."""
    rng = np.random.default_rng(5)
    variance = (10.0 ** rng.uniform(-36, 36, 100_000)).astype(np.float32)
    ones, zeros = np.ones((1, len(variance)), np.float32), np.zeros(len(variance), np.float32)
    scale = batch_norm(ones, epsilon=0.0, moving_mean=zeros, moving_variance=variance)[0]
    exact = 1 / np.sqrt(variance.astype(np.float64))
    half = np.spacing(exact.astype(np.float32)).astype(np.float64) / 2
    assert (np.abs(scale - exact) <= half + 6.2e-13 * exact).all()  # 6.2: float64 rounds as well


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 130), (2, 130, 40)], ids=str)
def test_variances_of_any_size_change_no_bit_of_their_neighbours(shape, dtype):
    sizes = [5e-324, 1e-310, 9e-301, 1e-300, 1e-30, 1e30, 1e300, 1.1e300, 1.7e308]
    x = cases.normal(shape, dtype)
    variance = np.geomspace(0.1, 10.0, shape[1])
    arguments = {"axis": 1, "epsilon": 0.0, "moving_mean": np.zeros(shape[1])}
    near = batch_norm(x, gamma=np.ones(shape[1]), moving_variance=variance.copy(), **arguments)
    gamma, places = np.ones(shape[1]), np.arange(3, 3 + 13 * len(sizes), 13)
    variance[places] = sizes
    gamma[places] = np.sqrt(sizes)
    y = batch_norm(x, gamma=gamma, moving_variance=variance, **arguments)
    # Rounded: gamma, the root, its reciprocal, both together, and times x. float32 rounds 1 +- 7e-13 to 1.
    tolerance = (0.0 if dtype == np.float32 else 5 * ref.U64) * np.abs(x[:, places].astype(np.float64))
    assert (np.abs(y[:, places] - x[:, places]) <= tolerance).all()
    assert np.delete(y, places, 1).tobytes() == np.delete(near, places, 1).tobytes()
    for value, expected in ((np.inf, 0.0), (np.nan, np.nan), (-1.0, np.nan), (0.0, 0.0)):
        variance[places] = value
        y = batch_norm(x, gamma=np.ones(shape[1]), moving_variance=variance, **arguments)
        assert np.array_equal(y[:, places], np.full_like(y[:, places], expected), equal_nan=True)
        assert np.delete(y, places, 1).tobytes() == np.delete(near, places, 1).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 16, 70, 3001])
def test_one_value_per_channel_is_its_mean(channels, dtype):
    info = np.finfo(dtype)
    x = np.geomspace(info.smallest_subnormal, info.max / 2, channels, dtype=np.float64).astype(dtype)[np.newaxis]
    x[:, 1::2] *= -1
    mean, variance = cases.batch_statistics(x)
    assert (mean == x[0]).all()
    assert (variance == 0).all()
    for bad in (np.inf, -np.inf, np.nan):
        poisoned = x.copy()
        poisoned[0, -1] = bad
        mean, variance = cases.batch_statistics(poisoned)
        assert not np.isfinite(mean[-1])
        assert np.isnan(variance[-1])
        assert (mean[:-1] == x[0, :-1]).all()
        assert (variance[:-1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [1e-3, 1e-30, 0.0])
@pytest.mark.parametrize("shape", [(37, 61), (1, 61), (70, 61), (3, 61, 7, 7), (2, 61, 40, 41)], ids=str)
def test_a_constant_channel_gives_exactly_beta(shape, epsilon, dtype):
    info = np.finfo(dtype)
    exponents = np.linspace(info.minexp - info.nmant, info.maxexp - 1, shape[1]).astype(int)
    signs = (-1.0) ** np.arange(shape[1])
    constants = np.ldexp(signs.astype(dtype) * dtype(1.4616), exponents)  # subnormal to nearly overflowing
    gamma, beta = cases.parameters(shape[1], dtype)
    column = (1, -1) + (1,) * (len(shape) - 2)
    for layout_x in (np.asarray, lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)):
        x = layout_x(np.broadcast_to(constants.reshape(column), shape).copy())
        y = batch_norm(x, gamma=gamma, beta=beta, training=True, epsilon=epsilon, axis=1)
        assert (y == beta.reshape(column)).all()
        mean, variance = cases.batch_statistics(x, axis=1)
        assert (mean == constants).all()
        assert (variance == 0).all()
        assert (moments(x, axis=1).m2 == 0).all()


@pytest.mark.parametrize("value", [14.62, 0.1, 16777217.0, -3.3e-5])
def test_a_long_constant_column_has_no_variance(value):
    x = np.full((100_000, 3), value, np.float32)
    mean, variance = cases.batch_statistics(x)
    assert (variance == 0).all()
    assert (mean == np.float32(value)).all()
    assert (batch_norm(x, training=True) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", range(9))
def test_condition_numbers_against_fsum(power, dtype):
    k = 10.0**power
    for shape, axis in (((3000, 3), -1), ((5, 3, 600), 1), ((300, 2, 5), 1)):
        x = cases.normal(shape, dtype, mean=1.0, deviation=1 / k, seed=power)
        mean, variance = cases.batch_statistics(x, axis=axis)
        tolerance = ref.variance_tolerance(x, axis)
        for c, column in enumerate(ref.rows(x, axis).astype(np.float64).T):
            exact_mean = math.fsum(column) / len(column)
            about = math.fsum((column - exact_mean) ** 2) / len(column)
            exact = about - (math.fsum(column - exact_mean) / len(column)) ** 2
            assert abs(mean[c] - exact_mean) <= ref.mean_tolerance(x, axis)[c] + ref.U64 * abs(exact_mean)
            # The differences above are rounded to u64 of themselves: 3 u64 of their squares.
            assert abs(variance[c] - exact) <= (tolerance[c] + 3 * ref.U64) * exact
            assert variance[c] >= 0


def test_small_cases_against_exact_fractions(rng):
    for _ in range(30):
        m = int(rng.integers(1, 40))
        x = (rng.normal(0, 1, (m, 1)) * 10.0 ** rng.integers(-8, 8) + rng.normal(0, 10)).astype(np.float32)
        mean, m2 = ref.fraction_moments(x[:, 0])
        s = moments(x)
        assert abs(s.mean[0] - float(mean)) <= ref.mean_tolerance(x)[0] + ref.U64 * abs(float(mean))
        assert abs(s.m2[0] - float(m2)) <= (ref.variance_tolerance(x)[0] + ref.U64) * float(m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_variance_is_never_negative(dtype, rng):
    for seed in range(40):
        m = int(rng.integers(2, 300))
        base = dtype(10.0 ** rng.uniform(-10, 10))
        steps = rng.integers(-1, 2, (m, 5))
        x = (base + steps * np.spacing(base)).astype(dtype)
        for shape, axis in ((x, -1), (np.ascontiguousarray(x.T), 0)):
            _, variance = cases.batch_statistics(shape, axis=axis)
            assert (variance >= 0).all(), seed
            assert (moments(shape, axis=axis).m2 >= 0).all()


@pytest.mark.parametrize("case", BOTH[::2], ids=cases.name)
def test_nan_and_inf_stay_in_their_channel(case):
    shape, axis = case
    x, dy = cases.normal(shape), cases.normal(shape, seed=1)
    gamma, beta = cases.parameters(shape[axis])
    clean = cases.training_results(x, dy, gamma=gamma, beta=beta, axis=axis)
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = x.copy()
        np.moveaxis(poisoned, axis, -1)[(0,) * (len(shape) - 1)][0] = bad
        result = cases.training_results(poisoned, dy, gamma=gamma, beta=beta, axis=axis)
        assert_others_clean(result, clean, shape, axis)
        assert np.isnan(np.moveaxis(result["y"], axis, -1)[..., 0]).any()
        assert not np.isfinite(result["mean"][0])
        gradient = dy.copy()
        np.moveaxis(gradient, axis, -1)[(0,) * (len(shape) - 1)][0] = bad
        result = cases.training_results(x, gradient, gamma=gamma, beta=beta, axis=axis)
        assert_others_clean(result, clean, shape, axis)
        ref.assert_same_bits(result["y"], clean["y"])


def assert_others_clean(result, clean, shape, axis):
    """Every channel but the first has the bits that it has without a NaN anywhere."""
    for key, value in result.items():
        a, b = (np.moveaxis(v, axis, -1) if v.shape == shape else v for v in (value, clean[key]))
        ref.assert_same_bits(a[..., 1:], b[..., 1:], key)


@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["among near ones", "among far ones"])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (400, 20), (6, 20, 9, 9), (3, 20, 100, 100)])
def test_how_far_a_channel_is_from_zero_changes_no_bit_of_its_neighbours(shape, mean):
    """Sums that would cancel are taken around their mean, for that channel alone; where all are far, at once."""
    x, dy = cases.normal(shape, np.float32, mean=mean, seed=1), cases.normal(shape, np.float32, seed=2)

    def results(x):
        y, cache = batch_norm_forward(x, training=True, axis=1)
        dx, dgamma, dbeta = batch_norm_backward(dy, cache)
        m = moments(x, axis=1)
        return [np.moveaxis(y, 1, 0), np.moveaxis(dx, 1, 0), dgamma, dbeta, m.mean, m.m2]

    alike = results(x)
    for offset in (9.0, 1e4, np.nan, np.inf, -mean):
        other = x.copy()
        other[:, 3] += np.float32(offset)
        for a, b in zip(results(other), alike, strict=True):
            assert np.delete(a, 3, 0).tobytes() == np.delete(b, 3, 0).tobytes()
