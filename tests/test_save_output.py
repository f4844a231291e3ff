"""save="output": the gradient from y alone, so that a training step holds one array less."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES

from fastbn import batch_norm_backward, batch_norm_forward


def both(x, dy, gamma, beta, axis, training, **kw):
    """Gradients from the input and from the output; with the tolerance that y's own rounding leaves."""
    channels = x.shape[axis]
    kw |= {"gamma": gamma, "beta": beta, "axis": axis, "training": training}
    kw |= {"moving_mean": np.full(channels, 0.25), "moving_variance": np.full(channels, 2.0), "update": False}
    expected = batch_norm_backward(dy, batch_norm_forward(x, **kw)[1])
    z = x.copy()
    y, cache = batch_norm_forward(z, out=z, save="output", **kw)
    assert y is z
    return expected, batch_norm_backward(dy, cache), cache


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), BOTH)
def test_gradients_agree_with_those_from_the_input(shape, axis, dtype, training):
    x, dy = cases.normal(shape, dtype, mean=5, seed=1), cases.normal(shape, dtype, seed=2)
    rng = np.random.default_rng(3)
    gamma = (rng.uniform(0.5, 2, shape[axis]) * rng.choice([-1, 1], shape[axis])).astype(dtype)
    beta = rng.standard_normal(shape[axis]).astype(dtype)
    expected, actual, cache = both(x, dy, gamma, beta, axis, training)
    assert cache.x is not None
    # x_hat = (y - beta) / gamma inherits y's rounding, 4 u of |y| + |beta|, over |gamma| >= 1/2, in every term.
    u = np.finfo(dtype).eps
    m = x.size // shape[axis]
    size = 64 * u * (1 + np.abs(ref.rows(x, axis)).max())
    largest = float(np.abs(dy).max())
    for a, e, scale in zip(actual, expected, (largest * 4, largest * m, largest * m), strict=True):
        assert np.abs(a.astype(np.float64) - e).max() <= size * scale


def test_none_parameters():
    x, dy = cases.normal((32, 5), np.float64, seed=1), cases.normal((32, 5), np.float64, seed=2)
    expected, actual, _ = both(x, dy, None, None, 1, True)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-13)


def test_out_may_be_the_gradient_or_y():
    x, dy = cases.normal((32, 5), np.float32, seed=1), cases.normal((32, 5), np.float32, seed=2)
    y, cache = batch_norm_forward(x, training=True, save="output")
    expected = batch_norm_backward(dy, cache)[0]
    assert batch_norm_backward(dy, cache, out=y)[0] is y
    np.testing.assert_array_equal(y, expected)


def test_a_step_holds_one_array_less():
    x = np.ones((8, 4), np.float32)
    _, cache = batch_norm_forward(x, training=True, save="output")
    assert not np.shares_memory(cache.x, x)


def test_zero_gamma_is_refused_before_anything_is_written():
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    copy = x.copy()
    with pytest.raises(ValueError, match='gamma must have no zeros with save="output", got one in channel 2'):
        batch_norm_forward(x, gamma=[1.0, 2.0, 0.0, 3.0], training=True, out=x, save="output")
    np.testing.assert_array_equal(x, copy)


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        ("x", ValueError, "save must be one of input, output, got 'x'"),
        (None, TypeError, "save must be a string, got None"),
    ],
)
def test_other_words_are_refused(save, error, message):
    with pytest.raises(error, match=message):
        batch_norm_forward(np.ones((2, 2)), training=True, save=save)
