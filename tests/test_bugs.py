"""Bugs that batch norms of other libraries had, each as a test that would have found it.

The issue numbers are those of the projects named; what is tested here is fastbn.
"""

from __future__ import annotations

import contextlib
import os

import cases
import numpy as np
import pytest
import reference as ref

from fastbn import BatchNorm, Moments, batch_norm, batch_norm_backward, batch_norm_forward, moments


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_cancellation(mean):
    """tensorflow #3290, #18334, #14353, #118701, flax #1491, scikit-learn #12333: E[x^2] - E[x]^2 went
    negative."""
    x = cases.normal((512, 4), mean=mean, deviation=mean * 1e-4)
    _, variance = cases.batch_statistics(x)
    exact = ref.moments(x).variance()
    assert (variance > 0).all()
    ref.assert_within(variance, exact, ref.variance_tolerance(x) * exact)
    assert np.isfinite(batch_norm(x, training=True, epsilon=0.0)).all()


def test_mean_5_deviation_a_tenth():
    """tt-metal #45968."""
    x = cases.normal((2, 32, 64, 64), mean=5, deviation=0.1)
    y = batch_norm(x, training=True, axis=1)
    ref.assert_within(y, ref.train(x, axis=1), ref.train_tolerance(x, axis=1))


@pytest.mark.parametrize("value", [14.62, 1e-3, 255.0])
def test_constant_column_of_1000_rows(value):
    """pytorch #5410, caffe #3963, scikit-learn #17794: rounding noise was scaled up to plus or minus one."""
    x = np.full((1000, 3), value, np.float32)
    assert (batch_norm(x, training=True, epsilon=0.0) == 0).all()


@pytest.mark.parametrize("scale", [1e-13, 1e-17, 1e-30])
def test_tiny_data_is_not_constant(scale):
    """scikit-learn #19726."""
    x = cases.normal((1000, 3), np.float64, deviation=scale)
    y = batch_norm(x, training=True, epsilon=0.0)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-12)


def test_one_value_per_channel_is_finite():
    """pytorch #1381, torch/nn #1271, tensorflow #34062, mlx #3817: n / (n - 1) was 1 / 0."""
    bn = BatchNorm(3, ddof=1)
    y = bn(np.array([[1.0, 2.0, 3.0]]), True)
    assert (y == 0).all()
    assert np.isfinite(bn.moving_variance).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3), (0, 3, 0)])
def test_empty_batches(shape):
    """pytorch #12013, #8933, #29578, #36530: division by zero, crashes, NaN statistics."""
    bn = BatchNorm(3, axis=1)
    bn(cases.normal((4, 3)), True)
    before = bn.state_dict()
    x = np.empty(shape, np.float32)
    assert bn(x, True).shape == shape
    assert bn.backward(x).shape == shape
    assert bn.grads["gamma"].tolist() == bn.grads["beta"].tolist() == [0, 0, 0]
    for name in ("moving_mean", "moving_variance"):
        ref.assert_same_bits(bn.state_dict()[name], before[name])


def test_sums_do_not_overflow():
    """scikit-learn #5602, and 200000 rows near the largest float16: sums and squares beyond the input's
    range."""
    x = np.full((200_000, 2), 65504, np.float32)
    x[::2] = -65504
    mean, variance = cases.batch_statistics(x)
    assert mean.tolist() == [0, 0]
    np.testing.assert_allclose(variance, 65504.0**2, rtol=1e-12)
    large = cases.normal((300, 2), deviation=1e37)
    exact = ref.moments(large)
    ref.assert_within(
        cases.batch_statistics(large)[1], exact.variance(), ref.variance_tolerance(large) * exact.variance()
    )
    assert np.isfinite(batch_norm(large, training=True)).all()


def test_momentum_zero_replaces_nan():
    """pytorch #88474, #90342, #1206: statistics once poisoned stayed so; with nothing of the old kept they
    recover."""
    mean, variance = np.full(3, np.nan), np.full(3, np.inf)
    x = cases.normal((4, 3), np.float64)
    batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.0)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-12)


