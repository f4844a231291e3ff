"""fastbn.compat.tf_nn: the primitives of tf.nn."""

from __future__ import annotations

import numpy as np
import pytest

from fastbn.compat import tf_nn

f32 = np.float32


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axes", [0, [0], [0, 1, 2], (0, 2), [-1], [0, 1, 2, 3], []])
def test_moments(image, axes, keep):
    mean, variance = tf_nn.moments(image, axes, keep_dims=keep)
    reduced = tuple(axes) if isinstance(axes, list | tuple) else axes
    wide = image.astype(np.float64)
    if reduced == ():
        np.testing.assert_array_equal(mean, image)
        assert not variance.any()
        return
    assert mean.dtype == variance.dtype == f32
    assert mean.shape == wide.mean(reduced, keepdims=keep).shape
    np.testing.assert_allclose(mean, wide.mean(reduced, keepdims=keep), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(variance, wide.var(reduced, keepdims=keep), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8])
def test_dtype_of_moments(dtype):
    mean, variance = tf_nn.moments(np.array([[1, 2], [3, 6]], dtype), [0])
    assert mean.dtype == variance.dtype == (f32 if dtype is np.uint8 else dtype)
    assert (mean.tolist(), variance.tolist()) == ([2, 4], [1, 4])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("axes", "shape"),
    [([0, 1, 2], (4, 1, 1, 1)), ([0, 1, 2], (4, 2, 3, 5)), ([0], (3, 5)), ([0, 1, 2, 3], (4, 1, 1, 1))],
)
def test_weighted_moments(rng, image, axes, shape, keep):
    weights = rng.uniform(0, 3, shape)
    mean, variance = tf_nn.weighted_moments(image, axes, weights, keep_dims=keep)
    wide, w = image.astype(np.float64), np.broadcast_to(weights, image.shape)
    wanted = np.average(wide, tuple(axes), w, keepdims=True)
    spread = np.average((wide - wanted) ** 2, tuple(axes), w, keepdims=True)
    assert mean.dtype == f32
    assert mean.shape == (wanted.shape if keep else wanted.squeeze(tuple(axes)).shape)
    np.testing.assert_allclose(mean, wanted.reshape(mean.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, spread.reshape(mean.shape), rtol=1e-5)


def test_weighted_moments_of_one_number():
    mean, variance = tf_nn.weighted_moments(f32(5), [], 2.0)
    assert (mean.shape, mean, variance) == ((), 5, 0)


def test_moments_of_nothing_but_weights_of_0(image):
    mean, variance = tf_nn.weighted_moments(image, [0, 1, 2], np.array([0, 1, 1, 1, 1.0]))
    assert np.isnan([mean[0], variance[0]]).all()
    assert np.isfinite([mean[1:], variance[1:]]).all()


def test_keepdims_is_another_name(image):
    """Since TensorFlow 1.14."""
    for call in (
        tf_nn.moments,
        lambda x, axes, **more: tf_nn.weighted_moments(x, axes, 1.0, **more),
        tf_nn.sufficient_statistics,
    ):
        for old, new in zip(call(image, [0, 1], keep_dims=True), call(image, [0, 1], keepdims=True)):
            np.testing.assert_array_equal(old, new)
        with pytest.raises(ValueError, match=r"^keep_dims must be None where keepdims is given, got False$"):
            call(image, [0, 1], keep_dims=False, keepdims=True)


def test_moments_of_nothing():
    """As TensorFlow: NaN, and no mean of 0."""
    for axes in ([0], [0, 1]):
        assert np.isnan(tf_nn.moments(np.zeros((0, 3), f32), axes)).all()
    assert tf_nn.moments(np.zeros((2, 0), f32), [0])[0].shape == (0,)
    y, mean, variance = tf_nn.fused_batch_norm(np.zeros((0, 2, 2, 3), f32), np.ones(3), np.ones(3))
    assert y.size == 0
    assert np.isnan([mean, variance]).all()
    count, first, second, _ = tf_nn.sufficient_statistics(np.zeros((0, 3), f32), [0], 1.0)
    assert (count, first.tolist(), second.tolist()) == (0, [0] * 3, [0] * 3)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((1, 3), [0]), ((3,), [0]), ((8, 1), [-1]), ((8, 3), [0]), ((8, 3), [0, 1]), ((), [1]), ((1,), [0])],
)
@pytest.mark.parametrize("keep", [False, True])
def test_a_shift_is_broadcast_to_the_data(rng, x, shape, axes, keep):
    shift = rng.normal(0, 1, shape)
    count, first, second, given = tf_nn.sufficient_statistics(x, axes, shift, keep_dims=keep)
    wide, reduced = x.astype(np.float64) - shift, tuple(axes)
    assert count == np.prod([x.shape[a] for a in axes])
    np.testing.assert_array_equal(given, shift)
    for found, wanted in ((first, wide), (second, wide**2)):
        np.testing.assert_allclose(found, wanted.sum(reduced, keepdims=keep), rtol=1e-12, atol=1e-12)
        assert found.shape == wanted.sum(reduced, keepdims=keep).shape


