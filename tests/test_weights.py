"""Weights, masks and missing values: statistics, outputs and gradients of values that do not all count alike."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES, SMALL, THREADS
from hypothesis import given
from hypothesis import strategies as st
from test_bits import digest, row_padded, sliced
from test_gradients import numeric_gradient

import fastbn
from fastbn import batch_norm, batch_norm_backward, batch_norm_forward, moments

pytestmark = pytest.mark.kernels

EACH = ("sample", "position", "value")
BIG = (((2, 2, 130, 301), 1), ((100, 9, 7, 7), 1), ((16_001, 3), -1), ((1001, 70), -1))


def shape_of(each, shape, axis):
    """The shape that such weights are given in, and the one with as many axes as x has."""
    axis %= len(shape)
    positions = tuple(1 if a == axis else n for a, n in enumerate(shape))
    if each == "value":
        return shape, shape
    if each == "sample" and axis != 0 and len(shape) > 1:
        return shape[:1], (shape[0], *(1 for _ in shape[1:]))
    return tuple(n for a, n in enumerate(shape) if a != axis), positions


def make(each, shape, axis, kind="f4", seed=5):
    """Weights, a quarter of them 0: as they are given, and of x's rank."""
    given_shape, full = shape_of(each, shape, axis)
    rng = np.random.default_rng([seed, *shape])
    w = rng.random(given_shape) + 0.25
    keep = rng.random(given_shape) < 0.75
    if kind == "bool":
        w = keep
    elif kind == "u1":
        w = (keep * np.ceil(3 * w)).astype(np.uint8)
    else:
        w = np.where(keep, w, 0).astype(kind)
    return w, w.reshape(full)


def argument(w):
    return {"mask": w} if w.dtype == bool else {"sample_weight": w}


def spoil(x, full, seed=6):
    """NaN and inf at some values without weight."""
    rng = np.random.default_rng([seed, *x.shape])
    x = x.copy()
    where = (np.broadcast_to(full, x.shape) == 0) & (rng.random(x.shape) < 0.5)
    x[where] = rng.choice([np.nan, np.inf, -np.inf], int(where.sum()))
    return x


