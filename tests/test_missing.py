"""What mask, sample_weight and nan_policy mean in functions, Moments, BatchNorm and files; every message."""

from __future__ import annotations

import copy
import pickle
import re

import cases
import numpy as np
import pytest
import reference as ref
from test_weights import argument, digest, make, run, spoil

import fastbn
from fastbn import BatchNorm, Moments, batch_norm, batch_norm_backward, batch_norm_forward, moments
from fastbn.cli import main
from fastbn.stream import load_moments, save_moments

POSITIONS = "have shape (4,) per sample, (4, 2) or (4, 1, 2) per position, or (4, 3, 2) per value"
WRONG = [
    ({"mask": np.ones((3,), bool)}, ValueError, f"mask must {POSITIONS}, got (3,)"),
    ({"mask": np.ones((4, 3), bool)}, ValueError, f"mask must {POSITIONS}, got (4, 3)"),
    ({"sample_weight": np.ones((4, 1, 1))}, ValueError, f"sample_weight must {POSITIONS}, got (4, 1, 1)"),
    ({"mask": np.ones(4, np.int8)}, TypeError, "mask must have dtype bool, got int8"),
    ({"mask": [1, 0, 1, 1]}, TypeError, "mask must have dtype bool, got int64"),
    (
        {"sample_weight": np.ones(4, complex)},
        TypeError,
        "sample_weight must have a bool, integer or real dtype of at most 64 bits, got complex128",
    ),
    ({"sample_weight": [1, 1, -2.5, 1]}, ValueError, "sample_weight must be finite and not negative, got -2.5"),
    ({"sample_weight": [1, 1, -2, 1]}, ValueError, "sample_weight must be finite and not negative, got -2.0"),
    ({"sample_weight": [1, np.nan, 0, 1]}, ValueError, "sample_weight must be finite and not negative, got nan"),
    ({"sample_weight": [1, np.inf, 0, 1]}, ValueError, "sample_weight must be finite and not negative, got inf"),
    ({"nan_policy": "drop"}, ValueError, "nan_policy must be one of propagate, omit, raise, got 'drop'"),
    ({"nan_policy": None}, TypeError, "nan_policy must be a string, got None"),
    ({"nan_policy": "raise"}, ValueError, 'x must have no NaN with nan_policy="raise", got 3, of them 2 in channel 1'),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_messages_and_nothing_written(arguments, error, message):
    x = cases.normal((4, 3, 2))
    x[[0, 1], 1, 0] = x[2, 2, 1] = np.nan
    mean, variance = cases.moving(3)
    out = np.full(x.shape, 5, np.float32)
    before = cases.snapshot(x, mean, variance, out, *arguments.values())
    options = {"moving_mean": mean, "moving_variance": variance, "training": True, "axis": 1, "out": out}
    for call in (batch_norm, batch_norm_forward):
        with pytest.raises(error, match=re.escape(message)):
            call(x, **options, **arguments)
    with pytest.raises(error, match=re.escape(message)):
        moments(x, axis=1, **arguments)
    layer = BatchNorm(3, axis=1)
    policy = arguments.get("nan_policy")
    if policy is None or policy == "raise":
        layer = (
            BatchNorm(3, axis=1, nan_policy=policy or "propagate") if "nan_policy" not in arguments or policy else layer
        )
        if "nan_policy" not in arguments or policy:
            with pytest.raises(error, match=re.escape(message)):
                layer(x, training=True, **{k: v for k, v in arguments.items() if k != "nan_policy"})
            assert layer.batches == 0
    assert cases.unchanged(before)


def test_messages_where_axis_0_holds_the_channels():
    with pytest.raises(
        ValueError, match=re.escape("mask must have shape (4,) or (1, 4) per position, or (3, 4) per value")
    ):
        moments(cases.normal((3, 4)), axis=0, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match=re.escape("mask must have shape () or (1,) per position, or (3,) per value")):
        moments(cases.normal((3,)), mask=np.ones(2, bool))


def test_memory_that_is_written_must_not_be_a_weight():
    x, w = cases.normal((4, 3)), np.ones((4, 3), np.float32)
    mean = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="out must not share memory with sample_weight"):
        batch_norm(x, training=True, sample_weight=w, out=w)
    with pytest.raises(ValueError, match="moving_mean must not share memory with sample_weight"):
        batch_norm(x, training=True, sample_weight=w, moving_mean=w[0], moving_variance=mean)
    with pytest.raises(ValueError, match="moving_variance must not share memory with sample_weight"):
        batch_norm(x, training=True, sample_weight=w, moving_mean=mean, moving_variance=w[0])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_a_channel_without_weight_keeps_its_statistics_and_gives_beta(axis, dtype):
    x, dy = cases.normal((8, 5, 6), dtype, mean=1e4), cases.normal((8, 5, 6), dtype, seed=1)
    mask = np.ones(x.shape, bool)
    dead = [slice(None)] * 3
    dead[axis] = 2
    mask[tuple(dead)] = False
    x[0][tuple(dead[1:])] = np.nan
    channels = x.shape[axis]
    gamma, beta = cases.parameters(channels, dtype)
    mean, variance = cases.moving(channels, np.float64)
    result = run(x, dy, gamma, beta, axis, mask=mask)
    finite = np.isfinite(x)
    assert (result["y"][tuple(dead)][finite[tuple(dead)]] == beta[2]).all()
    assert (result["dx"][tuple(dead)] == 0).all()
    assert result["dgamma"][2] == 0
    assert result["mean"][2] == mean[2]
    assert result["variance"][2] == variance[2]
    others = np.arange(channels) != 2
    assert (result["mean"] != mean)[others].all()
    m = moments(x, axis=axis, mask=mask)
    assert m.count[2] == m.mean[2] == m.m2[2] == 0
    assert np.isnan(m.variance()[2])
    assert np.isfinite(m.variance()[others]).all()


