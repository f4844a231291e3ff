"""Any rank, any channel axis, any strides: the same numbers, and outputs with the strides of the input."""

from __future__ import annotations

import itertools
import math

import cases
import numpy as np
import pytest
import reference as ref
from cases import DTYPES

from fastbn import Moments, batch_norm, batch_norm_backward, batch_norm_forward, moments, normalize

RANKS = ((7,), (5, 4), (3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4))
EVERY_AXIS = [(shape, axis) for shape in RANKS for axis in range(-len(shape), len(shape))]
NAMES = {
    "NC": (2, 1),
    "NCL": (3, 1),
    "NLC": (3, 2),
    "NCHW": (4, 1),
    "NHWC": (4, 3),
    "NCDHW": (5, 1),
    "NDHWC": (5, 4),
}
NAMED = [(name, *NAMES[name]) for name in NAMES]
NAMED += [("channels_first", rank, 1) for rank in (2, 3, 4, 5)]
NAMED += [("channels_last", rank, rank - 1) for rank in (2, 3, 4, 5)]


def check_training(x, axis):
    """A training step on x against the oracle; returns y and dx."""
    shape = cases.channel_shape(x, axis)
    channels = math.prod(shape)
    gamma, beta = (p.reshape(shape) for p in cases.parameters(channels))
    dy = cases.normal(x.shape, x.dtype.newbyteorder("="), seed=9)
    y, cache = batch_norm_forward(x, gamma=gamma, beta=beta, training=True, axis=axis)
    dx, dgamma, dbeta = batch_norm_backward(dy, cache)
    native = np.asarray(x).astype(x.dtype.newbyteorder("="))
    tolerance = ref.train_tolerance(native, gamma, beta, axis=axis)
    ref.assert_within(y, ref.train(native, gamma, beta, axis=axis), tolerance, "y")
    exact = ref.moments(native, axis)
    gradients = ref.backward_train(dy, native, gamma, axis=axis)
    tolerances = ref.gradient_tolerances(dy, native, exact.mean, exact.variance(), gamma, axis=axis)
    for name, value, expected, allowed in zip("xgb", (dx, dgamma, dbeta), gradients, tolerances, strict=True):
        ref.assert_within(np.ravel(value), np.ravel(expected), np.ravel(allowed), f"gradient of {name}")
    return y, dx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EVERY_AXIS, ids=cases.name)
def test_every_rank_and_axis(case, dtype):
    shape, axis = case
    x = cases.normal(shape, dtype, mean=2)
    y, dx = check_training(x, axis)
    assert y.shape == dx.shape == shape
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4))), ids=str)
def test_every_order_of_memory(permutation):
    """Any axis of an array whose memory has the axes in any order."""
    shape = (3, 4, 5, 6)
    x = cases.normal([shape[p] for p in permutation], mean=2).transpose(np.argsort(permutation))
    assert x.shape == shape
    for axis in range(4):
        y, dx = check_training(x, axis)
        assert y.strides == dx.strides == x.strides


@pytest.mark.parametrize(("name", "rank", "axis"), NAMED)
def test_layouts_by_name(name, rank, axis):
    x = cases.normal((2, 3, 4, 5, 6)[:rank], mean=2)
    expected = batch_norm(x, training=True, axis=axis)
    ref.assert_same_bits(batch_norm(x, training=True, layout=name), expected)
    ref.assert_same_bits(batch_norm(x, training=True, layout=name, axis=axis), expected)
    ref.assert_same_bits(batch_norm(x, training=True, layout=name, axis=axis - rank), expected)
    s = moments(x, layout=name)
    assert s == moments(x, axis=axis)
    ref.assert_same_bits(normalize(x, s.mean, s.variance(), layout=name), normalize(x, s.mean, s.variance(), axis=axis))
    assert Moments().update(x, layout=name) == s


@pytest.mark.parametrize(
    ("name", "rank", "axis"), [("NCHW", 4, 2), ("NCHW", 4, -2), ("NHWC", 4, 1), ("channels_last", 3, 0)]
)
def test_axis_and_layout_that_disagree(name, rank, axis):
    with pytest.raises(ValueError, match="layout"):
        batch_norm(cases.normal((3,) * rank), training=True, layout=name, axis=axis)


def test_axis_minus_one_counts_as_not_given():
    x = cases.normal((2, 3, 4, 5))
    ref.assert_same_bits(batch_norm(x, training=True, layout="NCHW", axis=-1), batch_norm(x, training=True, axis=1))


