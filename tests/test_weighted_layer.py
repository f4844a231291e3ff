"""Weights, masks and missing values in layers that do more than one pass: groups, corrections, averages."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref
from test_weights import EACH, make, spoil

import fastbn
from fastbn import BatchNorm, batch_norm_backward, batch_norm_forward, moments, recompute_statistics

SHAPES = (((12, 3, 5, 4), 1), ((12, 5), -1))


def arrays(layer):
    return [v.copy() for v in layer.variables]


@pytest.mark.parametrize("policy", ["propagate", "omit"])
@pytest.mark.parametrize("groups", ["contiguous", "strided"])
@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("case", SHAPES, ids=cases.name)
def test_every_group_by_its_own_weights(case, each, groups, policy):
    shape, axis = case
    channels = shape[axis]
    w, full = make(each, shape, axis)
    x, dy = spoil(cases.normal(shape, mean=3), full), cases.normal(shape, seed=1)
    if policy == "omit":
        x[np.random.default_rng(8).random(shape) < 0.1] = np.nan
    layer = BatchNorm(
        channels, axis=axis, momentum=0.0, ddof=1, virtual_batch_size=5, virtual_groups=groups, allow_incomplete=True,
        nan_policy=policy,
    )  # fmt: skip
    y = layer(x, training=True, sample_weight=w)
    dx = layer.backward(dy)
    parts = [slice(g, 10, 2) for g in range(2)] if groups == "strided" else [slice(0, 5), slice(5, 10)]
    dgamma, dbeta, counts, means, variances = 0.0, 0.0, [], [], []
    dense = np.broadcast_to(full, shape)
    for part in (*parts, slice(10, 12)):
        own = {"sample_weight": np.ascontiguousarray(dense[part]), "axis": axis, "nan_policy": policy}
        expected, cache = batch_norm_forward(
            x[part], gamma=np.ones(channels), beta=np.zeros(channels), training=True, **own
        )
        ref.assert_same_bits(y[part], expected)
        gradients = batch_norm_backward(dy[part], cache)
        ref.assert_same_bits(dx[part], gradients[0])
        dgamma, dbeta = dgamma + gradients[1].astype(float), dbeta + gradients[2].astype(float)
        m = moments(x[part], **own)
        counts.append(np.broadcast_to(m.count, channels))
        means.append(m.mean)
        variances.append(np.where(counts[-1] > 0, m.variance(1), 0))
    np.testing.assert_allclose(layer.grads["gamma"], dgamma, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.grads["beta"], dbeta, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, np.average(means, axis=0, weights=counts), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, np.average(variances, axis=0, weights=counts), rtol=1e-5)


KINDS = {
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 0.3, "dmax": 5.0}},
    "renorm of tf1": {"renorm": True, "renorm_scheme": "tf1", "renorm_momentum": 0.7},
    "renorm in groups": {"renorm": True, "virtual_batch_size": 6},
    "adjustment": {"adjustment": lambda shape: (np.linspace(0.5, 2, 3), np.linspace(-1, 1, 3)), "ddof": 1},
    "zero_debias": {"zero_debias": True},
    "mean of all batches": {"momentum": None, "on_nonfinite": "skip"},
    "finite": {"on_nonfinite": "raise", "activation": "silu"},
    "no statistics": {"track": False, "activation": "relu"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_masked_values_might_as_well_not_be_there(kind):
    mask = np.arange(12) % 3 != 1  # as many in each group
    options = {"axis": 1, "momentum": 0.8} | KINDS[kind]
    smaller = options | ({"virtual_batch_size": 4} if "virtual_batch_size" in options else {})
    masked, cut = BatchNorm(3, **options), BatchNorm(3, **smaller)
    for seed in range(4):
        x = cases.normal((12, 3, 4), mean=seed, seed=seed)
        dy = cases.normal((12, 3, 4), seed=9)
        dy[~mask] = 0
        x[~mask] = (np.nan, np.inf, 7.0, -1e30)[seed]
        y, expected = masked(x, training=True, mask=mask), cut(x[mask], training=True)
        np.testing.assert_allclose(y[mask], expected, rtol=2e-5, atol=2e-5)
        dx, expected = masked.backward(dy), cut.backward(dy[mask])
        np.testing.assert_allclose(dx[mask], expected, rtol=1e-4, atol=2e-5)
        for name in ("gamma", "beta"):
            np.testing.assert_allclose(masked.grads[name], cut.grads[name], rtol=1e-4, atol=1e-4)
        for a, b in zip(masked.variables, cut.variables, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert masked.batches == cut.batches == (4 if masked.track else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_in_which_nothing_counts_keeps_what_it_has(kind):
    options = {"momentum": 0.8} | KINDS[kind]
    layer = BatchNorm(3, beta_initializer=("constant", 0.5), **(options | {"activation": None}))
    x = cases.normal((12, 3), mean=2)
    layer(x, training=True)
    before = arrays(layer)
    mask = np.ones((12, 3), bool)
    mask[:, 1] = False
    y = layer(cases.normal((12, 3), seed=1), training=True, mask=mask)
    shift = 0.5 if kind != "adjustment" else 0.5 + KINDS[kind]["adjustment"](None)[1][1]
    np.testing.assert_allclose(y[:, 1], shift)
    assert np.isfinite(y).all()
    dx = layer.backward(np.ones((12, 3), np.float32))
    assert (dx[:, 1] == 0).all()
    assert np.isfinite(dx).all()
    for old, new in zip(before, layer.variables, strict=True):
        assert np.isfinite(new).all()
        if old.ndim and kind != "renorm of tf1":
            assert old[1] == new[1]
    if kind == "renorm of tf1":  # its averages are sums that a weight for all channels goes with
        assert before[3][1] == layer.moving_variance[1]
        names = list(layer.renorm_state)
        old = dict(zip(names, before[4:], strict=True))
        for name in ("renorm_mean", "renorm_stddev"):
            weight = name + "_weight"
            kept = old[name][1] / old[weight]
            np.testing.assert_allclose(layer.renorm_state[name][1] / layer.renorm_state[weight], kept, rtol=1e-6)
    batches, before = layer.batches, arrays(layer)
    y = layer(x, training=True, mask=np.zeros(12, bool))
    assert layer.batches == batches
    assert all((a == b).all() for a, b in zip(before, layer.variables, strict=True))


def test_a_group_in_which_nothing_counts():
    layer = BatchNorm(2, virtual_batch_size=3, momentum=0.0, beta_initializer="ones")
    x = cases.normal((6, 2))
    weights = np.array([0, 0, 0, 1, 2, 3])
    y = layer(x, training=True, sample_weight=weights)
    assert (y[:3] == 1).all()
    m = moments(x[3:], sample_weight=weights[3:])
    np.testing.assert_allclose(layer.moving_mean, m.mean, rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, m.variance(), rtol=1e-6)


def test_first_batch_of_tf1_renorm_without_a_channel():
    layer = BatchNorm(2, renorm=True, renorm_scheme="tf1", momentum=0.5, renorm_momentum=0.5)
    mask = np.array([[True, False]] * 8)
    layer(cases.normal((8, 2), mean=4), training=True, mask=mask)
    state = layer.renorm_state
    assert layer.moving_mean[1] == 0
    assert layer.moving_variance[1] == 1
    np.testing.assert_allclose(state["renorm_stddev"][1] / state["renorm_stddev_weight"], np.sqrt(1.001), rtol=1e-6)


def test_missing_values_do_not_count_in_exact_statistics():
    x = cases.normal((20, 3), mean=2)
    x[np.random.default_rng(0).random(x.shape) < 0.2] = np.nan
    x[:, 2] = np.nan
    expected = moments(x, nan_policy="omit")
    layer = BatchNorm(3, nan_policy="omit", ddof=1)
    recompute_statistics(layer, [x[:7], x[7:]])
    np.testing.assert_allclose(layer.moving_mean, [*expected.mean[:2], 0], rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, [*expected.variance(1)[:2], 1], rtol=1e-6)
    other, w = BatchNorm(3, on_nonfinite="raise"), np.random.default_rng(1).random(20)
    x = cases.normal((20, 3))
    recompute_statistics(
        other, [(x[:9], w[:9]), (x[9:], w[9:])], forward=lambda batch: other(batch[0], sample_weight=batch[1])
    )
    expected = moments(x, sample_weight=w)
    np.testing.assert_allclose(other.moving_mean, expected.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(other.moving_variance, expected.variance(), rtol=1e-5)
    mask = np.array([[True, False, True]] * 10)
    recompute_statistics(other, [x[:10], x[10:]], forward=lambda batch: other(batch, mask=mask))
    np.testing.assert_allclose(other.moving_mean, [x[:, 0].mean(), expected.mean[1], x[:, 2].mean()], rtol=1e-5)
    assert np.isfinite(other.moving_variance).all()
    with pytest.raises(ValueError, match="batches must bring values to every layer"):
        recompute_statistics(layer, [np.full((4, 3), np.nan)])


def test_refusals_come_before_anything_is_written():
    layer = BatchNorm(2, virtual_batch_size=4, nan_policy="raise")
    x = cases.normal((8, 2))
    x[6, 1] = np.nan
    before, out = arrays(layer), np.full((8, 2), 5, np.float32)
    with pytest.raises(ValueError, match='x must have no NaN with nan_policy="raise", got 1, of them 1 in channel 1'):
        layer(x, training=True, out=out)
    assert (out == 5).all()
    assert all((a == b).all() for a, b in zip(before, layer.variables, strict=True))
    layer(x, training=True, mask=np.arange(8) != 6)
    with pytest.raises(ValueError, match="out must not share memory with sample_weight, got overlapping arrays"):
        layer(x, training=True, sample_weight=out, out=out)
    with pytest.raises(ValueError, match="mask must have shape"):
        layer(x, training=True, mask=np.ones(4, bool))
    finite = BatchNorm(2, on_nonfinite="raise")
    with pytest.raises(ValueError, match="others in channel 1"):
        finite(x, training=True, mask=np.arange(8) != 0)


@pytest.mark.parametrize("size", [None, 4])
def test_gradients_are_not_written_over_weights(size):
    layer = BatchNorm(2, virtual_batch_size=size)
    memory = np.ones((12, 2), np.float32)
    x, w = cases.normal((8, 2)), memory[:8]
    layer(x, training=True, sample_weight=w)
    for out in (w, memory[4:]):  # the rows of one group are the weights of another
        with pytest.raises(ValueError, match="out must not share memory with mask or sample_weight, got overlapping"):
            layer.backward(x, out=out)
    assert (memory == 1).all()


def test_configuration():
    layer = BatchNorm(3, nan_policy="omit", virtual_batch_size=4)
    assert BatchNorm.from_config(layer.get_config()).nan_policy == "omit"
    with pytest.raises(ValueError, match="nan_policy must be"):
        fastbn.BatchNorm(nan_policy="ignore")
