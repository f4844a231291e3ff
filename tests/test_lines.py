"""Results at any place of a cache line: where they begin decides how rows are cut, and must not decide about a bit."""

import cases
import numpy as np
import pytest
import reference as ref

import fastbn

pytestmark = pytest.mark.kernels

LINE = 64
GUARD = 7

# Few rows, of which a thread takes some channels from sums to results, of whole lines and of others; rows that are one
# stretch of memory; several positions side by side.
TABLES = ((64, 2048), (40, 1000), (3, 4096), (1, 2048), (130, 1536), (256, 512), (50, 96), (300, 24))
FORMS = ("plain", "per sample", "per value", "missing", "residual")


def inputs(shape, dtype):
    gamma, beta = cases.parameters(shape[-1], np.float32 if dtype == np.float16 else dtype)
    return cases.normal(shape, dtype, mean=10, seed=3), cases.normal(shape, dtype, seed=4), gamma, beta


def at(place, like):
    """An empty array so many values behind the beginning of a line, with something before and behind it."""
    count = like.size + 2 * LINE
    raw = np.full(count, GUARD, like.dtype)
    begin = (-raw.ctypes.data % LINE) // like.itemsize + place
    return raw, raw[begin : begin + like.size].reshape(like.shape)


def options_of(form, x):
    rng = np.random.default_rng(4)
    each = rng.uniform(0.25, 2, x.shape).astype(np.float32)
    if form == "per sample":
        return x, {"sample_weight": each[:, 0].copy()}
    if form == "per value":
        return x, {"sample_weight": each}
    if form == "residual":
        return x, {"residual": x[::-1].copy(), "activation": "relu"}
    if form == "missing":
        holes = x.copy()
        holes[rng.random(x.shape) < 0.1] = np.nan
        return holes, {"nan_policy": "omit"}
    return x, {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", TABLES, ids=str)
def test_results_at_any_place_of_a_line(shape, form, dtype):
    x, dy, gamma, beta = inputs(shape, dtype)
    x, options = options_of(form, x)
    options |= {"gamma": gamma, "beta": beta, "training": True}
    y, cache = fastbn.batch_norm_forward(x, **options)
    gradients = fastbn.batch_norm_backward(dy, cache)
    for place in (0, 1, 4, 12, 15):
        for threads in (1, 2, 3):
            with fastbn.threads(threads):
                raw_y, out = at(place, y)
                raw_dx, dx = at(place, dy)
                _, other = fastbn.batch_norm_forward(x, out=out, **options)
                results = fastbn.batch_norm_backward(dy, other, out=dx)
            ref.assert_same_bits(out, y, f"y at {place}, {threads} threads")
            for result, expected in zip(results, gradients, strict=True):
                if expected is not None:
                    ref.assert_same_bits(result, expected, f"a gradient at {place}, {threads} threads")
            for raw, inner in ((raw_y, out), (raw_dx, dx)):
                inner[...] = GUARD
                assert (raw == GUARD).all()


@pytest.mark.parametrize("form", ["plain", "per sample", "per value"])
@pytest.mark.parametrize("shape", [(13_000, 256), (6_500, 512), (6_400, 520)], ids=str)
def test_results_beyond_the_caches_at_any_place_of_a_line(shape, form):
    """Those are stored past them, by whole lines."""
    x, dy, gamma, beta = inputs(shape, np.float32)
    x, options = options_of(form, x)
    _, cache = fastbn.batch_norm_forward(x, gamma=gamma, beta=beta, training=True, **options)
    expected = dy.copy()
    fastbn.batch_norm_backward(expected, cache, out=expected)
    for place in (0, 4, 15):
        raw, dx = at(place, dy)
        fastbn.batch_norm_backward(dy, cache, out=dx)
        ref.assert_same_bits(dx, expected, f"dx at {place}")
        dx[...] = GUARD
        assert (raw == GUARD).all()


@pytest.mark.parametrize("form", ["plain", "per sample"])
@pytest.mark.parametrize("place", [0, 4, 15])
def test_in_place_at_any_place_of_a_line(form, place):
    x, dy, gamma, beta = inputs((64, 2048), np.float32)
    x, options = options_of(form, x)
    options |= {"gamma": gamma, "beta": beta, "training": True}
    _, cache = fastbn.batch_norm_forward(x, **options)
    expected = fastbn.batch_norm_backward(dy, cache)
    _, dx = at(place, dy)
    dx[...] = dy
    for result, other in zip(fastbn.batch_norm_backward(dx, cache, out=dx), expected, strict=True):
        ref.assert_same_bits(result, other)