def test_nothing_counts_at_all():
    x = cases.normal((6, 3))
    layer = BatchNorm(3)
    y = layer(x, training=True, mask=np.zeros(6, bool))
    assert (y == 0).all()
    assert layer.batches == 0
    assert (layer.moving_mean == 0).all()
    assert (layer.moving_variance == 1).all()
    assert (layer.backward(np.ones_like(x)) == 0).all()
    m = moments(x, sample_weight=np.zeros(6))
    assert m.count == 0
    assert np.isnan(m.variance()).all()


def test_published_numbers_of_a_mask():
    """Two rows (1, 5), (2, 5) and padding, momentum 0: moving mean (1.5, 5), moving variance (0.25, 0), as in Keras."""
    x = np.array([[[1, 5], [2, 5]], [[0, 0], [0, 0]]], np.float32)
    layer = BatchNorm(2, momentum=0.0)
    layer(x, training=True, mask=np.array([[True, True], [False, False]]))
    np.testing.assert_array_equal(layer.moving_mean, [1.5, 5])
    np.testing.assert_array_equal(layer.moving_variance, [0.25, 0])


@pytest.mark.parametrize(("weights", "divisor"), [([2, 1, 1], 3), ([0.25, 0.25, 0.5], 1), ([0.5, 0.5, 1], 1)])
def test_ddof(weights, divisor):
    x = np.array([[0.0], [2.0], [4.0]])
    w = np.array(weights, np.float64)
    mean, variance = np.zeros(1), np.zeros(1)
    batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.0, ddof=1, sample_weight=w)
    m2 = (w * (x[:, 0] - (w * x[:, 0]).sum() / w.sum()) ** 2).sum()
    np.testing.assert_allclose(variance, m2 / divisor)
    np.testing.assert_allclose(moments(x, sample_weight=w).variance(1), m2 / divisor)


