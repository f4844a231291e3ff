"""Ghost batches: groups of rows with statistics of their own, contiguous or in TensorFlow's strides."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import BatchNorm, batch_norm, batch_norm_backward, batch_norm_forward
from fastbn.ghost import groups

C = 3
KINDS = ("contiguous", "strided")
SHAPES = (((12, C), -1), ((12, C, 4, 5), 1), ((12, 4, 5, C), -1), ((12, 4, C, 2), (2, 3)))


def tensorflow_groups(x, size):
    """The published form: reshape (N, ...) to (V, N / V, ...), and normalize along the first axis."""
    return np.moveaxis(x.reshape(size, len(x) // size, *x.shape[1:]), 1, 0)


def expected_groups(x, size, kind):
    if kind == "strided":
        return list(tensorflow_groups(x, size))
    return [x[i : i + size] for i in range(0, len(x), size)]


def layer(shape, axis, kind, **options):
    bn = BatchNorm(axis=axis, virtual_batch_size=4, virtual_groups=kind, momentum=0.75, dtype=np.float64, **options)
    bn.build(tuple(shape[a] for a in (axis if isinstance(axis, tuple) else (axis,))))
    gamma, beta = cases.parameters(bn.moving_mean.size, np.float64)
    if bn.gamma is not None:
        bn.gamma = gamma.reshape(bn.gamma.shape)
    if bn.beta is not None:
        bn.beta = beta.reshape(bn.beta.shape)
    return bn


@given(
    rows=st.integers(0, 50), size=st.integers(1, 20), kind=st.sampled_from(KINDS), allow_incomplete=st.booleans()
)  # fmt: skip
def test_every_row_is_in_one_group(rows, size, kind, allow_incomplete):
    if rows % size and not allow_incomplete:
        with pytest.raises(ValueError, match="x must have a multiple of virtual_batch_size"):
            groups(rows, size, kind, allow_incomplete)
        return
    parts = [np.arange(rows)[part] for part in groups(rows, size, kind, allow_incomplete)]
    assert sorted(np.concatenate(parts)) == list(range(rows))
    assert all(len(part) == size for part in parts[:-1])
    full = rows // size
    for g, part in enumerate(parts[:full]):
        first, step = (g, full) if kind == "strided" else (g * size, 1)
        assert part.tolist() == [first + i * step for i in range(size)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("ddof", [0, 1])
def test_each_group_has_its_own_statistics(kind, shape, axis, ddof):
    x = cases.normal(shape, np.float64, mean=2, deviation=3)
    bn = layer(shape, axis, kind, ddof=ddof)
    y = bn(x, True)
    parts = expected_groups(x, 4, kind)
    for got, part in zip(expected_groups(y, 4, kind), parts, strict=True):
        want = ref.train(part, bn.gamma, bn.beta, axis=axis)
        np.testing.assert_allclose(got, want.astype(float), rtol=1e-10, atol=1e-12)
    moments = [ref.moments(part, axis) for part in parts]
    mean = np.mean([m.mean for m in moments], 0).astype(float)
    variance = np.mean([m.variance(ddof) for m in moments], 0).astype(float)
    np.testing.assert_allclose(bn.moving_mean.ravel(), 0.25 * mean, rtol=1e-12)
    np.testing.assert_allclose(bn.moving_variance.ravel(), 0.75 + 0.25 * variance, rtol=1e-12)
    assert bn.batches == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:3], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"activation": "silu"}], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradient(kind, shape, axis, options, with_residual):
    x, dy = cases.normal(shape, np.float64, mean=2), cases.normal(shape, np.float64, seed=1)
    w = cases.normal(shape, np.float64, seed=2) if with_residual else None
    bn = layer(shape, axis, kind, **options)
    bn(x, True, residual=w)
    dx = bn.backward(dy)
    dgamma, dbeta = np.zeros(C), np.zeros(C)
    pairs = [expected_groups(a, 4, kind) for a in (x, dy, dx)]
    residuals = expected_groups(w, 4, kind) if with_residual else [None] * 3
    for i, (part, dpart, got) in enumerate(zip(*pairs, strict=True)):
        arguments = {"gamma": bn.gamma, "beta": bn.beta, "axis": axis, "residual": residuals[i], **options}
        _, cache = batch_norm_forward(np.ascontiguousarray(part), training=True, **arguments)
        want, a, b, *others = batch_norm_backward(np.ascontiguousarray(dpart), cache)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
        dgamma += a
        dbeta += b
        if others:
            got = expected_groups(bn.grads["residual"], 4, kind)[i]
            np.testing.assert_allclose(got, others[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bn.grads["gamma"], dgamma, rtol=1e-11)
    np.testing.assert_allclose(bn.grads["beta"], dbeta, rtol=1e-11)
    out = np.empty_like(dy)
    assert bn.backward(dy, out=out) is out
    ref.assert_same_bits(out, dx)
    inside = dy.copy()
    ref.assert_same_bits(bn.backward(inside, out=inside), dx)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["keras", "tf1"])
def test_with_renormalization_one_correction_holds_for_all_groups(kind, scheme):
    """As in TensorFlow 1: r and d are those of the mean of the groups' statistics."""
    x = cases.normal((12, C), np.float64, mean=2, deviation=3)
    bn = layer(x.shape, -1, kind, renorm=True, renorm_scheme=scheme, renorm_momentum=0.5)
    for seed in range(2):
        bn(cases.normal((12, C), np.float64, seed=seed), True)
    state = {n: a.copy() for n, a in bn.renorm_state.items()}
    y = bn(x, True)
    parts = expected_groups(x, 4, kind)
    mean = np.mean([p.mean(0) for p in parts], 0)
    sigma = np.sqrt(np.mean([p.var(0) for p in parts], 0) + 1e-3)
    if scheme == "keras":
        m, s = state["renorm_mean"], state["renorm_stddev"]
    else:
        m = state["renorm_mean"] + (1 - state["renorm_mean_weight"]) * mean
        s = state["renorm_stddev"] + (1 - state["renorm_stddev_weight"]) * sigma
    r, d = sigma / s, (mean - m) / s
    for got, p in zip(expected_groups(y, 4, kind), parts, strict=True):
        x_hat = (p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3)
        np.testing.assert_allclose(got, (x_hat * r + d) * bn.gamma + bn.beta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_needs_no_divisible_batch(kind):
    bn = layer((12, C), -1, kind)
    bn(cases.normal((12, C), np.float64), True)
    x = cases.normal((7, C), np.float64)
    kept = {"moving_mean": bn.moving_mean, "moving_variance": bn.moving_variance}
    ref.assert_same_bits(bn(x), batch_norm(x, gamma=bn.gamma, beta=bn.beta, **kept))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [10, 3])
