"""act(batch_norm(x) + residual) in one pass: values, bits, gradients."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES, SMALL
from test_bits import BIG, MEMORY
from test_gradients import numeric_gradient

import fastbn
from fastbn import batch_norm, batch_norm_backward, batch_norm_forward, normalize

pytestmark = pytest.mark.kernels

ACTIVATIONS = (None, "relu", "relu6", "silu", "gelu_tanh", "leaky_relu", ("leaky_relu", 0.3), ("leaky_relu", -0.5))
KINDS = (None, "relu6", "gelu_tanh", ("leaky_relu", -0.5))  # one of each that has loops of its own
ODD = [((2, 3, n), 1) for n in range(1, 41)] + [((3, n), -1) for n in range(1, 41)]
EDGES = [0.0, -0.0, 1e-30, -1e-30, 1, -1, 5.5, 6, 7, -8, 12, -30, 88, -88, -95, -103, -110, 300, -300, -720, -745, -800]


def arrays(shape, dtype, axis):
    """Data, a residual, a gradient and parameters that reach all pieces of all activations."""
    gamma, beta = cases.parameters(shape[axis], dtype)
    x, residual = cases.normal(shape, dtype, mean=2, seed=1), cases.normal(shape, dtype, deviation=3, seed=2)
    return x, residual, cases.normal(shape, dtype, seed=3), gamma, beta


@functools.cache
def plain(shape, dtype, axis, training):
    """What a batch norm of these arrays is exactly, and by how much it may be off: the same for all activations."""
    x, _, _, gamma, beta = arrays(shape, dtype, axis)
    if training:
        return ref.train(x, gamma, beta, axis=axis), ref.train_tolerance(x, gamma, beta, axis=axis)
    moving = cases.moving(shape[axis], dtype)
    return (
        ref.normalize(x, *moving, gamma, beta, axis=axis),
        ref.apply_tolerance(x, *moving, gamma, beta, axis=axis),
    )


def oracle(shape, dtype, axis, training, residual=None):
    """The exact value before the activation, and by how much it may be off."""
    z, off = plain(shape, dtype, axis, training)
    if residual is not None:
        z = z + residual
        off = off + ref.unit(dtype) * np.abs(z)
    return z, off


def identity(values, dtype, activation, **options):
    """The activation of values themselves, through a batch norm that does nothing to them."""
    x = np.array(values, dtype).reshape(1, -1)
    n = x.shape[1]
    return normalize(x, np.zeros(n), np.ones(n), epsilon=0.0, activation=activation, **options)[0]


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_values(activation, dtype):
    for (shape, axis), with_residual in itertools.product(BOTH + SMALL + tuple(ODD), (True, False)):
        x, residual, _, gamma, beta = arrays(shape, dtype, axis)
        residual = residual if with_residual else None
        options = {"gamma": gamma, "beta": beta, "axis": axis, "activation": activation, "residual": residual}
        moving = cases.moving(shape[axis], dtype)
        for m in (None, moving):
            statistics = {} if m is None else dict(zip(("moving_mean", "moving_variance"), m))
            y = batch_norm(x, training=m is None, **statistics, **options)
            z, off = oracle(shape, dtype, axis, m is None, residual)
            allowed = ref.activation_tolerance(z, off, activation, dtype)
            ref.assert_within(y, ref.activate(z, activation), allowed, f"{shape} {axis}")
            again, _ = batch_norm_forward(x, training=m is None, **statistics, **options)
            ref.assert_same_bits(again, y)
        ref.assert_same_bits(normalize(x, *moving, **options), y)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_values_everywhere(activation, dtype):
    """From far below to far above, what is below the normal numbers, and everything that is not finite."""
    with np.errstate(under="ignore"):
        z = np.concatenate([EDGES, np.linspace(-120, 120, 4001), np.geomspace(1e-30, 1e30), -np.geomspace(1e-30, 1e30)])
    z = z.astype(dtype)
    y = identity(z, dtype, activation)
    ref.assert_within(y, ref.activate(z, activation), ref.activation_tolerance(z, 0, activation, dtype))
    special = identity([np.nan, np.inf, -np.inf, np.finfo(dtype).max, -np.finfo(dtype).max], dtype, activation)
    assert np.isnan(special[0])
    high = 6 if activation == "relu6" else np.inf
    assert special[1] == high
    assert special[3] == min(high, np.finfo(dtype).max)
    if activation is None or "leaky_relu" in str(activation):
        slope = 1 if activation is None else ref.slope_of(activation)
        assert special[2] == -np.inf * slope
    else:
        assert special[2] == special[4] == 0
    assert (identity([0.0, -0.0], dtype, activation) == 0).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_nan_stays_as_it_is(activation):
    """Its sign too, wherever it lies in a run: else that would be a matter of threads and strides."""
    for sign in (1, -1):
        x = np.full((336, 131), sign * np.nan, np.float32)
        for axis in (0, 1):
            n = x.shape[axis]
            for threads in (1, 2, 3):
                with fastbn.threads(threads):
                    y = normalize(x, np.zeros(n), np.ones(n), activation=activation, axis=axis, epsilon=0)
                ref.assert_same_bits(y, x)


@pytest.mark.levels
def test_exp_is_close():
    """silu(z) / z is the sigmoid: its relative error, far out too, is a few roundings, exp's two among them."""
    for dtype, low in ((np.float32, -80), (np.float64, -700)):
        z = np.linspace(low, 80, 20001).astype(dtype)
        z = z[z != 0]
        exact = ref.activate(z, "silu")
        error = np.abs(identity(z, dtype, "silu") - exact) / np.abs(exact)
        assert error.max() < 5 * 2 * ref.unit(dtype)