@pytest.mark.parametrize("shift", [None, 100.0, np.full(5, 99.5, f32)])
def test_sufficient_statistics_and_back(rng, shift):
    x = rng.normal(100, 1, (50, 5)).astype(f32)
    count, first, second, given = tf_nn.sufficient_statistics(x, [0], shift)
    wide = x.astype(np.float64) - (0 if shift is None else shift)
    assert count == 50
    assert (given is None) == (shift is None)
    np.testing.assert_allclose(first, wide.sum(0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(second, (wide**2).sum(0), rtol=1e-12)
    mean, variance = tf_nn.normalize_moments(count, first, second, given)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(0), rtol=1e-9)
    _, kept, _, _ = tf_nn.sufficient_statistics(x, [0], shift if shift is None else 100.0, keep_dims=True)
    assert kept.shape == (1, 5)


def test_a_variance_is_negative_only_where_no_data_has_such_sums():
    """Rounding of float32 sums does not make one; TensorFlow returns it for sums that are of no data."""
    data = np.full((1000, 2), [100.1, 3], f32)
    sums = np.add.reduce(data), np.add.reduce(data**2)
    assert (sums[1] / 1000 - (sums[0] / 1000) ** 2).min() < 0
    assert (tf_nn.normalize_moments(1000, *sums, None)[1] >= 0).all()
    mean, variance = tf_nn.normalize_moments(np.ones(1, f32), np.array([0.5, 3], f32), np.array([0.5, 4], f32), None)
    np.testing.assert_array_equal(mean, [0.5, 3])
    np.testing.assert_array_equal(variance, [0.25, -5])


@pytest.mark.parametrize("shape", [(5,), (1, 1, 1, 5), (2, 1, 1), (4, 1, 1, 1), (), (4, 2, 3, 5), (2, 1, 5)])
def test_batch_normalization_broadcasts(rng, image, shape):
    mean, offset = rng.normal(0, 1, shape), rng.normal(0, 1, shape)
    variance, scale = rng.uniform(0.5, 2, shape), rng.normal(1, 1, shape)
    wanted = (image - mean) / np.sqrt(variance + 0.01) * scale + offset
    y = tf_nn.batch_normalization(image, mean, variance, offset, scale, 0.01)
    assert y.dtype == f32
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    plain = tf_nn.batch_normalization(image, mean, np.ones(5), None, None, 0.0)
    np.testing.assert_allclose(plain, image - mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_fused_batch_norm(rng, image, data_format):
    channel = 3 if data_format == "NHWC" else 1
    size, reduced = image.shape[channel], tuple(a for a in range(4) if a != channel)
    scale, offset = rng.normal(1, 1, size), rng.normal(0, 1, size)
    y, mean, variance = tf_nn.fused_batch_norm(image, scale, offset, data_format=data_format)
    wide = image.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(reduced), rtol=1e-6)
    np.testing.assert_allclose(variance, wide.var(reduced, ddof=1), rtol=1e-6)
    shown = [1] * 4
    shown[channel] = size
    centered = wide - wide.mean(reduced, keepdims=True)
    wanted = centered / np.sqrt(wide.var(reduced, keepdims=True) + 0.001) * scale.reshape(shown) + offset.reshape(shown)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    again, same_mean, same_variance = tf_nn.fused_batch_norm(
        image, scale, offset, mean, np.zeros(size), epsilon=0.0, data_format=data_format, is_training=False
    )
    assert same_mean.tolist() == mean.tolist()
    assert not same_variance.any()
    wanted = (wide - mean.reshape(shown)) / np.sqrt(1.001e-5) * scale.reshape(shown) + offset.reshape(shown)
    np.testing.assert_allclose(again, wanted, rtol=1e-4, atol=1e-3)


def test_activation_functions():
    x = np.array([-1.0, 3.0, 9.0, np.nan], f32)
    assert tf_nn.relu(x).tolist()[:3] == [0, 3, 9]
    assert tf_nn.relu6(x).tolist()[:3] == [0, 3, 6]
    assert np.isnan(tf_nn.relu6(x)[3])
    assert tf_nn.relu(x).dtype == tf_nn.relu6(x).dtype == f32


NN = [
    (lambda x: tf_nn.moments(x, 4), ValueError, "axes must be in -2 to 1, got 4"),
    (lambda x: tf_nn.moments(x, [0, 0]), ValueError, r"axes must name each axis once, got \[0, 0\]"),
    (lambda x: tf_nn.moments(x, 0.5), TypeError, "axes must be an int or a sequence of ints, got 0.5"),
    (lambda x: tf_nn.moments(x, [True]), TypeError, "axes must be an int or a sequence of ints"),
    (lambda x: tf_nn.moments(x.astype(int), 0), TypeError, "x must be float16, .*, got int64"),
    (
        lambda x: tf_nn.sufficient_statistics(x, -1, np.ones(8)),
        ValueError,
        r"shift must broadcast to shape \(8, 3\), got \(8,\)",
    ),
    (lambda x: tf_nn.sufficient_statistics(x, 0, np.ones((2, 8, 3))), ValueError, "shift must broadcast to shape"),
    (
        lambda x: tf_nn.weighted_moments(x, 0, np.ones(2)),
        ValueError,
        r"frequency_weights must broadcast to shape \(8, 3\)",
    ),
    (lambda x: tf_nn.weighted_moments(x, 0, -x), ValueError, "sample_weight must be finite and not negative"),
    (lambda x: tf_nn.normalize_moments(0, x, x, None), ValueError, "counts must be positive, got 0"),
    (lambda x: tf_nn.batch_normalization(x, None, x, None, None, 0.1), ValueError, "mean must be given, got None"),
    (
        lambda x: tf_nn.batch_normalization(x, np.ones(2), x, None, None, 0.1),
        ValueError,
        r"mean must broadcast to shape \(8, 3\), got \(2,\)",
    ),
    (
        lambda x: tf_nn.batch_normalization(x, x, x, np.ones((1, 8, 3)), None, 0.1),
        ValueError,
        r"offset must broadcast to shape \(8, 3\), got \(1, 8, 3\)",
    ),
    (
        lambda x: tf_nn.batch_normalization(x, x, x, None, None, -1.0),
        ValueError,
        "epsilon must be finite and at least 0",
    ),
    (
        lambda x: tf_nn.fused_batch_norm(x[:, None, None], np.ones(3), np.ones(3), is_training=False),
        ValueError,
        "mean and variance must be given without is_training, and only then, got is_training=False",
    ),
    (
        lambda x: tf_nn.fused_batch_norm(x[:, None, None], np.ones(3), np.ones(3), np.ones(3), np.ones(3)),
        ValueError,
        "mean and variance must be given without is_training, and only then, got is_training=True",
    ),
    (lambda x: tf_nn.fused_batch_norm(x, np.ones(3), np.ones(3)), ValueError, "x must have 4 dimensions with layout"),
    (lambda x: tf_nn.fused_batch_norm(x, 1, 1, data_format="NC"), ValueError, "data_format must be one of NHWC, NCHW"),
]


@pytest.mark.parametrize(("call", "error", "message"), NN, ids=range(len(NN)))
def test_primitives_refuse(x, call, error, message):
    with pytest.raises(error, match=message):
        call(x)
