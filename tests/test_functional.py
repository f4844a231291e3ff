"""normalize, update_moving and fold: the parts that a training loop of one's own is made of."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES

from fastbn import (
    BatchNorm,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    denormalize,
    fold,
    moments,
    normalize,
    update_moving,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats_dtype", DTYPES)
@pytest.mark.parametrize("case", BOTH[::2], ids=cases.name)
def test_normalize_is_inference(case, stats_dtype, dtype):
    shape, axis = case
    x = cases.normal(shape, dtype, mean=2)
    gamma, beta = cases.parameters(shape[axis])
    mean, variance = cases.moving(shape[axis], stats_dtype)
    y = normalize(x, mean, variance, gamma=gamma, beta=beta, axis=axis)
    assert y.dtype == dtype
    options = {"gamma": gamma, "beta": beta, "axis": axis}
    ref.assert_same_bits(y, batch_norm(x, moving_mean=mean, moving_variance=variance, **options))
    arguments = (x, mean, variance, gamma, beta, 1e-3, axis)
    ref.assert_within(y, ref.normalize(*arguments), ref.apply_tolerance(*arguments), "y")


@pytest.mark.parametrize("moving_dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("ddof", [0, 1])
def test_update_moving(moving_dtype, momentum, ddof):
    """Each of old, batch, momentum, ddof and dtype."""
    moving_mean, moving_variance = cases.moving(9, moving_dtype)
    old = moving_mean.copy(), moving_variance.copy()
    mean, variance = cases.moving(9, np.float64, seed=5)
    returned = update_moving(moving_mean, moving_variance, mean, variance, momentum=momentum, count=10, ddof=ddof)
    assert returned is None
    unbiased = variance * (10 / 9 if ddof else 1)
    for new, before, batch in ((moving_mean, old[0], mean), (moving_variance, old[1], unbiased)):
        # The factor 10/9 and the product with it are rounded in float64.
        allowed = ref.moving_tolerance(before, batch, momentum, moving_dtype, 3 * ref.U64 * np.abs(batch))
        ref.assert_within(new, ref.moving(before, batch, momentum), allowed)


def test_update_moving_of_one_value_has_no_infinity():
    moving_mean, moving_variance = np.zeros(2), np.ones(2)
    update_moving(moving_mean, moving_variance, np.ones(2), np.zeros(2), momentum=0.5, count=1, ddof=1)
    assert moving_mean.tolist() == [0.5, 0.5]
    assert moving_variance.tolist() == [0.5, 0.5]


def test_update_moving_of_no_value_changes_nothing():
    moving_mean, moving_variance = np.zeros(2), np.ones(2)
    for ddof in (0, 1):
        update_moving(moving_mean, moving_variance, np.ones(2), np.zeros(2), momentum=0.5, count=0, ddof=ddof)
    assert moving_mean.tolist() == [0, 0]
    assert moving_variance.tolist() == [1, 1]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("moving_dtype", DTYPES)
@pytest.mark.parametrize("case", BOTH[::3], ids=cases.name)
def test_training_is_moments_normalize_and_update_moving(case, moving_dtype, ddof):
    shape, axis = case
    x = cases.normal(shape, mean=2)
    fused, by_hand = cases.moving(shape[axis], moving_dtype), cases.moving(shape[axis], moving_dtype)
    y = batch_norm(x, moving_mean=fused[0], moving_variance=fused[1], training=True, axis=axis, ddof=ddof)
    s = moments(x, axis=axis)
    update_moving(*by_hand, s.mean, s.variance(), momentum=0.99, count=s.count, ddof=ddof)
    ref.assert_same_bits(normalize(x, s.mean, s.variance(), axis=axis), y)
    for a, b in zip(fused, by_hand, strict=True):
        ref.assert_same_bits(a, b)


@pytest.mark.parametrize("update", [False, None])
def test_batch_mode_writes_no_statistics(update):
    x = cases.normal((50, 6), mean=2)
    mean, variance = cases.moving(6)
    kept = mean.copy(), variance.copy()
    y = batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, update=update)
    ref.assert_same_bits(y, batch_norm(x, training=True))
    ref.assert_same_bits(mean, kept[0])
    ref.assert_same_bits(variance, kept[1])


def test_repeated_updates_converge_to_the_batch():
    x = cases.normal((50, 6), mean=2)
    mean, variance = np.zeros(6), np.ones(6)
    for _ in range(400):
        batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.9)
    exact = ref.moments(x)
    np.testing.assert_allclose(mean, exact.mean.astype(float), rtol=1e-7)
    np.testing.assert_allclose(variance, exact.variance().astype(float), rtol=1e-6)


# -- fold --------------------------------------------------------------------------------------------------


def trained(channels, dtype=np.float32, **options):
    bn = BatchNorm(channels, dtype=dtype, momentum=0.5, **options)
    for variable, value in ((bn.gamma, 0), (bn.beta, 1)):
        if variable is not None:
            variable[:] = cases.parameters(channels, dtype)[value]
    bn(cases.normal((60, channels), dtype, mean=3, deviation=2), True)
    return bn


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_into_a_dense_layer(dtype, with_bias, options):
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(7, 5)).astype(dtype), rng.normal(size=5).astype(dtype)
    bias = bias if with_bias else None
    bn = trained(5, dtype, **options)
    kept = weight.copy()
    w, b = fold(weight, bias, bn, axis=1)
    assert w.dtype == b.dtype == dtype
    assert w.shape == (7, 5)
    assert b.shape == (5,)
    ref.assert_same_bits(weight, kept)
    x = rng.normal(size=(20, 7)).astype(dtype)
    expected = bn(x @ weight + (0 if bias is None else bias))
    # Seven products and sums, on either side, of magnitudes up to |x| @ |w|, which are scaled the same.
    size = np.abs(x) @ np.abs(w) + np.abs(b) + np.abs(expected) + 10
    assert (np.abs(x @ w + b - expected) <= 20 * ref.unit(dtype) * size).all()


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4])
def test_fold_into_a_convolution(axis):
    """Any axis may be the one of the output channels; scaling it is what folding means."""
    weight = cases.normal((3, 4, 5, 6))
    bn = trained(weight.shape[axis])
    w, b = fold(weight, None, bn, axis=axis)
    inv = ref.inverse_deviation(bn.moving_variance, bn.epsilon) * bn.gamma
    expected = np.moveaxis(np.moveaxis(weight, axis, -1).astype(ref.LD) * inv, -1, axis)
    ref.assert_within(w, expected, 4 * ref.U32 * np.abs(expected))
    shift = bn.beta - bn.moving_mean.astype(ref.LD) * inv
    ref.assert_within(b, shift, 4 * ref.U32 * (np.abs(bn.beta) + np.abs(bn.moving_mean * inv)))


def test_fold_of_a_read_only_weight():
    weight, bias = cases.normal((7, 5)), cases.normal((5,))
    weight.flags.writeable = bias.flags.writeable = False
    w, b = fold(weight, bias, trained(5), axis=-1)
    assert w.flags.writeable
    assert b.flags.writeable


def test_what_is_returned_is_out_itself():
    class Labelled(np.ndarray):
        """An array of a class of its own."""

    x, zeros, ones = cases.normal((6, 4)), np.zeros(4), np.ones(4)
    y, out, dx = (np.empty_like(x).view(Labelled) for _ in range(3))
    assert batch_norm(x, training=True, out=out) is out
    assert normalize(x, zeros, ones, out=out) is out
    assert denormalize(x, zeros, ones, out=out) is out
    result, cache = batch_norm_forward(x, training=True, out=y)
    assert result is y
    assert batch_norm_backward(x, cache, out=dx)[0] is dx
