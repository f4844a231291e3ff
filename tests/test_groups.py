"""Few rows of very many channels: groups of channels are worked on one after another, from their sums to their results.

What a channel gets depends on its own values alone, so some channels of a batch give the same bits by themselves.
"""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref

from fastbn import batch_norm_backward, batch_norm_forward, threads

pytestmark = pytest.mark.kernels

# Rows, channels, inner sizes; above 65536 values they are shared by threads. 100 channels are no groups, or other ones.
SHAPES = [(3, 4100, 1), (1, 70001, 1), (40, 5003, 1), (100, 1300, 1), (16, 256, 16), (7, 1301, 9), (2, 9001, 4)]
SHAPE = pytest.mark.parametrize("shape", SHAPES)
PART = 100


def arguments(shape, dtype, kind):
    """Everything a call can read, per channel along axis 1."""
    outer, channels, _ = shape
    rng = np.random.default_rng(0)
    given = {
        "gamma": rng.standard_normal(channels).astype(np.float32),
        "beta": rng.standard_normal(channels),
        "moving_mean": np.zeros(channels, np.float32),
        "moving_variance": np.ones(channels),
    }
    if kind == "gated":
        given |= {"activation": "relu", "residual": cases.normal(shape, np.float32, seed=5).astype(dtype)}
    elif kind == "smooth":
        given |= {"activation": "silu"}
    elif kind == "mask":
        given |= {"mask": rng.random(shape) < 0.7}
    elif kind == "samples":
        given |= {"sample_weight": rng.random(outer)}
    elif kind == "values":
        given |= {"sample_weight": rng.random(shape)}
    elif kind == "missing":
        given |= {"nan_policy": "omit"}
    return given


def results(x, dy, given, training, in_place=False):
    """All that a forward call and its gradient leave."""
    given = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in given.items()}
    y, cache = batch_norm_forward(x, training=training, momentum=0.9, axis=1, **given)
    out = dy.copy() if in_place else None
    gradients = batch_norm_backward(dy if out is None else out, cache, out=out)
    return [y, given["moving_mean"], given["moving_variance"], *gradients]


def part(value, channels, first):
    """The same of PART channels."""
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim == 3:
        return np.ascontiguousarray(value[:, first : first + PART])
    return value[first : first + PART] if value.shape == (channels,) else value


def data(shape, dtype, kind):
    """A batch and its gradient; some channels far from 0 beside their deviation."""
    x = cases.normal(shape, np.float32, deviation=2)
    x[:, ::7] += 1000
    if kind == "missing":
        x[np.random.default_rng(1).random(shape) < 0.1] = np.nan
    return x.astype(dtype), cases.normal(shape, np.float32, seed=1).astype(dtype)


@pytest.mark.levels
@SHAPE
@pytest.mark.parametrize("kind", ["plain", "gated", "smooth", "mask", "samples", "values", "missing"])
def test_some_channels_give_the_same_bits_by_themselves(shape, kind):
    check(shape, np.float32, kind, training=True)


@SHAPE
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_types(shape, dtype):
    check(shape, dtype, "plain", training=True)


@SHAPE
def test_inference(shape):
    check(shape, np.float32, "plain", training=False)


def check(shape, dtype, kind, training):
    """Parts at both ends and in between against the whole, by one thread and by three."""
    channels = shape[1]
    x, dy = data(shape, dtype, kind)
    given = arguments(shape, dtype, kind)
    with threads(1):
        whole = results(x, dy, given, training)
    with threads(3):
        for a, b in zip(results(x, dy, given, training, in_place=True), whole, strict=True):
            ref.assert_same_bits(a, b, f"{shape} {kind} threads")
    for first in (0, 50, channels // 2 - 3, channels - PART):
        alone = results(
            part(x, channels, first),
            part(dy, channels, first),
            {k: part(v, channels, first) for k, v in given.items()},
            training,
        )
        for a, b in zip(alone, whole, strict=True):
            ref.assert_same_bits(a, part(b, channels, first), f"{shape} {kind} {first}")