def test_a_last_group_may_be_incomplete(kind, rows):
    x = cases.normal((rows, C), np.float64, mean=2)
    bn = layer(x.shape, -1, kind, allow_incomplete=True, ddof=1)
    y = bn(x, True)
    full = rows // 4 * 4
    last = ref.train(x[full:], bn.gamma, bn.beta).astype(float)
    np.testing.assert_allclose(y[full:], last, rtol=1e-10, atol=1e-12)
    parts = [*(expected_groups(x[:full], 4, kind) if full else []), x[full:]]
    shares = [len(p) / rows for p in parts]
    mean = sum(s * p.mean(0) for s, p in zip(shares, parts, strict=True))
    variance = sum(s * p.var(0, ddof=1) for s, p in zip(shares, parts, strict=True))
    np.testing.assert_allclose(bn.moving_mean, 0.25 * mean, rtol=1e-12)
    np.testing.assert_allclose(bn.moving_variance, 0.75 + 0.25 * variance, rtol=1e-12)
    assert bn.backward(np.ones_like(x)).shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind):
    x = cases.normal((12, C, 3, 3), np.float32)
    bn, twin = (BatchNorm(axis=1, virtual_batch_size=4, virtual_groups=kind) for _ in range(2))
    y = twin(x, True)
    inside = x.copy()
    assert bn(inside, True, out=inside) is inside
    ref.assert_same_bits(inside, y)
    assert y.strides == x.strides
    for a, b in zip(bn.variables, twin.variables, strict=True):
        ref.assert_same_bits(a, b)
    with pytest.raises(ValueError, match="out must not be x"):
        bn.backward(y)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_changes_nothing(kind):
    bn = layer((12, C), -1, kind)
    before = bn.state_dict()
    assert bn(np.empty((0, C)), True).shape == (0, C)
    for name, array in bn.state_dict().items():
        assert np.array_equal(array, before[name])


def test_groups_are_views(monkeypatch):
    """No part of x is copied: what the cache refers to is x itself."""
    x = cases.normal((12, C), np.float32)
    bn = BatchNorm(virtual_batch_size=4, virtual_groups="strided")
    bn(x, True)
    assert all(np.shares_memory(cache.x, x) for _, cache in bn._last.cache.parts)


