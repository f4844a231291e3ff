"""Every channel count and every inner size from 1 to 70, with guard bytes around every array.

Vectors, lanes, tiles and blocks all leave remainders; a remainder loop that is wrong is wrong for a few sizes
only. The guard bytes read as NaN, so a read outside of an array spoils the result, and are compared after the
calls.
"""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref

from fastbn import batch_norm, batch_norm_backward, batch_norm_forward, moments, normalize

pytestmark = pytest.mark.kernels

TO_70 = range(1, 71)
DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES)


def check(shape, axis, dtype):
    """Training, inference and both gradients of one shape between guards, against the oracle."""
    channels = shape[axis]
    guard = cases.Guarded()
    x = guard.copy(cases.normal(shape, dtype, mean=3, deviation=2))
    dy = guard.copy(cases.normal(shape, dtype, seed=1))
    gamma, beta = (guard.copy(p) for p in cases.parameters(channels, dtype))
    mean, variance = (guard.copy(m) for m in cases.moving(channels, dtype))
    old_mean, old_variance = mean.copy(), variance.copy()
    y, dx = guard.empty(shape, dtype), guard.empty(shape, dtype)
    given = {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance, "axis": axis}

    exact = ref.moments(x, axis)
    var = exact.variance()
    mean_tolerance, var_tolerance = ref.mean_tolerance(x, axis), ref.variance_tolerance(x, axis) * var

    _, cache = batch_norm_forward(x, training=True, momentum=0.9, out=y, **given)
    expected = ref.train(x, gamma, beta, axis=axis)
    ref.assert_within(y, expected, ref.train_tolerance(x, gamma, beta, axis=axis), f"{shape} train y")
    for new, old, batch, allowed in (
        (mean, old_mean, exact.mean, mean_tolerance),
        (variance, old_variance, var, var_tolerance),
    ):
        tolerance = ref.moving_tolerance(old, batch, 0.9, dtype, allowed)
        ref.assert_within(new, ref.moving(old, batch, 0.9), tolerance, f"{shape} moving")
    gradients = batch_norm_backward(dy, cache, out=dx)
    assert gradients[0] is dx
    check_gradients(gradients, dy, x, exact.mean, var, gamma, axis, True)

    _, cache = batch_norm_forward(x, out=y, **given)
    arguments = (x, mean, variance, gamma, beta, 1e-3, axis)
    ref.assert_within(y, ref.normalize(*arguments), ref.apply_tolerance(*arguments), f"{shape} inference y")
    gradients = batch_norm_backward(dy, cache, out=dx)
    check_gradients(gradients, dy, x, mean, variance, gamma, axis, False)

    check_in_place(guard, x, dy, given, training=False)
    check_in_place(guard, x, dy, given | {"update": False}, training=True)
    normalized = normalize(x, mean, variance, gamma=gamma, beta=beta, axis=axis)
    ref.assert_same_bits(normalized, y, f"{shape} normalize")
    s = moments(x, axis=axis)
    ref.assert_within(s.mean, exact.mean, mean_tolerance, f"{shape} mean")
    ref.assert_within(s.m2, exact.m2, ref.variance_tolerance(x, axis) * exact.m2, f"{shape} m2")
    guard.check()


def check_in_place(guard, x, dy, given, training):
    """The last, overlapping or padded, piece of a run must not see what was already written."""
    y, cache = batch_norm_forward(x, training=training, **given)
    dx = batch_norm_backward(dy, cache)[0]
    in_x, in_dy = guard.copy(x), guard.copy(dy)
    ref.assert_same_bits(batch_norm_backward(in_dy, cache, out=in_dy)[0], dx, f"{x.shape} dx in dy")
    ref.assert_same_bits(batch_norm(in_x, training=training, out=in_x, **given), y, f"{x.shape} y in x")
    in_x[...] = x
    _, cache = batch_norm_forward(in_x, training=training, **given)
    ref.assert_same_bits(batch_norm_backward(dy, cache, out=in_x)[0], dx, f"{x.shape} dx in x")


def check_gradients(gradients, dy, x, mean, variance, gamma, axis, through_batch):
    if through_batch:
        exact = ref.backward_train(dy, x, gamma, axis=axis)
    else:
        exact = ref.backward_inference(dy, x, mean, variance, gamma, axis=axis)
    allowed = ref.gradient_tolerances(dy, x, mean, variance, gamma, axis=axis, through_batch=through_batch)
    for name, got, value, tolerance in zip(("dx", "dgamma", "dbeta"), gradients, exact, allowed, strict=True):
        ref.assert_within(got, value, tolerance, f"{x.shape} {through_batch=} {name}")


@pytest.mark.levels
@DTYPE
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_every_channel_count_interleaved(rows, dtype):
    for channels in TO_70:
        check((rows, channels), -1, dtype)


@DTYPE
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_every_row_count_interleaved(channels, dtype):
    for rows in TO_70:
        check((rows, channels), -1, dtype)


@pytest.mark.levels
@DTYPE
@pytest.mark.parametrize(("outer", "channels"), [(1, 3), (3, 2), (2, 9)])
def test_every_inner_size_planar(outer, channels, dtype):
    for inner in TO_70:
        check((outer, channels, inner), 1, dtype)


