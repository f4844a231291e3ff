"""Gradients are those of the formula: central differences, closed forms, and what must cancel."""

from __future__ import annotations

import itertools
import tracemalloc

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES, SMALL

from fastbn import batch_norm, batch_norm_backward, batch_norm_forward

PRESENT = list(itertools.product((True, False), repeat=2))


def numeric_gradient(f, a, step=1e-5):
    """Central differences of a scalar function with respect to every element of a."""
    gradient = np.empty_like(a)
    for i in np.ndindex(a.shape):
        kept = a[i]
        a[i] = kept + step
        above = f()
        a[i] = kept - step
        gradient[i] = (above - f()) / (2 * step)
        a[i] = kept
    return gradient


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", SMALL, ids=cases.name)
def test_central_differences(case, training):
    shape, axis = case
    x, dy = cases.normal(shape, np.float64, mean=0.5), cases.normal(shape, np.float64, seed=1)
    gamma, beta = cases.parameters(shape[axis], np.float64)
    mean, variance = cases.moving(shape[axis], np.float64)
    options = {"training": training, "axis": axis, "epsilon": 0.1, "update": False}

    def loss() -> float:
        y = batch_norm(x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, **options)
        return float((y * dy).sum())

    _, cache = batch_norm_forward(x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, **options)
    dx, dgamma, dbeta = batch_norm_backward(dy, cache)
    # Truncation step^2 / 6 times a third derivative of order 100, and u64 * |loss| / step: 1e-8 together.
    np.testing.assert_allclose(dx, numeric_gradient(loss, x), atol=2e-8)
    np.testing.assert_allclose(dgamma, numeric_gradient(loss, gamma), atol=2e-8)
    np.testing.assert_allclose(dbeta, numeric_gradient(loss, beta), atol=2e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_gamma", "with_beta"), PRESENT)
@pytest.mark.parametrize("with_moving", [True, False])
@pytest.mark.parametrize("case", SMALL + BOTH[1:3] + BOTH[9:11], ids=cases.name)
def test_closed_form_in_training(case, with_moving, with_gamma, with_beta, dtype):
    shape, axis = case
    x, dy = cases.normal(shape, dtype, mean=3), cases.normal(shape, dtype, seed=1)
    gamma, beta = cases.parameters(shape[axis], dtype)
    gamma, beta = gamma if with_gamma else None, beta if with_beta else None
    moving = dict(zip(("moving_mean", "moving_variance"), cases.moving(shape[axis]), strict=True))
    y, cache = batch_norm_forward(
        x, gamma=gamma, beta=beta, training=True, axis=axis, **(moving if with_moving else {})
    )
    ref.assert_within(y, ref.train(x, gamma, beta, axis=axis), ref.train_tolerance(x, gamma, beta, axis=axis), "y")
    exact = ref.moments(x, axis)
    check_gradients(batch_norm_backward(dy, cache), dy, x, exact.mean, exact.variance(), gamma, axis, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_gamma", "with_beta"), PRESENT)
@pytest.mark.parametrize("case", SMALL + BOTH[1:3] + BOTH[9:11], ids=cases.name)
def test_closed_form_in_inference(case, with_gamma, with_beta, dtype):
    shape, axis = case
    x, dy = cases.normal(shape, dtype, mean=3), cases.normal(shape, dtype, seed=1)
    gamma, beta = cases.parameters(shape[axis], dtype)
    gamma, beta = gamma if with_gamma else None, beta if with_beta else None
    mean, variance = cases.moving(shape[axis], dtype)
    y, cache = batch_norm_forward(x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, axis=axis)
    arguments = (x, mean, variance, gamma, beta, 1e-3, axis)
    ref.assert_within(y, ref.normalize(*arguments), ref.apply_tolerance(*arguments), "y")
    check_gradients(batch_norm_backward(dy, cache), dy, x, mean, variance, gamma, axis, False)


def check_gradients(gradients, dy, x, mean, variance, gamma, axis, through_batch):
    if through_batch:
        expected = ref.backward_train(dy, x, gamma, axis=axis)
    else:
        expected = ref.backward_inference(dy, x, mean, variance, gamma, axis=axis)
    tolerances = ref.gradient_tolerances(dy, x, mean, variance, gamma, axis=axis, through_batch=through_batch)
    for name, value, exact, tolerance in zip(("dx", "dgamma", "dbeta"), gradients, expected, tolerances, strict=True):
        assert value.dtype == x.dtype
        assert value.shape == (x.shape if name == "dx" else (x.shape[axis],))
        ref.assert_within(value, exact, tolerance, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("case", BOTH, ids=cases.name)
def test_gradient_sums_cancel(case, mean, dtype):
    """sum(dx) = 0 and sum(dx * x_hat) = dgamma * epsilon / (variance + epsilon), 0 but for epsilon: neither a
    shift nor a scaling of x changes y."""
    shape, axis = case
    x, dy = cases.normal(shape, dtype, mean=mean), cases.normal(shape, dtype, mean=0.3, seed=1)
    _, cache = batch_norm_forward(x, training=True, axis=axis, epsilon=0.0)
    dx, _, _ = batch_norm_backward(dy, cache)
    exact = ref.moments(x, axis)
    tolerance, _, _ = ref.gradient_tolerances(dy, x, exact.mean, exact.variance(), epsilon=0.0, axis=axis)
    allowed = ref.rows(tolerance, axis).sum(0)
    d = ref.rows(dx, axis)
    x_hat = (ref.rows(x, axis) - exact.mean) * ref.inverse_deviation(exact.variance(), 0.0)
    ref.assert_within(d.sum(0), 0 * allowed, allowed, "sum(dx)")
    weighted = (ref.rows(tolerance, axis) * np.abs(x_hat)).sum(0)
    ref.assert_within((d * x_hat).sum(0), 0 * weighted, weighted, "sum(dx * x_hat)")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((1, 5), -1), ((1, 5, 1, 1), 1), ((1, 1), -1), ((5,), -1), ((5, 1), 0)])
def test_one_value_per_channel(shape, axis, dtype):
    """The value is its own mean: y is beta, nothing flows back to x, the variance is 0 for either ddof."""
    x, dy = cases.normal(shape, dtype, mean=7), cases.normal(shape, dtype, seed=1)
    channels = shape[axis]
    gamma, beta = cases.parameters(channels, dtype)
    for ddof in (0, 1):
        mean, variance = np.zeros(channels), np.ones(channels)
        y, cache = batch_norm_forward(
            x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, training=True,
            momentum=0.75, axis=axis, ddof=ddof,
        )  # fmt: skip
        assert (y.ravel() == beta).all()
        np.testing.assert_allclose(mean, 0.25 * x.ravel().astype(float), rtol=1e-15)
        assert (variance == 0.75).all()
        dx, dgamma, dbeta = batch_norm_backward(dy, cache)
        assert (dx == 0).all()
        assert (dgamma == 0).all()
        assert (dbeta == dy.ravel()).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [((40, 8, 50, 50), 1), ((4000, 200), -1)], ids=cases.name)
