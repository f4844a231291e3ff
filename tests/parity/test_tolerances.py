"""The bounds hold for implementations that are known to be right, and are tight enough to tell wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from parity import frameworks
from parity.configurations import Configuration, configurations
from parity.tolerances import Moving, Step, assert_within

import fastbn


def float32_batch_norm(x, over, gamma, beta, epsilon, *, one_pass=False, folded=False):
    """By the textbook, everything in float32, sums one after the other."""
    m = np.float32(np.prod([x.shape[a] for a in over]))

    def total(a):
        return np.add.accumulate(np.moveaxis(a, over, range(len(over))).reshape(int(m), -1), 0, np.float32)[-1]

    def spread(a):
        return a.reshape([1 if i in over else n for i, n in enumerate(x.shape)])

    mean = spread(total(x) / m)
    variance = spread(total(x * x) / m) - mean * mean if one_pass else spread(total((x - mean) ** 2) / m)
    r = np.float32(1) / np.sqrt(np.maximum(variance, 0) + np.float32(epsilon))
    if folded:
        a = gamma * r
        return x * a + (beta - mean * a), mean, variance
    return (x - mean) * r * gamma + beta, mean, variance


@pytest.mark.parametrize("one_pass", (False, True))
@pytest.mark.parametrize("folded", (False, True))
@frameworks.configurations
@given(configuration=configurations())
def test_float32_by_the_textbook_is_within_the_bounds(configuration, one_pass, folded):
    c = configuration
    if one_pass and c.epsilon < 1e-3:
        return  # where the variance of a constant channel is noise
    x = c.batch()
    gamma, beta, moving_mean, moving_variance = c.parameters()
    step = Step(x, c.axis, c.epsilon, gamma, beta, one_pass=one_pass, folded=folded)
    wide = [np.asarray(step.spread(a, 0), np.float32) for a in (gamma, beta)]
    y, mean, variance = float32_batch_norm(x, step.over, *wide, c.epsilon, one_pass=one_pass, folded=folded)
    assert_within(y, step.y, step.e_y, "y")
    assert_within(mean, step.mean, 1.1 * step.e_mean + 1e-37, "mean")
    assert_within(variance, step.variance, 1.1 * step.e_variance + 1e-37, "variance")
    moving = Moving(moving_mean, moving_variance)
    moving.update(step, c.momentum)
    ours = fastbn.batch_norm(
        x, gamma=gamma, beta=beta, moving_mean=moving_mean, moving_variance=moving_variance, training=True,
        momentum=c.momentum, epsilon=c.epsilon, axis=c.axis,
    )  # fmt: skip
    assert_within(ours, step.y, step.e_y, "fastbn")
    for got, value, bound in zip((moving_mean, moving_variance), moving.values, moving.bounds):
        assert_within(got, value, bound, "moving")


def test_bounds_tell_what_is_wrong():
    c = Configuration((64, 8), -1, 0.9, 1e-3, True, True, 1, 5)
    x, dy = c.batch() + c.gradient(), c.gradient()  # no channel is constant
    step = Step(x, -1, c.epsilon, folded=True, one_pass=True)
    assert step.e_y.max() < 1e-3
    dx, dgamma, dbeta = step.gradients(dy)
    assert dx.max() < 1e-2
    assert max(dgamma.max(), dbeta.max()) < 1e-2
    for wrong in ({"epsilon": 1.1e-3}, {"epsilon": 1e-3, "ddof": 1}):
        variance = x.var(0, ddof=wrong.pop("ddof", 0))
        y = (x - x.mean(0)) / np.sqrt(variance + wrong["epsilon"])
        strict = Step(x, -1, c.epsilon)
        with pytest.raises(AssertionError, match="times the bound"):
            assert_within(y, strict.y, strict.e_y, "y")