# -- nan_policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*cases.DTYPES, np.float16])
def test_omitted_values_are_those_of_smaller_tables(dtype):
    x = cases.normal((50, 4), np.float64, mean=3).astype(dtype)
    for c in range(3):
        x[c :: c + 2, c] = np.nan
    mean, variance = np.zeros(4), np.ones(4)
    options = {"moving_mean": mean, "moving_variance": variance, "momentum": 0.0, "training": True, "ddof": 1}
    y = batch_norm(x, nan_policy="omit", **options)
    m = moments(x, nan_policy="omit")
    assert m.count.dtype == np.int64
    assert m.count.tolist() == np.isfinite(x).sum(0).tolist()
    for c in range(4):
        keep = np.isfinite(x[:, c])
        one = moments(x[keep, c : c + 1])
        np.testing.assert_allclose(m.mean[c], one.mean[0], rtol=1e-14)
        np.testing.assert_allclose(m.variance(1)[c], one.variance(1)[0], rtol=1e-13)
        np.testing.assert_allclose([mean[c], variance[c]], [one.mean[0], one.variance(1)[0]], rtol=1e-13)
        assert np.isnan(y[~keep, c]).all()
        np.testing.assert_allclose(
            y[keep, c], batch_norm(x[keep, c : c + 1], training=True)[:, 0], rtol=2e-3, atol=2e-6
        )


def test_inf_is_not_missing():
    x = cases.normal((10, 2))
    x[0, 0] = np.inf
    assert not np.isfinite(moments(x, nan_policy="omit").mean[0])
    moments(x, nan_policy="raise")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), [((40, 20), 1), ((8, 3, 40), 1)])
def test_gradient_of_a_channel_with_inf_is_nan_where_nan_is_missing(shape, axis, dtype):
    """The mean of such a channel is no number: that must not make all of its values missing."""
    x, dy = cases.normal(shape, dtype, seed=1), cases.normal(shape, dtype, seed=2)
    x[0, 0] = np.nan
    wanted = batch_norm_backward(dy, batch_norm_forward(x, training=True, axis=axis, nan_policy="omit")[1])
    x[1, 1] = np.inf
    dx, dgamma, dbeta = batch_norm_backward(dy, batch_norm_forward(x, training=True, axis=axis, nan_policy="omit")[1])
    assert np.isnan(dgamma[1])
    whole = np.moveaxis(dy, axis, 0)[1].astype(np.float64).sum()  # a value that is inf is not missing: its dy counts
    np.testing.assert_allclose(dbeta[1], whole, rtol=4 * np.finfo(dtype).eps, atol=dy.size * np.finfo(np.float64).eps)
    assert np.isfinite(dgamma[[0, 2]]).all()
    for got, expected in ((dgamma, wanted[1]), (dbeta, wanted[2])):
        ref.assert_same_bits(np.delete(got, 1), np.delete(expected, 1))
    ref.assert_same_bits(np.delete(dx, 1, axis), np.delete(wanted[0], 1, axis))


def test_raise():
    x = cases.normal((10, 3))
    assert moments(x, nan_policy="raise") == moments(x)
    ref.assert_same_bits(batch_norm(x, training=True, nan_policy="raise"), batch_norm(x, training=True))
    x[3] = np.nan
    mean, variance = cases.moving(3)
    with pytest.raises(ValueError, match="x must have no NaN"):  # in inference as well
        batch_norm(x, moving_mean=mean, moving_variance=variance, nan_policy="raise")
    weights = np.arange(10.0) * (np.arange(10) != 3)
    moments(x, nan_policy="raise", sample_weight=weights)  # padding may be NaN
    moments(np.zeros((3, 2), np.uint8), nan_policy="raise")


def test_whole_numbers_have_no_nan():
    x = np.arange(12, dtype=np.uint8).reshape(4, 3)
    m = moments(x, nan_policy="omit")
    assert m == moments(x)
    assert type(m.count) is int


def test_propagate_is_what_it_was():
    x = cases.normal((10, 3))
    x[4, 1] = np.nan
    y = batch_norm(x, training=True)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()
    weighted = batch_norm(x, training=True, sample_weight=np.ones(10))
    assert np.isnan(weighted[:, 1]).all()
    assert np.isfinite(weighted[:, [0, 2]]).all()