def test_a_wrong_call_changes_nothing():
    bn = layer((12, C), -1, "contiguous")
    before = bn.state_dict()
    x, out = cases.normal((10, C), np.float64), np.full((10, C), 7.0)
    message = "x must have a multiple of virtual_batch_size=4 rows, or allow_incomplete=True be set, got 10"
    with pytest.raises(ValueError, match=message):
        bn(x, True, out=out)
    x = cases.normal((13, C), np.float64)
    whole = np.full((14, C), 7.0)
    whole[:13] = x
    for arguments, message in (
        ({"out": np.empty((12, C + 1))}, r"out must have shape \(12, 3\)"),
        ({"out": np.empty((12, C), np.float32)}, "out must have dtype float64"),
        ({"residual": np.ones((3, C))}, r"residual must have shape \(12, 3\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bn(x[:12], True, **arguments)
    with pytest.raises(ValueError, match="out must be x itself or not share memory with it"):
        bn(whole[:12], True, out=whole[1:13])
    with pytest.raises(ValueError, match="gamma must have shape"):
        bn(np.ones((12, C + 1)), True)
    assert (out == 7).all()
    assert np.array_equal(whole[:13], x)
    for name, array in bn.state_dict().items():
        assert np.array_equal(array, before[name])
    bn(x[:12], True)
    with pytest.raises(ValueError, match="dy must have shape"):
        bn.backward(x)
    with pytest.raises(ValueError, match="out must be dy itself or not share memory with it"):
        bn.backward(whole[:12], out=whole[1:13])


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be at least 1, got 0"),
    ({"virtual_batch_size": 2.5}, TypeError, "virtual_batch_size must be an integer, got 2.5"),
    ({"virtual_groups": "random"}, ValueError, "virtual_groups must be one of contiguous, strided, got 'random'"),
    ({"allow_incomplete": None}, TypeError, "allow_incomplete must be a bool, got None"),
])  # fmt: skip
def test_messages(wrong, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(C, **wrong)


def test_the_first_axis_cannot_be_that_of_channels():
    with pytest.raises(ValueError, match="axis must not be the first axis of x with virtual_batch_size, got 0"):
        BatchNorm(axis=0, virtual_batch_size=2)(np.ones((C, 4)), True)


# -- adjustment --------------------------------------------------------------------------------------------

SCALE, SHIFT = np.array([0.9, 1.1, 1.05]), np.array([0.1, -0.2, 0.0])


@pytest.mark.parametrize(("shape", "axis"), [((12, C), -1), ((6, C, 4), 1)], ids=str)
@pytest.mark.parametrize("form", ["flat", "kept", "list"])
def test_adjustment(shape, axis, form):
    shapes = []
    kept = tuple(C if n == C else 1 for n in shape)

    def adjustment(of):
        shapes.append(of)
        if form == "list":
            return [SCALE.tolist(), SHIFT.tolist()]
        return tuple(a if form == "flat" else a.reshape(kept) for a in (SCALE, SHIFT))

    bn = BatchNorm(axis=axis, adjustment=adjustment, dtype=np.float64)
    bn.build(C)
    bn.gamma, bn.beta = cases.parameters(C, np.float64)
    x, dy = cases.normal(shape, np.float64, mean=2), cases.normal(shape, np.float64, seed=1)
    y = bn(x, True)
    assert shapes == [shape]
    x_hat = ref.train(x, axis=axis).astype(float)
    want = (x_hat * SCALE.reshape(kept) + SHIFT.reshape(kept)) * bn.gamma.reshape(kept) + bn.beta.reshape(kept)
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-12)
    dx = bn.backward(dy)
    exact, _, dbeta = ref.backward_train(dy, x, bn.gamma * SCALE, axis=axis)
    np.testing.assert_allclose(dx, exact.astype(float), rtol=1e-9, atol=1e-11)
    others = tuple(i for i, n in enumerate(shape) if n != C)
    dgamma = (dy * (x_hat * SCALE.reshape(kept) + SHIFT.reshape(kept))).sum(others)
    np.testing.assert_allclose(bn.grads["gamma"], dgamma, rtol=1e-9)
    np.testing.assert_allclose(bn.grads["beta"], dbeta.astype(float), rtol=1e-10)
    bn(x)
    assert shapes == [shape]  # not in inference
    np.testing.assert_allclose(bn.moving_mean, 0.01 * x.mean(others), rtol=1e-12)


@pytest.mark.parametrize("result", [(SCALE, None), (None, SHIFT), (2.0, 0), (None, None)], ids=str)
def test_parts_of_an_adjustment(result):
    x = cases.normal((12, C), np.float64, mean=2)
    scale, shift = (v if v is not None else i for v, i in zip(result, (1.0, 0.0), strict=True))
    want = ref.train(x).astype(float) * scale + shift
    got = BatchNorm(C, adjustment=lambda _: result, dtype=np.float64)(x, True)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_adjustment_follows_renormalization():
    x = cases.normal((12, C), np.float64, mean=2, deviation=3)
    options = {"renorm": True, "renorm_clipping": {"rmax": 2, "dmax": 1}, "dtype": np.float64}
    both, alone = BatchNorm(C, adjustment=lambda _: (SCALE, SHIFT), **options), BatchNorm(C, **options)
    np.testing.assert_allclose(both(x, True), alone(x, True) * SCALE + SHIFT, rtol=1e-12)
    dy = cases.normal(x.shape, np.float64, seed=1)
    np.testing.assert_allclose(both.backward(dy), alone.backward(dy * SCALE), rtol=1e-10, atol=1e-13)


