"""Weights that cannot be summed as they are: refused before anything is changed, or scaled."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref
from test_bits import digest
from test_weights import run

from fastbn import batch_norm, moments

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("scale", [1e-300, 1e-60, 1e60, 1e300])
def test_weights_of_any_size(scale):
    x, dy = cases.normal((40, 3), seed=1), cases.normal((40, 3), seed=2)
    w = np.random.default_rng(0).integers(0, 4, 40).astype(np.float64)
    gamma, beta = cases.parameters(3)
    plain, scaled = run(x, dy, gamma, beta, -1, sample_weight=w), run(x, dy, gamma, beta, -1, sample_weight=w * scale)
    for name in plain:
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-6, atol=1e-6)
    a, b = moments(x, sample_weight=w), moments(x, sample_weight=w * scale)
    np.testing.assert_allclose(b.count, a.count * scale, rtol=1e-14)
    np.testing.assert_allclose(b.m2, a.m2 * scale, rtol=1e-12)


@pytest.mark.parametrize("shape", [(40,), (40, 3)], ids=str)
def test_weights_whose_sum_is_no_number(shape):
    """It would make the moving variance NaN."""
    mean, variance = cases.moving(3)
    moving = {"moving_mean": mean.copy(), "moving_variance": variance.copy()}
    with pytest.raises(ValueError, match=r"sample_weight must have a finite sum, got weights of up to 1e\+308"):
        batch_norm(cases.normal((40, 3)), sample_weight=np.full(shape, 1e308), training=True, **moving)
    np.testing.assert_array_equal(moving["moving_mean"], mean)
    np.testing.assert_array_equal(moving["moving_variance"], variance)
    one = np.zeros(shape)
    one[7] = 1e308  # of each channel
    assert moments(cases.normal((40, 3)), sample_weight=one).count == 1e308


SPOILED = [((6, 3, 40), 1), ((70, 5, 7, 7), 1), ((40, 33), -1), ((5000, 3), -1), ((40, 1), -1), ((2, 2, 9001), 1)]


@pytest.mark.levels
@pytest.mark.parametrize("omit", [False, True])
@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("case", SPOILED, ids=cases.name)
def test_bad_weights_of_values_are_found_before_anything_is_written(case, kind, omit):
    """They are looked at while they are summed."""
    shape, axis = case
    x = cases.normal(shape)
    rng = np.random.default_rng(4)
    message = r"sample_weight must be finite and not negative, got -?(inf|nan|7\.88\d+e-31)"
    options = {"training": True, "axis": axis, "nan_policy": "omit" if omit else "propagate"}
    for bad in (-(2.0**-100), np.nan, np.inf, -np.inf):
        for place in (0, x.size - 1, int(rng.integers(x.size))):
            w = rng.random(shape).astype(kind)
            w.flat[place] = bad
            z = x.copy()
            if omit:
                z.flat[place] = np.nan
            before = z.copy()
            mean, variance = cases.moving(shape[axis])
            moving = {"moving_mean": mean.copy(), "moving_variance": variance.copy()}
            for out in (z, None):  # a new result may have been written, but nobody sees it
                with pytest.raises(ValueError, match=message):
                    batch_norm(z, out=out, sample_weight=w, **moving, **options)
                ref.assert_same_bits(z, before)
                np.testing.assert_array_equal(moving["moving_mean"], mean)
                np.testing.assert_array_equal(moving["moving_variance"], variance)
            with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
                moments(z, sample_weight=w, axis=axis)


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("case", [((2, 3, 37), 1), ((3, 83), -1), ((2, 3, 5, 4), 1)], ids=cases.name)
def test_a_bad_weight_is_found_wherever_it_is(case, kind):
    """In every lane, in the second of two channels or columns that are summed side by side, and in what overlaps."""
    shape, axis = case
    x = cases.normal(shape)
    w = np.random.default_rng(6).random(shape).astype(kind)
    for place in range(x.size):
        good, w.flat[place] = w.flat[place], -1
        with pytest.raises(ValueError, match=r"sample_weight must be finite and not negative, got -1\.0"):
            moments(x, sample_weight=w, axis=axis)
        w.flat[place] = good
    moments(x, sample_weight=w, axis=axis)


def test_bad_weights_where_arrays_are_copied():
    """Strides that fit neither access pattern: the result is not copied back."""
    x, out = cases.normal((4, 3, 8, 6))[:, :, ::2], np.full((4, 3, 8, 6), 7, np.float32)[:, :, ::2]
    w = np.random.default_rng(0).random(x.shape)
    assert (batch_norm(x, training=True, axis=1, sample_weight=w, out=out) != 7).all()
    out[...] = 7
    w[3, 2, 1, 5] = -1
    with pytest.raises(ValueError, match=r"sample_weight must be finite and not negative, got -1\.0"):
        batch_norm(x, training=True, axis=1, sample_weight=w, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("case", [((6, 3, 40), 1), ((40, 33), -1)], ids=cases.name)
def test_weights_of_values_that_are_scaled_or_minus_0(case, kind):
    shape, axis = case
    x, dy = cases.normal(shape), cases.normal(shape, seed=1)
    gamma, beta = cases.parameters(shape[axis])
    w = np.random.default_rng(0).integers(0, 4, shape).astype(kind)
    w.flat[0] = 0
    plain = run(x, dy, gamma, beta, axis, sample_weight=w)
    for scale in (2.0**-60, 2.0**60):
        scaled = run(x, dy, gamma, beta, axis, sample_weight=(w * scale).astype(kind))
        for name in plain:
            np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-6, atol=1e-6)
        a, b = moments(x, sample_weight=w, axis=axis), moments(x, sample_weight=(w * scale).astype(kind), axis=axis)
        np.testing.assert_allclose(b.count, a.count * scale, rtol=1e-14)
        np.testing.assert_allclose(b.m2, a.m2 * scale, rtol=1e-12)
    w.flat[0] = -0.0
    assert digest(run(x, dy, gamma, beta, axis, sample_weight=w)) == digest(plain)
    nothing = batch_norm(x, beta=beta, training=True, axis=axis, sample_weight=np.zeros_like(w))
    np.testing.assert_array_equal(ref.rows(nothing, axis), np.broadcast_to(beta, ref.rows(x, axis).shape))