# -- with everything else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "silu", ("leaky_relu", 0.2), "gelu_tanh"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 5, 7), 1), ((40, 5), -1)])
def test_activations_and_residuals(shape, axis, with_residual, activation):
    mask, full = make("sample", shape, axis, "bool")
    x, dy = spoil(cases.normal(shape, np.float64), full), cases.normal(shape, np.float64, seed=1)
    gamma, beta = cases.parameters(shape[axis], np.float64)
    added = cases.normal(shape, np.float64, seed=2) if with_residual else None
    y, cache = batch_norm_forward(
        x, gamma=gamma, beta=beta, training=True, axis=axis, mask=mask, activation=activation, residual=added
    )
    dx, dgamma, dbeta, *others = batch_norm_backward(dy, cache)
    finite = np.isfinite(x)
    z = batch_norm(x, gamma=gamma, beta=beta, training=True, axis=axis, mask=mask)
    z = np.where(finite, z, 0) + (0 if added is None else added)
    np.testing.assert_allclose(y[finite], ref.activate(z, activation)[finite].astype(float), rtol=1e-9, atol=1e-12)
    before = np.where(finite, dy * ref.activation_derivative(z, activation), 0).astype(np.float64)
    expected = ref.backward_weighted(before, x, full, gamma, axis=axis)
    for got, value in zip((dx, dgamma, dbeta), expected, strict=True):
        np.testing.assert_allclose(got, value.astype(float), rtol=1e-8, atol=1e-9)
    if others:
        np.testing.assert_allclose(others[0], before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("each", ["sample", "position", "value"])
@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 5, 7), 1), ((40, 5), -1), ((9, 20, 3, 3), 1)])
def test_gradient_from_the_output(shape, axis, each):
    w, full = make(each, shape, axis, "f4")
    x, dy = spoil(cases.normal(shape, np.float64), full), cases.normal(shape, np.float64, seed=1)
    gamma, beta = cases.parameters(shape[axis], np.float64)
    options = {"gamma": gamma, "beta": beta, "training": True, "axis": axis, "sample_weight": w}
    expected = batch_norm_backward(dy, batch_norm_forward(x, **options)[1])
    z = x.copy()
    _, cache = batch_norm_forward(z, save="output", out=z, **options)
    for got, value in zip(batch_norm_backward(dy, cache), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-8, atol=1e-9)


SMALL_TYPES = ["float16", "bfloat16", "uint8", "int8"]


@pytest.mark.parametrize("each", ["sample", "position", "value"])
@pytest.mark.parametrize("name", SMALL_TYPES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 7, 7), 1), ((40, 5), -1), ((3, 4, 5, 1100), 1), ((5, 30, 3), -1)])
def test_small_types(shape, axis, name, each):
    """They are the same values in float32, to the bit, rounded once."""
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else name)
    w, full = make(each, shape, axis, "f4")
    x = np.rint(cases.normal(shape, deviation=20)).clip(0, 100).astype(dtype)
    if dtype.kind not in "iu":
        x = spoil(x.astype(np.float32), full).astype(dtype)
    wide = x.astype(np.float32)
    result = dtype if dtype.kind not in "iu" else np.dtype(np.float32)
    dy = cases.normal(shape, seed=1).astype(result)
    gamma, beta = cases.parameters(shape[axis])
    policy = {"nan_policy": "omit"} if each == "value" else {}
    got = run(x, dy, gamma, beta, axis, **argument(w), **policy)
    expected = run(wide, dy.astype(np.float32), gamma, beta, axis, **argument(w), **policy)
    for key in ("y", "dx"):
        expected[key] = expected[key].astype(result)
        got[key], expected[key] = got[key].view(f"u{result.itemsize}"), expected[key].view(f"u{result.itemsize}")
        nan = np.isnan(np.asarray(got[key].view(result), np.float32))
        got[key], expected[key] = np.where(nan, 0, got[key]), np.where(nan, 0, expected[key])
    assert digest(got) == digest(expected)