def test_relu_is_a_maximum():
    """To the bit: nothing but NaN and the sign of zero distinguishes the pass from NumPy after it."""
    for shape, axis in BOTH:
        x, residual, _, gamma, beta = arrays(shape, np.float32, axis)
        options = {"gamma": gamma, "beta": beta, "training": True, "axis": axis}
        plain = batch_norm(x, **options)
        ref.assert_same_bits(batch_norm(x, **options, activation="relu"), np.maximum(plain, np.float32(0)))
        ref.assert_same_bits(batch_norm(x, **options, residual=residual), plain + residual)
        both = batch_norm(x, **options, residual=residual, activation="relu6")
        ref.assert_same_bits(both, np.clip(plain + residual, np.float32(0), np.float32(6)))


def test_slope_zero_is_relu():
    values = [np.nan, -np.inf, -3, -0.0, 0, 2, np.inf]
    ref.assert_same_bits(identity(values, np.float32, ("leaky_relu", 0)), identity(values, np.float32, "relu"))


def test_an_empty_batch():
    x = np.empty((0, 3), np.float32)
    y, cache = batch_norm_forward(x, training=True, activation="silu", residual=x)
    assert y.shape == (0, 3)
    assert [g.shape for g in batch_norm_backward(x, cache)] == [(0, 3), (3,), (3,), (0, 3)]


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "silu"], ids=str)
@pytest.mark.parametrize("memory", MEMORY, ids=lambda f: f.__name__)
def test_any_memory(memory, activation):
    for shape, axis in BOTH[::2] + tuple(ODD[::7]):
        x, residual, dy, gamma, beta = arrays(shape, np.float32, axis)
        options = {"gamma": gamma, "beta": beta, "training": True, "axis": axis, "activation": activation}
        y, cache = batch_norm_forward(x, residual=residual, **options)
        expected = batch_norm_backward(dy, cache)
        for a, r in ((x, memory(residual)), (memory(x), memory(residual)), (memory(x), residual)):
            again, cache = batch_norm_forward(a, residual=r, **options)
            ref.assert_same_bits(again, y)
            for g, e in zip(batch_norm_backward(memory(dy), cache), expected, strict=True):
                ref.assert_same_bits(g, e)


def test_a_residual_in_another_order():
    x, residual, dy, _, _ = arrays((6, 5, 20, 3), np.float32, 1)
    other = np.asfortranarray(residual)
    for activation in ("relu", "gelu_tanh"):
        y, cache = batch_norm_forward(x, training=True, axis=1, activation=activation, residual=residual)
        z, other_cache = batch_norm_forward(x, training=True, axis=1, activation=activation, residual=other)
        ref.assert_same_bits(z, y)
        assert z.strides == x.strides
        for g, e in zip(batch_norm_backward(dy, cache), batch_norm_backward(dy, other_cache), strict=True):
            ref.assert_same_bits(g, e)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_in_place(activation, training):
    """In place, into the residual, with x as its own residual; also where results would pass by the caches."""
    large = ((8, 9, 300, 301), 1), ((90_000, 70), -1)
    for shape, axis in (*BOTH, *ODD[::5], *(large if activation in KINDS else ())):
        x, residual = cases.many(shape, seed=1) + 2, cases.many(shape, seed=2) * 3
        gamma, beta = cases.parameters(shape[axis])
        mean, variance = cases.moving(shape[axis])
        options = {
            "gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance, "training": training,
            "update": False, "axis": axis, "activation": activation,
        }  # fmt: skip
        y = batch_norm(x, residual=residual, **options)
        for name in ("x", "residual"):
            given = {"x": x.copy(), "residual": residual.copy()}
            assert batch_norm(**given, out=given[name], **options) is given[name]
            ref.assert_same_bits(given[name], y)
        y = batch_norm(x, residual=x.copy(), **options)
        z = x.copy()
        ref.assert_same_bits(batch_norm(z, residual=z, out=z, **options), y)


