"""The moving mean and variance of a layer: by name, and in the order in which TensorFlow lists them.

The hand-written batch norm that many NumPy networks carry (mean and variance over axis 0, moving averages
``.9*old + .1*new``) beside the layer that replaces it.
"""

import warnings

import numpy as np

import fastbn

rng = np.random.default_rng(0)
batches = [rng.normal(3, 2, (32, 4)) for _ in range(100)]

norm = fastbn.BatchNorm(4, momentum=0.9, epsilon=1e-8, dtype=np.float64, name="hidden")

# The classic mistake: calling the layer without training=True while the network trains. It normalizes with
# 0 and 1.
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert np.allclose(norm(batches[0]), batches[0])
assert caught[0].category is fastbn.UntrainedWarning
print("UntrainedWarning:", caught[0].message)

moving_mean, moving_variance = np.zeros(4), np.ones(4)
for x in batches:
    y = norm(x, training=True)
    mean, variance = x.mean(axis=0), x.var(axis=0)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-8), rtol=1e-9, atol=1e-9)
    moving_mean = 0.9 * moving_mean + 0.1 * mean
    moving_variance = 0.9 * moving_variance + 0.1 * variance

np.testing.assert_allclose(norm.moving_mean, moving_mean, rtol=1e-12)
np.testing.assert_allclose(norm.moving_variance, moving_variance, rtol=1e-12)
print("moving mean    ", norm.moving_mean)
print("moving variance", norm.moving_variance)

# TensorFlow's order, so that positions carry over too.
for name, array in zip(("gamma", "beta", "moving_mean", "moving_variance"), norm.variables, strict=True):
    assert array is getattr(norm, name)

# By name, as copies, to save or to inspect.
assert {"gamma", "beta", "moving_mean", "moving_variance"} <= set(norm.state_dict())

x = batches[0]
np.testing.assert_allclose(norm(x), (x - moving_mean) / np.sqrt(moving_variance + 1e-8), rtol=1e-9, atol=1e-9)