def test_adjustment_where_all_axes_are_of_channels():
    """What is of the parameters' shape is that, also if x has the same shape with its axes in another order."""
    x = cases.normal((3, 3), np.float64)
    shift = np.arange(9.0).reshape(3, 3)
    bn = BatchNorm(axis=(1, 0), adjustment=lambda _: (None, shift), dtype=np.float64)
    np.testing.assert_array_equal(bn(x, True), shift.T)
    bn = BatchNorm((3, 3), axis=(1, 0), dtype=np.float64)
    bn.beta = shift
    np.testing.assert_array_equal(bn(x, True), shift.T)


def test_several_channel_axes():
    shape = (6, 3, 4, 2)
    x = cases.normal(shape, np.float64)
    scale = np.arange(1.0, 7.0).reshape(2, 3)
    bn = BatchNorm(axis=(3, 1), adjustment=lambda of: (scale, scale.T.reshape(1, 3, 1, 2)), dtype=np.float64)
    y = bn(x, True)
    want = ref.train(x, scale, scale, axis=(3, 1)).astype(float)
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-12)
    bn = BatchNorm(axis=(3, 1), renorm=True, on_nonfinite="skip", zero_debias=False, dtype=np.float64)
    plain = BatchNorm(axis=(3, 1), dtype=np.float64)
    for _ in range(2):
        bn(x, True)
        plain(x, True)
    np.testing.assert_allclose(bn.moving_mean, plain.moving_mean, rtol=1e-12)


@pytest.mark.parametrize(("result", "error", "message"), [
    (SCALE, TypeError, "adjustment must return a tuple of scale and shift, got ndarray"),
    ((SCALE,), TypeError, "adjustment must return a tuple of scale and shift, got tuple"),
    ((SCALE[:2], SHIFT), ValueError, r"scale of adjustment must have shape \(3,\), got \(2,\)"),
    ((SCALE, np.ones((12, 1))), ValueError, r"shift of adjustment must have shape \(3,\), got \(12, 1\)"),
    (("a", SHIFT), TypeError, "scale of adjustment must be real numbers, got <U1"),
])  # fmt: skip
def test_wrong_adjustments(result, error, message):
    bn = BatchNorm(C, adjustment=lambda _: result)
    with pytest.raises(error, match=message):
        bn(cases.normal((12, C)), True)
    assert bn.batches == 0
    with pytest.raises(TypeError, match="adjustment must be callable or None, got 3"):
        BatchNorm(adjustment=3)


def test_an_adjusted_layer_is_not_saved(tmp_path):
    bn = BatchNorm(C, adjustment=lambda _: (1, 0))
    with pytest.raises(TypeError, match="adjustment must not be a function in a layer that is saved"):
        bn.save(tmp_path / "bn")
    assert not list(tmp_path.iterdir())


# -- types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8, np.int8])
@pytest.mark.parametrize("options", [
    {"virtual_batch_size": 4, "virtual_groups": "strided"}, {"renorm": True}, {"on_nonfinite": "raise"},
    {"virtual_batch_size": 6, "renorm": True, "renorm_scheme": "tf1", "activation": "relu"},
], ids=str)  # fmt: skip
def test_small_types(dtype, options):
    """Those of the same values in float32, rounded once."""
    x = (10 * cases.normal((12, C, 3), np.float32) + 30).astype(dtype)
    bn, wide = BatchNorm(axis=1, **options), BatchNorm(axis=1, **options)
    y, expected = bn(x, True), wide(x.astype(np.float32), True)
    assert y.dtype == (np.float16 if dtype == np.float16 else np.float32)
    ref.assert_same_bits(y, expected.astype(y.dtype))
    for a, b in zip(bn.variables, wide.variables, strict=True):
        ref.assert_same_bits(a, b)
    dy = cases.normal(x.shape, np.float32, seed=1).astype(y.dtype)
    dx, want = bn.backward(dy), wide.backward(dy.astype(np.float32))
    assert dx.dtype == y.dtype
    ref.assert_same_bits(dx, want.astype(y.dtype))
    assert bn.grads["gamma"].dtype == np.float32


@pytest.mark.parametrize("options", [{"virtual_batch_size": 8}, {"renorm": True}], ids=str)
def test_the_same_bits_for_any_number_of_threads(options):
    x = cases.normal((16, C, 64, 64), np.float32)
    results = []
    for count in (1, 2):
        with fastbn.threads(count):
            bn = BatchNorm(axis=1, **options)
            y = bn(x, True)
            results.append((y, bn.backward(x), *bn.variables))
    for a, b in zip(*results, strict=True):
        ref.assert_same_bits(a, b)
