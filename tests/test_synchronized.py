"""Batch norm in parts is batch norm of the whole: statistics merged, gradients through them, in any split."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

import fastbn
from fastbn import synchronized

SHAPES = [((12, 5), -1), ((9, 6, 5, 5), 1), ((7, 4, 4, 3), -1), ((6, 3, 40), 1)]


def parts_of(x, cuts):
    return np.split(x, cuts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", SHAPES)
@pytest.mark.parametrize("cuts", [[], [2], [0, 3], [1, 1, 5]])
def test_the_answer_of_the_whole(shape, axis, cuts, dtype, rng):
    x = rng.normal(3, 2, shape).astype(dtype)
    dy = rng.normal(size=shape).astype(dtype)
    gamma, beta = rng.normal(1, 0.3, shape[axis]), rng.normal(size=shape[axis])
    xs, dys = parts_of(x, cuts), parts_of(dy, cuts)

    def rank(gather, i):
        y, cache, pooled = synchronized.forward(xs[i], gather, gamma=gamma, beta=beta, axis=axis)
        return y, pooled, synchronized.backward(dys[i], cache, gather, pooled.count)

    results = run_ranks(rank, len(xs))
    moments = ref.moments(x, axis)
    for _, pooled, _ in results:
        assert pooled.count == moments.count
        assert pooled == results[0][1]  # the same bits
        ref.assert_within(pooled.mean, moments.mean, ref.mean_tolerance(x, axis))
    y = np.concatenate([r[0] for r in results])
    wanted = ref.train(x, gamma, beta, axis=axis)
    ref.assert_within(y, wanted, ref.train_tolerance(x, gamma, beta, axis=axis))
    dx, dgamma, dbeta = ref.backward_train(dy, x, gamma, axis=axis)
    tolerances = ref.gradient_tolerances(dy, x, moments.mean, moments.variance(), gamma, axis=axis)
    ref.assert_within(np.concatenate([r[2][0] for r in results]), dx, tolerances[0])
    # What every rank has is its share.
    ref.assert_within(sum(r[2][1].astype(np.float64) for r in results), dgamma, len(xs) * tolerances[1])
    ref.assert_within(sum(r[2][2].astype(np.float64) for r in results), dbeta, len(xs) * tolerances[2])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape, axis", SHAPES)
def test_one_rank_has_the_bits_of_the_plain_call(shape, axis, activation, dtype, rng):
    x, dy, residual = (rng.normal(1, 2, shape).astype(dtype) for _ in range(3))
    options = {"gamma": rng.normal(size=shape[axis]), "axis": axis, "activation": activation, "residual": residual}
    alone = np.atleast_2d
    y, cache, pooled = synchronized.forward(x, alone, **options)
    assert cache.mode == "batch"
    wanted, plain = fastbn.batch_norm_forward(x, training=True, **options)
    ref.assert_same_bits(y, wanted)
    for got, expected in zip(
        synchronized.backward(dy, cache, alone, pooled.count), fastbn.batch_norm_backward(dy, plain), strict=True
    ):
        ref.assert_same_bits(got, expected)


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5), st.integers(0, 2**32 - 1))
def test_any_split_merges_to_the_same_moments(rows, cuts, seed):
    x = np.random.default_rng(seed).normal(1e4, 1, (rows, 3))
    rows_sent = [synchronized.to_row(fastbn.moments(part)) for part in parts_of(x, sorted(min(c, rows) for c in cuts))]
    pooled, exact = synchronized.merged(np.array(rows_sent)), ref.moments(x)
    assert pooled.count == rows
    ref.assert_within(pooled.mean, exact.mean, ref.mean_tolerance(x))
    ref.assert_within(pooled.variance(), exact.variance(), ref.variance_tolerance(x))


def test_rows_are_added_one_after_the_other():
    rows = np.array([[1e16], [1.0], [-1e16], [1.0]])
    assert synchronized.added(rows) == ((1e16 + 1.0) - 1e16) + 1.0


def test_nothing_at_all(rng):
    """All ranks empty: zeros, and nothing divided by zero."""
    x = np.empty((0, 4), np.float32)
    y, cache, pooled = synchronized.forward(x, np.atleast_2d)
    assert pooled.count == 0
    assert y.shape == (0, 4)
    dx, dgamma, dbeta = synchronized.backward(y, cache, np.atleast_2d, 0)
    assert dx.shape == (0, 4)
    assert not dgamma.any()
    assert not dbeta.any()


def test_small_types_and_in_place(rng):
    x = rng.normal(size=(6, 4, 5, 5)).astype(np.float16)
    y, cache, pooled = synchronized.forward(x, np.atleast_2d, axis=1)
    dy = rng.normal(size=x.shape).astype(np.float16)
    wanted = synchronized.backward(dy, cache, np.atleast_2d, pooled.count)
    assert wanted[0].dtype == np.float16
    buffer = dy.copy()
    assert synchronized.backward(buffer, cache, np.atleast_2d, pooled.count, out=buffer)[0] is buffer
    ref.assert_same_bits(buffer, wanted[0])
    z = x.copy()
    y2, cache, _ = synchronized.forward(z, np.atleast_2d, axis=1, out=z)
    ref.assert_same_bits(y2, y)
    with pytest.raises(ValueError, match="out must not be x in a forward call whose gradient is taken"):
        synchronized.backward(dy, cache, np.atleast_2d, pooled.count)


def test_a_rank_that_fails_fails_all():
    """Nobody waits for a rank that has raised."""
    xs = [np.ones((3, 4)), np.ones((3, 5)), np.ones((3, 4))]

    def rank(gather, i):
        with pytest.raises(ValueError if i == 1 else RuntimeError) as error:
            synchronized.forward(xs[i], gather, channels=4)
        return str(error.value)

    messages = run_ranks(rank, 3)
    assert messages[1] == "x must have 4 channels, got 5"
    assert messages[0] == messages[2] == "rank 1 has raised an error in this call, so no rank goes on"

    def gradient(gather, i):
        _, cache, pooled = synchronized.forward(xs[0], gather)
        with pytest.raises(TypeError if i == 1 else RuntimeError):
            synchronized.backward(np.ones((3, 4), np.float32 if i == 1 else np.float64), cache, gather, pooled.count)

    run_ranks(gradient, 3)
    assert threading.active_count() < 10