def test_nan_in_one_channel_poisons_one():
    """The same issues: only the channel that has one, and inference with it gives NaN there, not
    elsewhere."""
    x = cases.normal((8, 3))
    x[2, 1] = np.nan
    mean, variance = cases.moving(3)
    y = batch_norm(x, moving_mean=mean, moving_variance=variance, training=True)
    assert np.isnan(y).all(0).tolist() == np.isnan(mean).tolist() == np.isnan(variance).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["gamma", "beta", "moving_mean", "moving_variance"])
@pytest.mark.parametrize(
    "wrong",
    [np.ones(2), np.ones(0), np.array(1.0), np.ones((3, 1)), np.ones((1, 3))],
    ids=lambda a: str(a.shape),
)
@pytest.mark.parametrize("training", [True, False])
def test_short_parameters(name, wrong, training):
    """pytorch #85217, #141203, #169208, #194014, #194798, cuTAGI #102: read past the end, or a crash."""
    arguments = {"moving_mean": np.zeros(3), "moving_variance": np.ones(3), name: wrong}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\)"):
        batch_norm(np.ones((4, 3)), training=training, **arguments)


def test_silent_permutation_of_channels_last():
    """pytorch #63224, #62594, #107199, #121651: strides were taken for granted."""
    x = cases.normal((2, 6, 5, 4), mean=np.arange(6)[:, None, None])
    expected = ref.train(x, axis=1)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3), (2, 3, 0, 1)):
        view = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
        ref.assert_within(batch_norm(view, training=True, axis=1), expected, ref.train_tolerance(x, axis=1))


def test_strided_moving_statistics_are_updated():
    """pytorch #33867: the update went to a contiguous copy."""
    both = np.ones((3, 2), np.float32)
    x = cases.normal((50, 3), mean=5)
    batch_norm(x, moving_mean=both[:, 0], moving_variance=both[:, 1], training=True, momentum=0.5)
    np.testing.assert_allclose(both[:, 0], 0.5 + 0.5 * x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(both[:, 1], 0.5 + 0.5 * x.var(0), rtol=1e-5)


@pytest.mark.parametrize("pair", [("gamma", "moving_variance"), ("beta", "moving_mean")])
def test_parameters_that_share_a_buffer(pair):
    """onnxruntime #29790, #29878, tt-metal #41127: y depended on momentum where arrays were shared."""
    x = cases.normal((4, 3), mean=2)
    results = []
    for momentum in (0.1, 0.9):
        arguments = {"moving_mean": np.zeros(3), "moving_variance": np.ones(3)} | dict.fromkeys(pair, np.full(3, 2.0))
        with contextlib.suppress(ValueError):  # refusing is right as well
            results.append(batch_norm(x, training=True, momentum=momentum, **arguments))
        # Nothing is written without an update, so sharing is harmless there.
        batch_norm(x, training=False, **arguments)
    if results:
        ref.assert_same_bits(*results)


def test_updates_from_non_zero_statistics(thread_count):
    """TileOPs #1727: a race on the running mean that tests missed because it started at 0."""
    x = cases.normal((64, 128, 7, 7), mean=3)
    results = []
    for _ in range(5):
        mean, variance = cases.moving(128)
        batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.9, axis=1)
        results.append((mean, variance))
    exact = ref.moments(x, 1)
    old_mean, _ = cases.moving(128)
    tolerance = ref.moving_tolerance(old_mean, exact.mean, 0.9, np.float32, ref.mean_tolerance(x, 1))
    ref.assert_within(results[0][0], ref.moving(old_mean, exact.mean, 0.9), tolerance)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            ref.assert_same_bits(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_biased_or_not(ddof, training):
    """pytorch #77427, #1410, tensorflow #55545, mxnet #21111, tt-metal #55438, onnx #3402: which one goes
    where."""
    x = cases.normal((5, 3), np.float64)
    mean, variance = np.zeros(3), np.ones(3)
    options = {
        "moving_mean": mean,
        "moving_variance": variance,
        "momentum": 0.9,
        "epsilon": 0.0,
        "ddof": ddof,
    }
    y = batch_norm(x, training=training, **options)
    if training:
        np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0, ddof=0), rtol=1e-12)
        np.testing.assert_allclose(variance, 0.9 + 0.1 * x.var(0, ddof=ddof), rtol=1e-14)
    else:
        np.testing.assert_array_equal(y, x)
        assert (variance == 1).all()


