"""Laws of batch norm that hold for any data."""

from __future__ import annotations

import cases
import hypothesis.extra.numpy as hnp
import numpy as np
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

from fastbn import batch_norm, batch_norm_backward, batch_norm_forward, moments, normalize

dtypes = st.sampled_from(cases.DTYPES)
seeds = st.integers(0, 2**20)


@st.composite
def arrays(draw, min_side=1):
    """Normal data of any rank, with a channel axis and a mean and deviation that float32 can tell apart."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=5, min_side=min_side, max_side=9))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    mean, power = draw(st.sampled_from([0.0, 1.0, -100.0])), draw(st.integers(-5, 5))
    x = cases.normal(shape, draw(dtypes), mean=mean, seed=draw(seeds)) * 2.0**power
    return x.astype(x.dtype), axis


@given(arrays(), st.integers(-30, 30))
def test_scaling_by_a_power_of_two_changes_no_bit(case, power):
    x, axis = case
    y = batch_norm(x, training=True, epsilon=0.0, axis=axis)
    ref.assert_same_bits(batch_norm(np.ldexp(x, power), training=True, epsilon=0.0, axis=axis), y)


@given(arrays(), st.sampled_from([3.0, -0.7, 1e4]), st.sampled_from([0.0, 5.0, -1e3]))
def test_scale_and_shift_of_x_leave_y(case, scale, shift):
    """y of a * x + b is sign(a) * y; compared with the oracle on the values as they were rounded."""
    x, axis = case
    z = (x * scale + shift).astype(x.dtype)
    y = batch_norm(z, training=True, epsilon=1e-12, axis=axis)
    expected = ref.train(z, epsilon=1e-12, axis=axis)
    ref.assert_within(y, expected, ref.train_tolerance(z, epsilon=1e-12, axis=axis))
    opposite = batch_norm(-z, training=True, epsilon=1e-12, axis=axis)
    assert (opposite == -y).all()


@given(arrays(), st.data())
def test_gamma_and_beta_are_applied_last(case, data):
    x, axis = case
    channels = x.shape[axis]
    gamma, beta = cases.parameters(channels, x.dtype, seed=data.draw(seeds))
    y = batch_norm(x, gamma=gamma, beta=beta, training=True, axis=axis)
    tolerance = ref.train_tolerance(x, gamma, beta, axis=axis)
    plain = ref.rows(batch_norm(x, training=True, axis=axis), axis)
    expected = ref.unrows(plain * gamma + beta, x.shape, axis)
    plain_tolerance = ref.rows(ref.train_tolerance(x, axis=axis), axis) * np.abs(gamma)
    ref.assert_within(y, expected, tolerance + ref.unrows(plain_tolerance, x.shape, axis))


@given(arrays())
def test_output_has_mean_beta_and_deviation_gamma(case):
    x, axis = case
    y = ref.rows(batch_norm(x, training=True, epsilon=0.0, axis=axis), axis)
    allowed = ref.rows(ref.train_tolerance(x, epsilon=0.0, axis=axis), axis).max(0)
    ref.assert_within(y.mean(0), 0 * allowed, allowed)
    varies = ref.moments(x, axis).m2 > 0
    power = (y**2).mean(0)
    ref.assert_within(power[varies], np.ones(varies.sum()), (2.1 * allowed * np.abs(y).max(0) + 1e-15)[varies])


@given(st.data(), dtypes)
def test_a_constant_channel_gives_beta(data, dtype):
    width = 32 if dtype is np.float32 else 64
    c = data.draw(st.floats(allow_nan=False, allow_infinity=False, width=width))
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=12))
    x = np.full(shape, c, dtype)
    beta = data.draw(hnp.arrays(dtype, shape[1], elements=st.floats(-10, 10, width=width)))
    epsilon = data.draw(st.sampled_from([0.0, 1e-12, 1e-3, 1.0]))
    y = batch_norm(x, beta=beta, training=True, axis=1, epsilon=epsilon)
    assert (np.moveaxis(y, 1, -1) == beta).all()
    s = moments(x, axis=1)
    assert (s.mean == c).all()
    assert (s.m2 == 0).all()


@given(arrays())
def test_layouts_agree(case):
    x, axis = case
    y = batch_norm(x, training=True, axis=axis)
    last = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    tolerance = 2 * ref.train_tolerance(x, axis=axis)
    ref.assert_within(np.moveaxis(batch_norm(last, training=True), -1, axis), y, tolerance)
    first = np.ascontiguousarray(np.moveaxis(x, axis, 0))
    ref.assert_within(np.moveaxis(batch_norm(first, training=True, axis=0), 0, axis), y, tolerance)


@given(arrays(min_side=3), st.data())
def test_any_view_has_the_bits_of_its_copy(case, data):
    """Basic indices with steps and reversals: the view and a copy that keeps its axis order."""
    x, axis = case
    axis %= x.ndim
    index = tuple(
        slice(None, None, step)
        for step in data.draw(st.lists(st.sampled_from([1, 2, -1, -2]), min_size=x.ndim, max_size=x.ndim))
    )
    order = data.draw(st.permutations(range(x.ndim)))
    view = x.transpose(order)[tuple(index[o] for o in order)].transpose(np.argsort(order))
    y = batch_norm(view, training=True, axis=axis)
    ref.assert_same_bits(y, batch_norm(np.ascontiguousarray(view), training=True, axis=axis))
    dy = cases.normal(view.shape, x.dtype)
    _, cache = batch_norm_forward(view, training=True, axis=axis)
    _, other = batch_norm_forward(np.ascontiguousarray(view), training=True, axis=axis)
    for a, b in zip(batch_norm_backward(dy, cache), batch_norm_backward(dy, other), strict=True):
        ref.assert_same_bits(a, b)


@given(st.data(), dtypes)
def test_any_tuple_of_axes_in_any_memory(data, dtype):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=5, max_side=6))
    axes = tuple(data.draw(st.permutations(range(len(shape))))[: data.draw(st.integers(1, len(shape)))])
    order = data.draw(st.permutations(range(len(shape))))
    x = cases.normal([shape[o] for o in order], dtype, mean=3, seed=1).transpose(np.argsort(order))
    dy = cases.normal(shape, dtype, seed=2)
    channels = tuple(shape[a] for a in axes)
    gamma, beta = (p.reshape(channels) for p in cases.parameters(int(np.prod(channels)), dtype))
    y, cache = batch_norm_forward(x, gamma=gamma, beta=beta, training=True, axis=axes)
    expected = ref.train(x, gamma, beta, axis=axes)
    ref.assert_within(y, expected, ref.train_tolerance(x, gamma, beta, axis=axes))
    exact = ref.moments(x, axes)
    gradients = ref.backward_train(dy, x, gamma, axis=axes)
    allowed = ref.gradient_tolerances(dy, x, exact.mean, exact.variance(), gamma, axis=axes)
    for got, value, tolerance in zip(batch_norm_backward(dy, cache), gradients, allowed, strict=True):
        assert got.shape in (x.shape, channels)
        ref.assert_within(got.ravel(), value.ravel(), tolerance.ravel())


@given(arrays(), seeds)
def test_inference_is_affine(case, seed):
    """y(x) = a x + b per channel: it depends on no other value of the batch."""
    x, axis = case
    channels = x.shape[axis]
    mean, variance = cases.moving(channels, x.dtype, seed=seed)
    gamma, beta = cases.parameters(channels, x.dtype, seed=seed)
    y = normalize(x, mean, variance, gamma=gamma, beta=beta, axis=axis)
    arguments = (x, mean, variance, gamma, beta, 1e-3, axis)
    ref.assert_within(y, ref.normalize(*arguments), ref.apply_tolerance(*arguments))
    one = (seed % n for n in x.shape)
    part = tuple(slice(None) if a == axis % x.ndim else slice(i, i + 1) for a, i in enumerate(one))
    alone = normalize(x[part], mean, variance, gamma=gamma, beta=beta, axis=axis)
    ref.assert_same_bits(alone, y[part])


@given(arrays(), seeds)
def test_gradients_cancel(case, seed):
    x, axis = case
    dy = cases.normal(x.shape, x.dtype, mean=0.5, seed=seed)
    _, cache = batch_norm_forward(x, training=True, epsilon=0.1, axis=axis)
    dx, dgamma, dbeta = batch_norm_backward(dy, cache)
    exact = ref.moments(x, axis)
    allowed = ref.gradient_tolerances(dy, x, exact.mean, exact.variance(), epsilon=0.1, axis=axis)
    total = ref.rows(allowed[0], axis).sum(0)
    ref.assert_within(ref.rows(dx, axis).sum(0), 0 * total, total, "sum(dx)")
    expected = ref.backward_train(dy, x, epsilon=0.1, axis=axis)
    for got, value, tolerance in zip((dx, dgamma, dbeta), expected, allowed, strict=True):
        ref.assert_within(got, value, tolerance)


@given(arrays(), seeds)
def test_rows_may_be_permuted(case, seed):
    """The order of the batch changes rounding only."""
    x, axis = case
    if axis % x.ndim == 0:
        x, axis = x[None], axis if axis < 0 else axis + 1
    order = np.random.default_rng(seed).permutation(len(x))
    y, z = batch_norm(x, training=True, axis=axis), batch_norm(x[order], training=True, axis=axis)
    ref.assert_within(z, y[order], 2 * ref.train_tolerance(x, axis=axis)[order])