@pytest.mark.levels
@DTYPE
@pytest.mark.parametrize("outer", [17, 24, 33])
def test_runs_that_are_walked_as_rows_if_there_are_as_many(outer, dtype):
    for inner in range(15, 35):
        check((outer, 3, inner), 1, dtype)


@DTYPE
@pytest.mark.parametrize(("outer", "inner"), [(2, 1), (3, 4), (1, 49)])
def test_every_channel_count_planar(outer, inner, dtype):
    for channels in TO_70:
        check((outer, channels, inner), 1, dtype)


@pytest.mark.levels
@DTYPE
def test_around_powers_of_two(dtype):
    for n in (127, 128, 129, 255, 256, 257, 511, 513, 1023, 1024, 1025, 4095, 4097):
        check((n, 5), -1, dtype)
        check((3, n), -1, dtype)
        check((40 if n < 2048 else 9, n), -1, dtype)
        check((2, 3, n), 1, dtype)


@pytest.mark.slow
@DTYPE
@pytest.mark.parametrize("first", range(1, 71, 5))
def test_every_pair(first, dtype):
    for channels in range(first, first + 5):
        for inner in TO_70:
            check((3, channels, inner), 1, dtype)
            check((inner, channels), -1, dtype)
            check((2, inner, channels), -1, dtype)


@DTYPE
def test_strided_remainders(dtype):
    """Gaps inside and between runs hold NaN: they are not read, and those of out are not written."""
    for channels in (1, 2, 5, 17, 33):
        for inner in (1, 3, 7, 16, 31, 65):
            big = np.full((2 * 3, channels + 2, 2 * inner), np.nan, dtype)
            x = big[::2, 1:-1, ::2]
            x[...] = cases.normal(x.shape, dtype, mean=3)
            out_big = np.full_like(big, np.nan)
            out = out_big[::2, 1:-1, ::2]
            for axis in (1, 0, 2):
                expected = batch_norm(np.ascontiguousarray(x), training=True, axis=axis)
                batch_norm(x, training=True, axis=axis, out=out)
                ref.assert_same_bits(out, expected)
                gaps = np.ones(big.shape, bool)
                gaps[::2, 1:-1, ::2] = False
                assert np.isnan(out_big[gaps]).all()


@pytest.mark.levels
@DTYPE
@pytest.mark.parametrize("columns", [67, 100, 333, 530, 1001, 1030])
def test_wide_rows_that_leave_lanes(columns, dtype):
    """The last lanes overlap those before, or are staged: in place, and where columns have gaps between them."""
    for rows in (1, 7, 40, 300):
        x, dy, residual = (cases.normal((rows, columns), dtype, mean=3, seed=i) for i in range(3))
        wide = np.full((rows, 2 * columns), np.nan, dtype)
        gaps = wide[:, ::2]
        gaps[...] = x
        options = {"training": True, "activation": "relu"}
        y, cache = batch_norm_forward(x, residual=residual, **options)
        ref.assert_same_bits(batch_norm(gaps, residual=residual, **options), y)
        for source in (x, residual):
            target = source.copy()
            given = {"x": target, "residual": residual} if source is x else {"x": x, "residual": target}
            ref.assert_same_bits(batch_norm(given.pop("x"), out=target, **given, **options), y)
        apart = batch_norm_backward(dy, batch_norm_forward(gaps, residual=residual, **options)[1])
        for a, b in zip(batch_norm_backward(dy, cache), apart, strict=True):
            ref.assert_same_bits(np.ascontiguousarray(b), a)
        _, cache = batch_norm_forward(x, training=True)
        dx, dgamma, dbeta = batch_norm_backward(dy, cache)
        ref.assert_same_bits(batch_norm_backward(dy.copy(), cache, out=dy.copy())[0], dx)
        within = dy.copy()
        for a, b in zip(batch_norm_backward(within, cache, out=within), (dx, dgamma, dbeta), strict=True):
            ref.assert_same_bits(a, b)
        a, b = moments(x), moments(gaps)
        ref.assert_same_bits(a.mean, b.mean)
        ref.assert_same_bits(a.m2, b.m2)


@DTYPE
@pytest.mark.parametrize("size", [1 << 18, 1 << 20], ids=["lean", "middling"])
def test_columns_that_lie_apart_in_wide_rows_from_memory(size, dtype):
    """Whole rows are a task there where cores have little cache; these are staged, some columns at a time."""
    x, dy = cases.normal((1200, 2101), dtype, mean=3), cases.normal((1200, 2101), dtype, seed=1)
    gamma, beta = cases.parameters(2101, dtype)
    with cases.own_cache(size):
        expected = cases.training_results(x, dy, gamma=gamma, beta=beta, axis=-1)
        apart = []
        for a in (x, dy):
            wide = np.full((1200, 4202), np.nan, dtype)
            wide[:, ::2] = a
            apart.append(wide[:, ::2])
        given = {"gamma": gamma, "beta": beta, "axis": -1}
        got = cases.training_results(*apart, dx_out=np.empty((1200, 4202), dtype)[:, ::2], **given)
        dense = cases.training_results(*apart, **given)
    for name, value in expected.items():
        ref.assert_same_bits(got[name], value, name)
        ref.assert_same_bits(dense[name], value, name)