def run(x, dy, gamma, beta, axis, out=None, dx_out=None, **options):
    channels = x.shape[axis]
    mean, variance = cases.moving(channels, np.float64)
    y, cache = batch_norm_forward(
        x,
        gamma=gamma,
        beta=beta,
        moving_mean=mean,
        moving_variance=variance,
        training=True,
        axis=axis,
        out=out,
        **options,
    )
    dx, dgamma, dbeta = batch_norm_backward(dy, cache, out=dx_out)
    return {"y": y, "mean": mean, "variance": variance, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("case", BOTH[::4] + BOTH[13:14] + SMALL[:4], ids=cases.name)
def test_within_the_derived_tolerance(case, each, dtype):
    shape, axis = case
    for mean, kind, omit in zip((0, 30, 1e4, 0), ("f4", "bool", "f8", "u1"), (False, False, True, True), strict=True):
        w, full = make(each, shape, axis, kind)
        x = spoil(cases.normal(shape, dtype, mean=mean, deviation=2), full)
        if omit:
            x[np.random.default_rng(8).random(shape) < 0.1] = np.nan
        dy = cases.normal(shape, dtype, seed=1)
        gamma, beta = cases.parameters(shape[axis], dtype)
        options = argument(w) | {"nan_policy": "omit" if omit else "propagate"}
        s = ref.weighted(x, full, axis, omit)
        t_total, t_mean, t_m2 = ref.weighted_tolerances(x, full, axis, omit)
        m = moments(x, axis=axis, **options)
        ref.assert_within(np.broadcast_to(m.count, s.total.shape), s.total, t_total * s.total, "count")
        ref.assert_within(m.mean, s.mean, t_mean, "mean")
        ref.assert_within(m.m2, s.m2, t_m2 * s.m2 + s.total * t_mean**2, "m2")
        result = run(x, dy, gamma, beta, axis, **options)
        finite = np.isfinite(x)
        assert (np.isfinite(result["y"]) == finite).all()
        z = np.where(finite, x, 0).astype(dtype)
        parameters = (s.mean, np.where(s.total > 0, s.variance, np.inf), gamma, beta, 1e-3, axis)
        variance = np.where(s.total > 0, s.variance, 0)
        scale = np.abs(ref.column(gamma, 1)) * ref.inverse_deviation(s.variance, 1e-3)
        t_y = ref.rows(ref.apply_tolerance(z, s.mean, variance, gamma, beta, 1e-3, axis), axis) + scale * (
            t_mean + np.abs(ref.rows(z, axis) - s.mean) * t_m2
        )
        y = np.where(finite, result["y"], 0)
        expected = np.where(finite, ref.normalize(z, *parameters), 0)
        ref.assert_within(y, expected, ref.unrows(t_y, shape, axis), "y")
        expected = ref.backward_weighted(dy, x, full, gamma, axis=axis, omit=omit)
        tolerances = ref.weighted_gradient_tolerances(dy, x, full, gamma, axis=axis, omit=omit)
        for name, value, tolerance in zip(("dx", "dgamma", "dbeta"), expected, tolerances, strict=True):
            ref.assert_within(result[name], value, tolerance, f"{name}, {kind}, mean {mean}")


HARD = {
    "outlier first": (lambda z: np.where(np.arange(len(z))[:, None] == 0, 1e6, 1 + 0.01 * z), None),
    "outlier without weight": (lambda z: np.where(np.arange(len(z))[:, None] == 0, 1e30, 1000 + z), 0),
    "sorted": (lambda z: np.sort(1000 + z, axis=0), None),
    "drifting": (lambda z: z + 1000 * np.linspace(0, 1, len(z))[:, None], None),
    "far": (lambda z: 1e6 + z, None),
    "tiny": (lambda z: 1e-17 * (z + 100), None),
    "huge": (lambda z: 1e18 * (z + 100), None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("case", BOTH[1::4], ids=cases.name)
def test_hard_data(case, kind, dtype):
    shape, axis = case
    change, first = HARD[kind]
    z = ref.rows(cases.normal(shape, np.float64, seed=2), axis).astype(np.float64)
    x = ref.unrows(change(z), shape, axis).astype(dtype)
    _, full = make("value", shape, axis, "f8")
    w = ref.rows(full, axis).astype(np.float64)
    w[0] = 1 if first is None else first
    w = np.ascontiguousarray(ref.unrows(w, shape, axis))
    s = ref.weighted(x, w, axis)
    m = moments(x, axis=axis, sample_weight=w)
    variance = s.m2 / s.total
    assert (np.abs(m.variance() - variance) <= 2e-6 * variance).all()
    assert (np.abs(m.mean - s.mean) <= 1e-7 * np.maximum(np.abs(s.mean), np.sqrt(variance))).all()


def test_large_float64_data():
    x = 1e200 + 1e190 * cases.normal((50, 2), np.float64)
    m = moments(x, sample_weight=np.ones(50))
    np.testing.assert_allclose(m.mean, x.mean(0), rtol=1e-14)
    assert np.isfinite(moments(1e150 * (1e4 + cases.normal((50, 2), np.float64)), sample_weight=np.ones(50)).m2).all()


@given(st.data())
def test_an_integer_weight_is_so_many_values(data):
    shape, axis = data.draw(st.sampled_from((*SMALL[:3], ((70, 9, 3), 1), ((3, 2, 40, 5), 1))))
    seed = data.draw(st.integers(0, 99))
    dtype = data.draw(st.sampled_from(DTYPES))
    counts = np.random.default_rng(seed).integers(0, 4, shape[0])
    x = cases.normal(shape, dtype, mean=seed, seed=seed)
    weighted_moments = moments(
        x, axis=axis, sample_weight=counts.astype(data.draw(st.sampled_from(("u1", "i8", "f2", "f4"))))
    )
    repeated = moments(np.repeat(x, counts, axis=0), axis=axis)
    assert weighted_moments.count == repeated.count
    np.testing.assert_allclose(weighted_moments.mean, repeated.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weighted_moments.m2, repeated.m2, rtol=1e-9, atol=1e-9)
    for ddof in (0, 1):
        if counts.any():
            a, b = weighted_moments.variance(ddof), repeated.variance(ddof)
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@given(st.data())
def test_a_mask_leaves_samples_out(data):
    shape, axis = data.draw(st.sampled_from((*SMALL[:3], ((70, 9, 3), 1), ((3, 2, 40, 5), 1))))
    seed = data.draw(st.integers(0, 99))
    mask = np.random.default_rng(seed).random(shape[0]) < 0.6
    mask[seed % shape[0]] = True
    x, dy = (
        spoil(cases.normal(shape, seed=seed), mask.reshape(-1, *(1 for _ in shape[1:]))),
        cases.normal(shape, seed=1),
    )
    dy[~mask] = 0  # a loss that looks at what counts
    gamma, beta = cases.parameters(shape[axis])
    masked = run(x, dy, gamma, beta, axis, mask=mask)
    cut = run(x[mask], dy[mask], gamma, beta, axis)
    # Where a channel has two or three values, 1 / deviation magnifies the last bits of dx up to 1 / sqrt(epsilon).
    for name in cut:
        got = masked[name][mask] if name in ("y", "dx") else masked[name]
        np.testing.assert_allclose(got, cut[name], rtol=1e-4, atol=2e-4, err_msg=name)
    assert (masked["dx"][~mask] == 0).all()


# -- bits ------------------------------------------------------------------------------------------------------------


def results(x, dy, gamma, beta, axis, **options):
    m = moments(x, axis=axis, **options)
    return run(x, dy, gamma, beta, axis, **options) | {"count": np.asarray(m.count), "m.mean": m.mean, "m.m2": m.m2}


def digests(shape, axis, dtype, kind="f4"):
    """One for each kind of weights, of which the last comes with omitted NaN."""
    gamma, beta = cases.parameters(shape[axis], dtype)
    dy = cases.normal(shape, dtype, seed=1)
    for each in EACH:
        w, full = make(each, shape, axis, kind)
        x = spoil(cases.normal(shape, dtype, mean=3, seed=3), full)
        yield digest(results(x, dy, gamma, beta, axis, **argument(w)))
    x[~np.isfinite(x) | (np.random.default_rng(8).random(shape) < 0.1)] = np.nan
    yield digest(results(x, dy, gamma, beta, axis, nan_policy="omit", **argument(w)))
    yield digest(results(x, dy, gamma, beta, axis, nan_policy="omit"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BIG, ids=cases.name)
def test_any_number_of_threads(case, dtype):
    found = set()
    for n in THREADS:
        with fastbn.threads(n):
            found.add(tuple(digests(*case, dtype)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("case", (BOTH[0], BOTH[5], BOTH[9], BOTH[13], BOTH[17]), ids=cases.name)
def test_the_form_of_weights_does_not_show(case, each, dtype):
    """Type, strides and shape in which the same weights are given, and whether they are a mask."""
    shape, axis = case
    mask, full = make(each, shape, axis, "bool")
    x, dy = spoil(cases.normal(shape, dtype, seed=3), full), cases.normal(shape, dtype, seed=1)
    gamma, beta = cases.parameters(shape[axis], dtype)
    expected = digest(run(x, dy, gamma, beta, axis, mask=mask))
    dense = np.broadcast_to(full, shape)
    forms = [mask, dense, dense.copy(), np.asfortranarray(dense), sliced_weights(mask)]
    for form in forms:
        assert digest(run(x, dy, gamma, beta, axis, mask=form)) == expected
        for kind in ("f4", "f8", "u1") if form is not mask else ("f4", "f8", "u1", ">f4", "f2", "i2"):
            assert digest(run(x, dy, gamma, beta, axis, sample_weight=form.astype(kind))) == expected
    ones = np.ones_like(mask, np.float32)
    assert digest(run(x, dy, gamma, beta, axis, mask=mask, sample_weight=ones)) == expected


def sliced_weights(w):
    big = np.zeros([2 * n + 1 for n in w.shape], w.dtype)
    view = big[tuple(slice(1, None, 2) for _ in w.shape)]
    view[...] = w
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("case", BOTH[::5], ids=cases.name)
def test_strides_and_in_place(case, each, dtype):
    shape, axis = case
    w, full = make(each, shape, axis, "f4")
    x, dy = spoil(cases.normal(shape, dtype, seed=3), full), cases.normal(shape, dtype, seed=1)
    gamma, beta = cases.parameters(shape[axis], dtype)
    expected = run(x, dy, gamma, beta, axis, **argument(w))
    for change in (sliced, row_padded):
        found = run(change(x), change(dy), gamma, beta, axis, **argument(w))
        assert digest(found) == digest(expected)
    out = x.copy()
    assert batch_norm(out, gamma=gamma, beta=beta, training=True, axis=axis, out=out, **argument(w)) is out
    ref.assert_same_bits(out, expected["y"])
    found = run(x, dy.copy(), gamma, beta, axis, dx_out=np.empty_like(x), **argument(w))
    assert digest(found) == digest(expected)


@pytest.mark.parametrize("each", EACH)
def test_any_order_of_axes_in_memory(each):
    """The same values in every order of axes: each is walked as what it is in memory."""
    shape, axis = (4, 3, 5, 6), 1
    w, full = make(each, shape, axis)
    x, dy = spoil(cases.normal(shape, np.float64), full), cases.normal(shape, np.float64, seed=1)
    gamma, beta = cases.parameters(3, np.float64)
    expected = run(x, dy, gamma, beta, axis, **argument(w))
    for order in itertools.permutations(range(4)):
        back = np.argsort(order)
        moved, moved_dy = (np.ascontiguousarray(a.transpose(order)).transpose(back) for a in (x, dy))
        found = run(moved, moved_dy, gamma, beta, axis, **argument(w))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-11, err_msg=f"{name} {order}")


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_weights
for dtype in test_weights.DTYPES:
    for shape, axis in test_weights.BIG[1:2] + test_weights.BOTH[::6]:
        for kind in ("f4", "f8", "bool"):
            print(*test_weights.digests(shape, axis, dtype, kind))
"""


def test_every_instruction_set_level():
    outputs = set()
    for level in cases.LEVELS:
        environment = os.environ | {"FASTBN_ISA": level}
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        outputs.add(found.stdout)
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == 24


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("case", SMALL, ids=cases.name)
def test_central_differences(case, each):
    shape, axis = case
    w, _ = make(each, shape, axis, "f8", seed=1)
    x, dy = cases.normal(shape, np.float64, mean=0.5), cases.normal(shape, np.float64, seed=1)
    gamma, beta = cases.parameters(shape[axis], np.float64)
    options = {"training": True, "axis": axis, "epsilon": 0.1, "sample_weight": w, "gamma": gamma, "beta": beta}

    def loss() -> float:
        return float((batch_norm(x, **options) * dy).sum())

    dx, dgamma, dbeta = batch_norm_backward(dy, batch_norm_forward(x, **options)[1])
    np.testing.assert_allclose(dx, numeric_gradient(loss, x), atol=5e-8)
    np.testing.assert_allclose(dgamma, numeric_gradient(loss, gamma), atol=5e-8)
    np.testing.assert_allclose(dbeta, numeric_gradient(loss, beta), atol=5e-8)


@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 5, 4), 1), ((12, 5, 3), -1)])
def test_jax_differentiates_the_masked_formula_alike(shape, axis, each):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    mask, full = make(each, shape, axis, "bool", seed=2)
    x, dy = cases.normal(shape, mean=1), cases.normal(shape, seed=1)
    gamma, beta = cases.parameters(shape[axis])
    column = [1] * len(shape)
    column[axis] = -1
    others = tuple(a for a in range(len(shape)) if a != axis % len(shape))

    def loss(x, gamma, beta):
        keep = jnp.broadcast_to(full, shape)
        mean = jnp.mean(x, others, keepdims=True, where=keep)
        variance = jnp.mean((x - mean) ** 2, others, keepdims=True, where=keep)
        return ((x - mean) * jax.lax.rsqrt(variance + 1e-3) * gamma.reshape(column) + beta.reshape(column)) * dy

    expected = jax.grad(lambda *a: loss(*a).sum(), (0, 1, 2))(x, gamma, beta)
    _, cache = batch_norm_forward(x, gamma=gamma, beta=beta, training=True, axis=axis, mask=mask)
    for got, value in zip(batch_norm_backward(dy, cache), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("training", [True, False])
def test_missing_values_have_no_gradient_and_their_dy_counts_nowhere(training):
    x, dy = cases.normal((30, 4)), cases.normal((30, 4), seed=1)
    x[::3, 1] = np.nan
    x[0] = np.nan
    dy[np.isnan(x)] = np.inf
    mean, variance = cases.moving(4)
    _, cache = batch_norm_forward(
        x, moving_mean=mean, moving_variance=variance, training=training, update=False, nan_policy="omit"
    )
    dx, dgamma, dbeta = batch_norm_backward(dy, cache)
    assert (dx[np.isnan(x)] == 0).all()
    for c in range(4):
        keep = ~np.isnan(x[:, c])
        column = {"moving_mean": mean[c : c + 1], "moving_variance": variance[c : c + 1]}
        _, one = batch_norm_forward(x[keep, c : c + 1], training=training, update=False, **column)
        expected = batch_norm_backward(np.ascontiguousarray(dy[keep, c : c + 1]), one)
        np.testing.assert_allclose(dx[keep, c : c + 1], expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dgamma[c], expected[1][0], rtol=1e-5)
        np.testing.assert_allclose(dbeta[c], expected[2][0], rtol=1e-5)


@pytest.mark.parametrize("case", [((6, 3, 40), 1), ((20, 3), -1)], ids=cases.name)
def test_frozen_layers_look_at_weights_for_missing_values_only(case):
    shape, axis = case
    x, dy = cases.normal(shape), cases.normal(shape, seed=1)
    mean, variance = cases.moving(shape[axis])
    options = {"moving_mean": mean, "moving_variance": variance, "axis": axis}
    y, plain = batch_norm_forward(x, **options)
    expected = batch_norm_backward(dy, plain)
    w, full = make("value", shape, axis)
    y_weighted, cache = batch_norm_forward(x, sample_weight=w, **options)
    ref.assert_same_bits(y_weighted, y)
    for got, value in zip(batch_norm_backward(dy, cache), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)
    z = spoil(x, full)
    z.flat[np.flatnonzero(w)[0]] = np.inf  # counts: dx is that of a constant scale all the same
    dx, dgamma, _ = batch_norm_backward(dy, batch_norm_forward(z, sample_weight=w, **options)[1])
    missing = ~np.isfinite(z) & (w == 0)
    assert missing.any()
    np.testing.assert_array_equal(dx, np.where(missing, 0, expected[0]))
    assert np.isfinite(dgamma).sum() == shape[axis] - 1


# -- nothing to weigh ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis", "weights"), [((2, 3, 0), 0, (3, 0)), ((2, 0, 0, 3), 3, (2, 0, 0))])
@pytest.mark.parametrize("name", ["mask", "sample_weight"])
def test_the_gradient_of_an_empty_batch(name, shape, axis, weights, training):
    x = np.ones(shape, np.float32)
    moving = {} if training else {"moving_mean": np.zeros(shape[axis]), "moving_variance": np.ones(shape[axis])}
    given = np.ones(weights, bool if name == "mask" else np.float32)
    y, cache = batch_norm_forward(x, training=training, axis=axis, **moving, **{name: given})
    dx, dgamma, dbeta = batch_norm_backward(y, cache)
    assert dx.shape == shape
    assert dgamma.tolist() == dbeta.tolist() == [0.0] * shape[axis]


@pytest.mark.parametrize("save", ["input", "output"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_dgamma_is_0_where_nothing_counts(save, order):
    x, dy = cases.normal((4, 40), seed=3), cases.normal((4, 40), seed=4)
    gamma, beta = cases.parameters(40)
    mask = np.ones((4, 40), bool)
    mask[:, ::2] = False
    _, cache = batch_norm_forward(x, training=True, gamma=gamma, beta=beta, mask=mask, save=save)
    dx, dgamma, _ = batch_norm_backward(np.asarray(dy, order=order), cache)
    assert not dgamma[::2].any()
    assert not dx[:, ::2].any()
    assert dgamma[1::2].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((300, 5), -1), ((5000, 3), -1), ((3, 4, 50), 1), ((2, 2, 9000), 1)])
def test_a_constant_channel_has_no_variance(shape, axis, dtype, rng):
    """Whatever the weights: their sums are rounded, and what that leaves must not count as a deviation."""
    for each in ((shape[0],), shape):
        for w in (np.full(each, 0.3), rng.uniform(0, 2, each), rng.uniform(0, 2, each) ** 30):
            values = rng.normal(size=shape[axis]) * 10.0 ** rng.integers(-6, 7, shape[axis])
            x = np.empty(shape, dtype)
            np.moveaxis(x, axis, -1)[...] = values
            found = moments(x, axis=axis, sample_weight=w)
            np.testing.assert_array_equal(found.mean.astype(dtype), values.astype(dtype))
            assert not found.m2.any()
            _, cache = batch_norm_forward(x, training=True, axis=axis, sample_weight=w, epsilon=0.0)
            assert not batch_norm_backward(rng.normal(size=shape).astype(dtype), cache)[0].any()


@pytest.mark.parametrize(("shape", "axis"), [((16, 5), -1), ((3, 5, 100), 1)])
def test_neighbouring_numbers_have_a_variance(shape, axis, rng):
    """Of one part: means of several are rounded before they merge."""
    x = np.where(rng.random(shape) < 0.5, 1.0, np.nextafter(1.0, 2.0))
    w = rng.uniform(0.5, 2, shape[0])
    found = moments(x, axis=axis, sample_weight=w)
    spread = x - 1.0
    axes = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    full = np.broadcast_to(w.reshape(-1, *[1] * (len(shape) - 1)), shape)
    mean = (full * spread).sum(axes) / full.sum(axes)
    kept = np.expand_dims(mean, axes)
    wanted = (full * (spread - kept) ** 2).sum(axes)
    np.testing.assert_allclose(found.m2, wanted, rtol=1e-10)