def test_nothing_is_written_beside():
    for (shape, axis), activation in itertools.product(BOTH + tuple(ODD[::3]), ("relu", "silu")):
        guarded = cases.Guarded()
        x, residual, dy = (guarded.copy(a) for a in arrays(shape, np.float32, axis)[:3])
        out, dx = guarded.empty(shape, np.float32), guarded.empty(shape, np.float32)
        before = cases.snapshot(x, residual, dy)
        _, cache = batch_norm_forward(x, training=True, axis=axis, activation=activation, residual=residual, out=out)
        batch_norm_backward(dy, cache, out=dx)
        guarded.check()
        assert cases.unchanged(before)
        assert not np.isnan(dx).any()


# -- bits --------------------------------------------------------------------------------------------------


def digest() -> str:
    sha = hashlib.sha256()
    for dtype, (shape, axis) in itertools.product(DTYPES, BIG[:1] + BIG[3:4] + BOTH[1::4] + tuple(ODD[::6])):
        x, residual, dy, gamma, beta = arrays(shape, dtype, axis)
        for activation in ACTIVATIONS[1:5] + ACTIVATIONS[-1:]:
            y, cache = batch_norm_forward(
                x, gamma=gamma, beta=beta, training=True, axis=axis, activation=activation, residual=residual
            )
            for result in (y, *batch_norm_backward(dy, cache)):
                sha.update(result.tobytes())
    for dtype, activation in itertools.product(DTYPES, ACTIVATIONS):
        sha.update(identity(EDGES + list(np.linspace(-9, 9, 99)), dtype, activation).tobytes())
    return sha.hexdigest()


def test_any_number_of_threads():
    digests = set()
    for n in (1, 2, 3, 5):
        with fastbn.threads(n):
            digests.add(digest())
    assert len(digests) == 1


def test_every_instruction_set_level():
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_fused; print(test_fused.digest())"
    outputs = set()
    for level in cases.LEVELS:
        run = subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env=os.environ | {"FASTBN_ISA": level},
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        outputs.add(run.stdout.strip())
    assert outputs == {digest()}


# -- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_closed_form(activation, dtype):
    """The residual's gradient is dy times the derivative; the others are those of a plain batch norm for it."""
    for (shape, axis), training in itertools.product(BOTH + SMALL + tuple(ODD), (True, False)):
        x, residual, dy, gamma, beta = arrays(shape, dtype, axis)
        moving = cases.moving(shape[axis], dtype)
        options = dict(zip(("moving_mean", "moving_variance"), moving)) | {"axis": axis, "update": False}
        options |= {"gamma": gamma, "beta": beta, "training": training}
        _, cache = batch_norm_forward(x, activation=activation, residual=residual, **options)
        *gradients, dresidual = batch_norm_backward(dy, cache)
        z, off = oracle(shape, dtype, axis, training, residual)
        if activation in ref.SMOOTH:
            allowed = ref.derivative_tolerance(z, off, activation, dtype) + ref.unit(dtype)
            allowed = np.abs(dy) * allowed + float(np.finfo(dtype).smallest_subnormal)
        else:  # on its own side of a kink; a slope and a product are rounded
            z = batch_norm(x, residual=residual, **options)
            allowed = 2 * ref.unit(dtype) * np.abs(dy)
        ref.assert_within(dresidual, ref.activation_derivative(z, activation) * dy, allowed, f"{shape} {axis}")
        _, plain = batch_norm_forward(x, **options)
        for gradient, expected in zip(gradients, batch_norm_backward(dresidual, plain), strict=True):
            ref.assert_same_bits(gradient, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_no_residual_is_a_residual_of_zeros(training, activation):
    for shape, axis in BOTH + tuple(ODD[::5]):
        x, _, dy, gamma, beta = arrays(shape, np.float32, axis)
        mean, variance = cases.moving(shape[axis])
        options = {
            "gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance, "training": training,
            "update": False, "axis": axis, "activation": activation,
        }  # fmt: skip
        _, cache = batch_norm_forward(x, residual=np.zeros_like(x), **options)
        expected = batch_norm_backward(dy, cache)[:3]
        _, cache = batch_norm_forward(x, **options)
        for out in (None, dy.copy(), np.empty_like(x)):
            source = dy if out is None else out
            source[...] = dy
            for gradient, e in zip(batch_norm_backward(source, cache, out=out), expected, strict=True):
                ref.assert_same_bits(gradient, e)
        ref.assert_same_bits(batch_norm_backward(dy, cache, out=x)[0], expected[0])  # reads x before it writes it


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=cases.name)
def test_central_differences(case, activation, training):
    shape, axis = case
    x, residual, dy, gamma, beta = arrays(shape, np.float64, axis)
    mean, variance = cases.moving(shape[axis], np.float64)
    options = {"training": training, "axis": axis, "epsilon": 0.1, "update": False, "activation": activation}
    options |= {"moving_mean": mean, "moving_variance": variance}

    def loss() -> float:
        return float((batch_norm(x, gamma=gamma, beta=beta, residual=residual, **options) * dy).sum())

    plain = batch_norm(x, gamma=gamma, beta=beta, residual=residual, **(options | {"activation": None}))
    assert np.abs(plain).min() > 1e-4  # no kink within a step
    assert np.abs(plain - 6).min() > 1e-4
    _, cache = batch_norm_forward(x, gamma=gamma, beta=beta, residual=residual, **options)
    # As for the plain gradient, with a third derivative some times larger.
    for gradient, a in zip(batch_norm_backward(dy, cache), (x, gamma, beta, residual), strict=True):
        np.testing.assert_allclose(gradient, numeric_gradient(loss, a), atol=1e-7)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
