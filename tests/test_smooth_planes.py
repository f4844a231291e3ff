"""Short planes with a smooth activation are taken together, which shows in no bit."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref
from cases import DTYPES

from fastbn import batch_norm, batch_norm_backward, batch_norm_forward

pytestmark = pytest.mark.kernels

# Planes that are taken together, the last ones of a tile or not, and one that is not.
SHAPES = [(3, 20, 6, 6), (2, 90, 7, 7), (2, 37, 10, 10), (2, 30, 3, 155), (1, 9, 22, 23), (2, 5, 30, 30)]


def of_each_channel(function, *arrays):
    """What comes of every channel alone: none has a neighbour that it could be taken with."""
    channels = range(arrays[0].shape[1])
    results = [function(c, *(np.ascontiguousarray(a[:, c : c + 1]) for a in arrays)) for c in channels]
    return [np.concatenate(parts, axis=int(parts[0].ndim > 1)) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_channels_alone(shape, activation, with_residual, dtype):
    parameter = np.float64 if dtype == np.float64 else np.float32
    x, dy, residual = (cases.normal(shape, parameter, mean=1, seed=seed).astype(dtype) for seed in range(3))
    gamma, beta = cases.parameters(shape[1], parameter)

    def results(channels, x, dy, residual):
        options = {"gamma": gamma[channels], "beta": beta[channels], "axis": 1, "activation": activation}
        if with_residual:
            options["residual"] = residual
        statistics = {
            "moving_mean": np.ones(len(gamma[channels])),
            "moving_variance": np.full(len(gamma[channels]), 2.0),
        }
        y, cache = batch_norm_forward(x, training=True, **options)
        place = x.copy()
        return (y, *batch_norm_backward(dy, cache), batch_norm(place, out=place, **options, **statistics))

    together = results(slice(None), x, dy, residual)
    alone = of_each_channel(lambda c, *arrays: results(slice(c, c + 1), *arrays), x, dy, residual)
    for a, b in zip(together, alone, strict=True):
        ref.assert_same_bits(a, b)


def test_signs_of_zeros():
    x = np.full((2, 6, 7, 7), -0.0, np.float32)
    statistics = {"moving_mean": np.zeros(6), "moving_variance": np.ones(6)}
    for beta, negative in ((-0.0, True), (0.0, False)):
        y = batch_norm(x, beta=np.full(6, beta, np.float32), axis=1, activation="silu", **statistics)
        assert (y == 0).all()
        assert (np.signbit(y) == negative).all()


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
def test_a_large_gradient_is_kept_in_its_result(layout):
    """From the size on that is stored past the caches: the same bits as in place, where nothing is."""
    shape, axis = ((70, 50, 31, 31), 1) if layout == "planar" else ((70 * 31 * 31, 50), -1)
    x, dy = cases.normal(shape, mean=1, seed=1), cases.normal(shape, seed=2)
    assert x.nbytes > 3 << 22
    _, cache = batch_norm_forward(x, training=True, axis=axis, activation="silu")
    dx, dgamma, dbeta = batch_norm_backward(dy, cache)
    place = dy.copy()
    for a, b in zip(batch_norm_backward(place, cache, out=place), (dx, dgamma, dbeta), strict=True):
        ref.assert_same_bits(a, b)