def test_several_channel_axes():
    x = cases.normal((6, 3, 4, 5))
    mask = np.random.default_rng(0).random((6, 5)) < 0.5
    full = mask[:, None, None, :]
    m = moments(x, axis=(1, 2), mask=mask)
    assert m == moments(x, axis=(1, 2), mask=full) == moments(x, axis=(1, 2), mask=np.broadcast_to(full, x.shape))
    s = ref.weighted(x, full, (1, 2))
    np.testing.assert_allclose(m.mean, s.mean.astype(float), rtol=1e-12, atol=1e-14)
    assert m.count == mask.sum()


def test_empty_batches():
    for shape in ((0, 3), (4, 0)):
        m = moments(np.zeros(shape), nan_policy="omit", sample_weight=np.ones(shape[0]))
        assert m.count == 0
        y, cache = batch_norm_forward(np.zeros(shape), training=True, mask=np.ones(shape[0], bool))
        assert y.shape == shape
        assert batch_norm_backward(y, cache)[0].shape == shape


# -- the layer -------------------------------------------------------------------------------------------------------


def test_layer():
    x, dy = cases.normal((12, 4)), cases.normal((12, 4), seed=1)
    x[2, 1] = np.nan
    w = np.random.default_rng(0).random(12)
    layer = BatchNorm(4, nan_policy="omit", momentum=0.5)
    y = layer(x, training=True, sample_weight=w, mask=w > 0.2)
    mean, variance = np.zeros(4, np.float32), np.ones(4, np.float32)
    expected, cache = batch_norm_forward(
        x, gamma=np.ones(4), beta=np.zeros(4), moving_mean=mean, moving_variance=variance, momentum=0.5, training=True,
        sample_weight=np.where(w > 0.2, w, 0), nan_policy="omit",
    )  # fmt: skip
    ref.assert_same_bits(y, expected)
    ref.assert_same_bits(layer.moving_mean, mean)
    ref.assert_same_bits(layer.moving_variance, variance)
    ref.assert_same_bits(layer.backward(dy), batch_norm_backward(dy, cache)[0])
    assert layer.batches == 1
    assert "nan_policy='omit'" in repr(layer)
    assert layer.get_config()["nan_policy"] == "omit"
    assert copy.deepcopy(layer).nan_policy == "omit"


def test_layer_files(tmp_path):
    layer = BatchNorm(3, nan_policy="omit")
    layer(cases.normal((5, 3)), training=True)
    layer.save(tmp_path / "bn.npz")
    assert BatchNorm.load(tmp_path / "bn.npz").nan_policy == "omit"


# -- Moments ---------------------------------------------------------------------------------------------------------


def parts():
    x = cases.normal((30, 3), np.float64, mean=2)
    x[4:9, 1] = np.nan
    w = np.random.default_rng(1).random(30)
    return x, w


def test_merging():
    x, w = parts()
    whole = moments(x, nan_policy="omit")
    assert whole.count.tolist() == [30, 25, 30]
    merged = moments(x[:7], nan_policy="omit") + moments(x[7:], nan_policy="omit")
    assert merged.count.tolist() == [30, 25, 30]
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)
    updated = Moments(3).update(x[:7], nan_policy="omit").update(x[7:], nan_policy="omit")
    assert updated == merged
    weighted = moments(x, nan_policy="omit", sample_weight=w)
    merged = moments(x[:5], nan_policy="omit", sample_weight=w[:5]) + moments(
        x[5:], nan_policy="omit", sample_weight=w[5:]
    )
    assert merged.count.dtype == np.float64
    np.testing.assert_allclose(merged.count, weighted.count, rtol=1e-14)
    np.testing.assert_allclose(merged.m2, weighted.m2, rtol=1e-12)
    same = moments(x[9:]) + moments(x[:9, :], mask=~np.isnan(x[:9]))
    assert same.count.tolist() == [30, 25, 30]