def test_zero_input_lets_the_variance_decay():
    """mxnet #14357: the running variance was never updated on CPUs."""
    bn = BatchNorm(3, momentum=0.9)
    for _ in range(100):
        bn(np.zeros((4, 3), np.float32), True)
    np.testing.assert_allclose(bn.moving_variance, 0.9**100, rtol=1e-5)
    assert (bn.moving_mean == 0).all()


@pytest.mark.parametrize("shape", [(1, 257, 28, 28), (3, 257, 1, 1), (2, 17, 5, 3)])
def test_channels_that_are_no_multiple_of_the_lanes(shape):
    """rocm-libraries #9031: a remainder loop off by one percent, hidden by loose tolerances."""
    x = cases.normal(shape, mean=1)
    for array, axis in ((x, 1), (np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1)):
        exact = ref.moments(array, axis)
        mean, variance = cases.batch_statistics(array, axis=axis)
        ref.assert_within(mean, exact.mean, ref.mean_tolerance(array, axis))
        ref.assert_within(variance, exact.variance(), ref.variance_tolerance(array, axis) * exact.variance())


def test_counts_beyond_32_bits():
    """tensorflow #38440, #23107, pytorch #181600: element counts in int32."""
    one = moments(np.array([[1.0], [2.0]]))
    big = Moments.from_dict({"count": 3 * 2**32, "mean": np.array([1.5]), "m2": np.array([0.25 * 3 * 2**32])})
    total = big + one
    assert total.count == 3 * 2**32 + 2
    np.testing.assert_allclose(total.mean, 1.5, rtol=1e-15)
    np.testing.assert_allclose(total.variance(), 0.25, rtol=1e-15)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FASTBN_TEST_LARGE"), reason="set FASTBN_TEST_LARGE=1: minutes of one core")
@pytest.mark.parametrize(("shape", "axis"), [((2**31 + 5, 1), -1), ((1, 1, 2**31 + 5), 1)])
def test_arrays_beyond_32_bits(shape, axis):
    """The same, with 2^31 values that take no memory: every stride is 0."""
    x = np.broadcast_to(np.float32(3.5), shape)
    s = moments(x, axis=axis)
    assert s.count == 2**31 + 5
    assert s.mean.tolist() == [3.5]
    assert s.m2.tolist() == [0]


def test_an_exception_leaves_no_partial_state():
    """No library guarded it: statistics written, then the output found to be wrong."""
    mean, variance = np.zeros(3), np.ones(3)
    for wrong in ({"out": np.empty((4, 3), np.float32)}, {"beta": np.ones(2)}, {"ddof": 7}, {"epsilon": -1}):
        with pytest.raises((TypeError, ValueError)):
            batch_norm(np.ones((4, 3)), moving_mean=mean, moving_variance=variance, training=True, **wrong)
    variance.flags.writeable = False
    with pytest.raises(ValueError, match="moving_variance"):
        batch_norm(np.ones((4, 3)), moving_mean=mean, moving_variance=variance, training=True)
    assert mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_read_only_inputs(training):
    """cython #1605, #1772, distributed #1978, scikit-learn #25172: memoryviews refused read-only arrays."""
    x, dy = cases.normal((4, 3)), cases.normal((4, 3), seed=1)
    gamma, beta = cases.parameters(3)
    mean, variance = cases.moving(3)
    for a in (x, dy, gamma, beta, *(() if training else (mean, variance))):
        a.flags.writeable = False
    _, cache = batch_norm_forward(
        x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, training=training
    )
    batch_norm_backward(dy, cache)
    moments(x)


def test_negative_zero_and_subnormals():
    """Signs of zero and subnormal numbers survive: nothing flushes them."""
    tiny = np.float32(np.finfo(np.float32).smallest_subnormal)
    x = np.array([[tiny, -0.0], [3 * tiny, -0.0]], np.float32)
    mean, variance = cases.batch_statistics(x)
    assert mean[0] == 2 * float(tiny)
    assert variance[0] == float(tiny) ** 2
    y = batch_norm(x, moving_mean=np.zeros(2), moving_variance=np.ones(2), epsilon=0.0)
    ref.assert_same_bits(y[:, 0], x[:, 0])