def test_derivatives_at_the_edges(activation, dtype):
    z = np.array([0.0, -0.0, 6.0, 7.0, -1.0, 1.0, -np.inf, np.inf, 3000.0, -3000.0], dtype).reshape(1, -1)
    n = z.shape[1]
    _, cache = batch_norm_forward(
        z, moving_mean=np.zeros(n), moving_variance=np.ones(n), epsilon=0.0, activation=activation,
        residual=np.zeros_like(z),
    )  # fmt: skip
    dy = np.full_like(z, 2)
    with np.errstate(invalid="ignore"):
        exact = ref.activation_derivative(z, activation) * 2
    dresidual = batch_norm_backward(dy, cache)[3]
    np.testing.assert_allclose(dresidual, exact.astype(dtype), rtol=8 * ref.unit(dtype), atol=1e-37)
    if activation in ("relu", "relu6"):
        assert dresidual[0, 0] == dresidual[0, 1] == 0
        infinite = batch_norm_backward(np.full_like(z, np.inf), cache)[3]
        assert not np.isnan(infinite).any()


def test_the_gradient_without_an_activation_is_a_copy():
    x, residual, dy, _, _ = arrays((30, 6), np.float32, -1)
    _, cache = batch_norm_forward(x, training=True, residual=residual)
    *_, dresidual = batch_norm_backward(dy, cache)
    ref.assert_same_bits(dresidual, dy)
    assert not np.shares_memory(dresidual, dy)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_cache_does_not_need_beta_again(activation):
    x, residual, dy, gamma, beta = arrays((30, 6), np.float32, -1)
    _, cache = batch_norm_forward(x, gamma=gamma, beta=beta, training=True, activation=activation, residual=residual)
    expected = batch_norm_backward(dy, cache)
    beta[:] = gamma[:] = 77
    for a, b in zip(batch_norm_backward(dy, cache), expected, strict=True):
        ref.assert_same_bits(a, b)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("residual", [False, True])
def test_a_gradient_in_place_of_dy_is_gated_once(axis, activation, mean, residual):
    """Far from zero a part is summed twice: what was kept in place of dy must not come through the gate again."""
    shape = (6, 5, 30) if axis == 1 else (6, 30, 5)
    x, added, dy, gamma, beta = arrays(shape, "float32", axis)
    x = x + np.float32(mean)
    options = {"gamma": gamma, "beta": beta, "training": True, "axis": axis, "activation": activation}
    if residual:
        options["residual"] = added
    _, cache = batch_norm_forward(x, **options)
    expected = batch_norm_backward(dy, cache)
    mine = dy.copy()
    got = batch_norm_backward(mine, cache, out=mine)
    assert got[0] is mine
    for a, b in zip(got, expected):
        assert a.tobytes() == b.tobytes()


def test_without_a_residual_the_gradient_of_a_relu_does_not_need_y():
    x, _, dy, gamma, beta = arrays((4, 3, 20), "float32", 1)
    y, cache = batch_norm_forward(x, gamma=gamma, beta=beta, training=True, axis=1, activation="relu")
    expected = batch_norm_backward(dy, cache)
    y[...] = np.nan
    for a, b in zip(batch_norm_backward(dy, cache), expected):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_gradient_of_strides_that_need_a_copy(activation, with_residual):
    """Every third image of NHWC data: no single stride walks its positions."""
    x, dy, w = (cases.normal((12, 4, 5, 3), np.float64, seed=seed)[::3] for seed in range(3))
    results = []
    for copied in (False, True):
        a, d, r = (np.ascontiguousarray(v) if copied else v for v in (x, dy, w))
        residual = r if with_residual else None
        _, cache = batch_norm_forward(a, training=True, activation=activation, residual=residual)
        results.append(batch_norm_backward(d, cache))
    for strided, contiguous in zip(*results, strict=True):
        ref.assert_same_bits(strided, contiguous)