def test_plain_data_keep_an_int_count():
    x = cases.normal((8, 3))
    assert type(moments(x).count) is int
    assert type(moments(x, mask=np.arange(8) < 5).count) is int
    assert moments(x, mask=np.arange(8) < 5).count == 5
    assert type(moments(x, nan_policy="omit").count) is int
    weighted = moments(x, sample_weight=np.full(8, 0.5))
    assert type(weighted.count) is float
    assert weighted.count == 4.0
    assert type((moments(x) + moments(x)).count) is int
    assert (moments(x) + weighted).count == 12.0
    with_nothing = moments(x, mask=np.zeros(8, bool)) + moments(x)
    assert with_nothing == moments(x)


def states():
    x, w = parts()
    return [moments(x, nan_policy="omit"), moments(x, nan_policy="omit", sample_weight=w), moments(x, sample_weight=w)]


def test_dicts_pickles_files_and_words(tmp_path, capsys):
    for number, m in enumerate(states()):
        state = m.to_dict()
        assert Moments.from_dict(state) == m == pickle.loads(pickle.dumps(m)) == copy.deepcopy(m)
        if isinstance(m.count, np.ndarray):
            state["count"][0] += 1
            assert state["count"][0] != m.count[0]
        path = tmp_path / f"{number}.npz"
        save_moments(path, m, -1)
        loaded, axis = load_moments(path)
        assert loaded == m
        assert axis == -1
        assert type(loaded.count) is type(m.count)
        assert main(["merge", str(path), str(path), "-o", str(tmp_path / "out.npz")]) == 0
        assert load_moments(tmp_path / "out.npz")[0] == m + m
    assert capsys.readouterr().out.splitlines()[0] == "3 channels of 50 to 60 values each"
    assert repr(states()[0]) == "<fastbn.Moments of 3 channels, 25 to 30 values each>"
    assert re.fullmatch(r"<fastbn.Moments of 3 channels, weights of \S+ to \S+>", repr(states()[1]))
    assert re.fullmatch(r"<fastbn.Moments of 3 channels, weights of \S+>", repr(states()[2]))


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (np.array([1, 2]), ValueError, "count must have shape (3,), got (2,)"),
        (np.array([1.0, np.nan, 2]), ValueError, "count must be finite and at least 0, got nan"),
        (np.array([1, -1, 2]), ValueError, "count must be finite and at least 0, got -1"),
        (np.array(["a"] * 3), TypeError, "count must be integers or real numbers, got <U1"),
        (-0.5, ValueError, "count must be finite and at least 0, got -0.5"),
        (np.array([0, 1, 1]), ValueError, "mean and m2 must be 0 where count is 0, got other values"),
    ],
)
def test_counts_that_make_no_sense(count, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Moments.from_dict({"count": count, "mean": np.ones(3), "m2": np.ones(3)})


def test_update_moving_takes_counts_of_channels():
    mean, variance = np.zeros(3), np.ones(3)
    fastbn.update_moving(mean, variance, [1, 2, 3], [4, 4, 4], momentum=0.0, count=[0, 1, 5], ddof=1)
    np.testing.assert_allclose(mean, [0, 2, 3])
    np.testing.assert_allclose(variance, [1, 4, 5])
    fastbn.update_moving(mean, variance, [1, 2, 3], [4, 4, 4], momentum=0.0, count=3.0, ddof=1)
    np.testing.assert_allclose(variance, [6, 6, 6])


def test_files_with_two_counts_or_none(tmp_path):
    from fastbn import state

    arrays = {"mean": np.ones(3), "m2": np.ones(3)}
    for count, more in ((None, {}), (3, {"count": np.arange(3)})):
        state.write_state(tmp_path / "x.npz", "moments", {"count": count, "axis": -1}, arrays | more)
        with pytest.raises(fastbn.StateError, match="count must be a number or an array"):
            load_moments(tmp_path / "x.npz")