@pytest.mark.parametrize(("name", "rank"), [("NCHW", 3), ("NHWC", 5), ("NC", 1), ("NLC", 2), ("NCDHW", 4)])
def test_layout_of_another_rank(name, rank):
    with pytest.raises(ValueError, match=name):
        batch_norm(cases.normal((3,) * rank), training=True, layout=name)


TUPLES = [
    ((4, 3, 5), (1, 2)),
    ((4, 3, 5), (0, 2)),
    ((4, 3, 5), (-2, -1)),
    ((2, 3, 4, 5), (1, 3)),
    ((6, 4), (1,)),
]


@pytest.mark.parametrize(("shape", "axis"), TUPLES)
def test_a_tuple_of_axes_makes_every_combination_a_channel(shape, axis):
    x = cases.normal(shape, mean=2)
    check_training(x, axis)
    channel_shape = cases.channel_shape(x, axis)
    mean, variance = np.zeros(channel_shape), np.ones(channel_shape)
    batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.0, axis=axis)
    exact = ref.moments(x, axis)
    ref.assert_within(mean.ravel(), exact.mean, ref.mean_tolerance(x, axis), "mean")
    ref.assert_within(variance.ravel(), exact.variance(), ref.variance_tolerance(x, axis) * exact.variance())
    y = batch_norm(x, moving_mean=mean, moving_variance=variance, axis=axis)
    flat = (x, mean, variance, None, None, 1e-3, axis)
    ref.assert_within(y, ref.normalize(*flat), ref.apply_tolerance(*flat), "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (20, 33, 7, 7), (2, 3, 50, 51), (64, 8, 1, 1)], ids=str)
def test_nchw_and_nhwc_agree(shape, dtype):
    """To rounding: twice the tolerance of either."""
    x = cases.normal(shape, dtype, mean=5)
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    y = batch_norm(x, training=True, layout="NCHW")
    z = batch_norm(nhwc, training=True, layout="NHWC")
    ref.assert_within(z.transpose(0, 3, 1, 2), y, 2 * ref.train_tolerance(x, axis=1))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (8, 16, 7, 7)], ids=str)
def test_outputs_have_the_strides_of_the_input(shape):
    x = cases.normal(shape)
    channels_last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    fortran = np.asfortranarray(x)
    mean, variance = cases.moving(shape[1])
    for a in (x, channels_last, fortran):
        y, cache = batch_norm_forward(a, training=True, axis=1)
        dx, _, _ = batch_norm_backward(a, cache)
        z = batch_norm(a, moving_mean=mean, moving_variance=variance, axis=1)
        w = normalize(a, mean, variance, axis=1)
        assert y.strides == dx.strides == z.strides == w.strides == a.strides
    # Memory that has holes, or runs backwards, is not imitated: the order of its axes is.
    y = batch_norm(channels_last[::-1, :, ::2], training=True, axis=1)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("along", [0, 1, 2])
def test_broadcast_inputs_with_zero_strides(along, axis):
    shape = [4, 5, 6]
    shape[along] = 1
    x = np.broadcast_to(cases.normal(shape, mean=2), (4, 5, 6))
    assert 0 in x.strides
    y, _ = check_training(x, axis)
    assert y.flags.writeable
    assert 0 not in y.strides
    expected = batch_norm(x.copy(), training=True, axis=axis)
    tolerance = 2 * ref.train_tolerance(x, axis=axis)
    ref.assert_within(batch_norm(x, training=True, axis=axis), expected, tolerance)


@pytest.mark.parametrize("along", [0, 1, 2])
def test_broadcast_inputs_whatever_strides_others_have(along):
    """The bits are those of x alone, whether or not all is copied because the residual does not fit."""
    shape = [4, 5, 60]
    shape[along] = 1
    x = np.broadcast_to(cases.normal(shape, mean=2), (4, 5, 60))
    residual = cases.normal((8, 10, 120), seed=1)[::2, ::2, ::2]
    for axis in range(3):
        s = moments(x, axis=axis)
        _, cache = batch_norm_forward(x, residual=residual, training=True, axis=axis)
        ref.assert_same_bits(cache.statistics.mean, s.mean)
        ref.assert_same_bits(cache.statistics.variance, s.variance())


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f4", "<f8"])
def test_byte_order(dtype):
    x = cases.normal((20, 6), np.float64, mean=2).astype(dtype)
    y = batch_norm(x, training=True)
    native = np.dtype(dtype).newbyteorder("=")
    assert y.dtype == native
    ref.assert_same_bits(y, batch_norm(x.astype(native), training=True))
    gamma = np.arange(1, 7).astype(dtype)
    ref.assert_same_bits(
        batch_norm(x, gamma=gamma, training=True),
        batch_norm(x.astype(native), gamma=gamma.astype(native), training=True),
    )