def test_the_cache_is_no_copy_of_x(case, training):
    shape, axis = case
    x, dy = cases.normal(shape), cases.normal(shape, seed=1)
    mean, variance = cases.moving(shape[axis])
    options = {"moving_mean": mean, "moving_variance": variance, "training": training, "axis": axis}
    batch_norm_forward(x, **options)
    tracemalloc.start()
    try:
        y, cache = batch_norm_forward(x, **options)
        kept, peak = tracemalloc.get_traced_memory()
        assert kept < y.nbytes + x.nbytes / 8
        assert peak < y.nbytes + x.nbytes / 2
        tracemalloc.reset_peak()
        dx, _, _ = batch_norm_backward(dy, cache)
        kept, peak = tracemalloc.get_traced_memory()
        assert kept < y.nbytes + dx.nbytes + x.nbytes / 8
        assert peak < y.nbytes + dx.nbytes + x.nbytes / 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("training", [True, False])
def test_a_cache_may_be_used_again(training):
    x = cases.normal((30, 6, 5))
    mean, variance = cases.moving(6)
    gamma, beta = cases.parameters(6)
    _, cache = batch_norm_forward(
        x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, training=training, axis=1
    )
    dy, other = cases.normal(x.shape, seed=1), cases.normal(x.shape, seed=2)
    first = batch_norm_backward(dy, cache)
    batch_norm_backward(other, cache)
    for a, b in zip(first, batch_norm_backward(dy, cache), strict=True):
        ref.assert_same_bits(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_the_cache_holds_the_statistics_of_its_own_call(training):
    """Later updates of gamma and of the moving arrays in place do not change a gradient that is still due."""
    x, dy = cases.normal((30, 6)), cases.normal((30, 6), seed=1)
    mean, variance = cases.moving(6)
    gamma, beta = cases.parameters(6)
    _, cache = batch_norm_forward(
        x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, training=training
    )
    expected = batch_norm_backward(dy, cache)
    for parameter in (gamma, beta, mean, variance):
        parameter[:] = 77
    for a, b in zip(batch_norm_backward(dy, cache), expected, strict=True):
        ref.assert_same_bits(a, b)


@pytest.mark.parametrize("dy_dtype", DTYPES)
def test_zero_gradient_in_gives_zero_out(dy_dtype):
    x = cases.normal((30, 6), dy_dtype)
    _, cache = batch_norm_forward(x, training=True)
    for gradient in batch_norm_backward(np.zeros_like(x), cache):
        assert (gradient == 0).all()


def test_gradients_are_linear_in_dy():
    x, a, b = (cases.normal((50, 4, 6), np.float64, seed=s) for s in range(3))
    _, cache = batch_norm_forward(x, training=True, axis=1)
    parts = zip(batch_norm_backward(a, cache), batch_norm_backward(b, cache), strict=True)
    for whole, (one, other) in zip(batch_norm_backward(2 * a - b, cache), parts, strict=True):
        np.testing.assert_allclose(whole, 2 * one - other, atol=1e-12)