class Tagged(np.ndarray):
    """A subclass that would notice if its ufuncs were used."""

    def __array_ufunc__(self, *args, **kwargs):
        raise AssertionError("a subclass's ufuncs must not be called")


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_subclasses_give_plain_arrays():
    x = cases.normal((20, 6), mean=2)
    expected = batch_norm(x, training=True)
    for a in (np.asmatrix(x), x.view(Tagged)):
        y = batch_norm(a, training=True)
        assert type(y) is np.ndarray
        ref.assert_same_bits(y, expected)


def test_memory_maps(tmp_path):
    x = cases.normal((20, 6), mean=2)
    np.save(tmp_path / "x.npy", x)
    y = batch_norm(np.load(tmp_path / "x.npy", mmap_mode="r"), training=True)
    ref.assert_same_bits(np.asarray(y), batch_norm(x, training=True))


def test_masked_arrays_are_rejected():
    x = np.ma.masked_less(cases.normal((20, 6)), 0)
    with pytest.raises(TypeError, match="mask"):
        batch_norm(x, training=True)
    with pytest.raises(TypeError, match="mask"):
        moments(x)


def test_lists_are_float64():
    values = [[1.0, 2.0], [3.0, 5.0]]
    y = batch_norm(values, training=True)
    assert y.dtype == np.float64
    ref.assert_same_bits(y, batch_norm(np.array(values), training=True))
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32, float64, uint8 or int8, got int64"):
        batch_norm([[1, 2], [3, 5]], training=True)


@pytest.mark.parametrize("x", [np.float32(1), np.array(1.0), 1.0], ids=["scalar", "0-d", "float"])
def test_no_dimension_no_channels(x):
    for call in (lambda: batch_norm(x, training=True), lambda: moments(x)):
        with pytest.raises(ValueError, match="dimension"):
            call()


ZERO_SIZES = [
    ((0, 5), -1),
    ((0,), -1),
    ((3, 0), -1),
    ((0, 0), -1),
    ((0, 4, 3, 3), 1),
    ((2, 4, 0, 3), 1),
    ((2, 0, 3), 1),
]
ZERO_SIZES += [((2, 3, 0, 4), -1), ((0, 3, 4), -1), ((5, 0), 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ZERO_SIZES, ids=cases.name)
def test_zero_sizes(case, training, dtype):
    shape, axis = case
    x = np.empty(shape, dtype)
    channels = shape[axis]
    mean, variance = cases.moving(channels)
    kept = mean.copy(), variance.copy()
    values = math.prod(n for i, n in enumerate(shape) if i != axis % len(shape))
    gamma, beta = cases.parameters(channels)
    y, cache = batch_norm_forward(
        x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, training=training, axis=axis
    )
    assert y.shape == shape
    assert y.dtype == dtype
    dx, dgamma, dbeta = batch_norm_backward(np.empty_like(x), cache)
    assert dx.shape == shape
    assert dgamma.tolist() == dbeta.tolist() == [0] * channels
    ref.assert_same_bits(mean, kept[0])
    ref.assert_same_bits(variance, kept[1])
    s = moments(x, axis=axis)
    assert s.count == values  # not 0 where there are no channels to have them
    assert s.mean.tolist() == s.m2.tolist() == [0] * channels
    assert normalize(x, mean, variance, axis=axis).shape == shape


def test_moving_arrays_of_several_axes_in_any_memory():
    """Statistics of shape (3, 5) whose strides cannot be walked as one are updated in place, too."""
    x = cases.normal((8, 3, 5), mean=2)
    expected = np.zeros((3, 5)), np.ones((3, 5))
    batch_norm(x, moving_mean=expected[0], moving_variance=expected[1], training=True, axis=(1, 2))
    for make in (
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3],
        lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    ):
        mean, variance = make(np.zeros((3, 5))), make(np.ones((3, 5)))
        batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, axis=(1, 2))
        ref.assert_same_bits(mean, expected[0])
        ref.assert_same_bits(variance, expected[1])


@pytest.mark.parametrize("shape", [(8, 3, 5), (8, 3, 50)], ids=str)
def test_a_broadcast_gradient(shape):
    """The gradient of a sum is one number at every place."""
    _, cache = batch_norm_forward(cases.normal(shape), training=True, axis=1)
    one = np.broadcast_to(np.float32(1.5), shape)
    for a, b in zip(batch_norm_backward(one, cache), batch_norm_backward(one.copy(), cache), strict=True):
        ref.assert_same_bits(a, b)
