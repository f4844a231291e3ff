"""Batch renormalization, against the formulas written down again in float64, and against finite differences."""

from __future__ import annotations

import copy
import pickle

import cases
import numpy as np
import pytest
import reference as ref

from fastbn import BatchNorm, batch_norm

C = 4
EPSILON = 1e-3
CLIPPING = {"rmin": 0.8, "rmax": 1.3, "dmax": 0.25}
SCHEMES = ("keras", "tf1")


def batch(seed, shape=(12, C), dtype=np.float64):
    return cases.normal(shape, dtype, mean=1 + seed, deviation=1.5 + seed, seed=seed)


class Oracle:
    """One layer, as Keras (or TensorFlow 1) computes it, with rows of channels."""

    def __init__(self, scheme, momentum, renorm_momentum, clipping=None):
        self.scheme, self.momentum, self.renorm_momentum = scheme, momentum, renorm_momentum
        self.bounds = {"rmin": 0, "rmax": np.inf, "dmax": np.inf} | (clipping or {})
        self.moving_mean, self.moving_variance, self.moving_stddev = np.zeros(C), np.ones(C), np.ones(C)
        start = 1.0 if scheme == "keras" else 0.0
        self.renorm_mean, self.renorm_stddev = np.zeros(C), np.full(C, start)
        self.renorm_mean_weight = self.renorm_stddev_weight = 0.0

    def correction(self, mean, sigma):
        if self.scheme == "keras":
            m, s = self.renorm_mean, np.maximum(self.renorm_stddev, np.sqrt(EPSILON))
        else:
            m = self.renorm_mean + (1 - self.renorm_mean_weight) * mean
            s = self.renorm_stddev + (1 - self.renorm_stddev_weight) * sigma
        r = np.clip(sigma / s, self.bounds["rmin"], self.bounds["rmax"])
        return r, np.clip((mean - m) / s, -self.bounds["dmax"], self.bounds["dmax"])

    def learn(self, mean, sigma):
        q, p = self.renorm_momentum, self.momentum
        self.renorm_mean = q * self.renorm_mean + (1 - q) * mean
        self.renorm_stddev = q * self.renorm_stddev + (1 - q) * sigma
        if self.scheme == "keras":
            self.moving_mean = p * self.moving_mean + (1 - p) * mean
            self.moving_stddev = p * self.moving_stddev + (1 - p) * sigma
            self.moving_variance = np.maximum(self.moving_stddev**2 - EPSILON, 0)
            return
        self.renorm_mean_weight = q * self.renorm_mean_weight + 1 - q
        self.renorm_stddev_weight = q * self.renorm_stddev_weight + 1 - q
        new_mean = self.renorm_mean / self.renorm_mean_weight
        new_variance = (self.renorm_stddev / self.renorm_stddev_weight) ** 2 - EPSILON
        self.moving_mean = p * self.moving_mean + (1 - p) * new_mean
        self.moving_variance = p * self.moving_variance + (1 - p) * new_variance

    def __call__(self, rows, gamma, beta):
        mean, sigma = rows.mean(0), np.sqrt(rows.var(0) + EPSILON)
        r, d = self.correction(mean, sigma)
        self.learn(mean, sigma)
        return ((rows - mean) / sigma * r + d) * gamma + beta


def layer(scheme="keras", **options):
    options = {"momentum": 0.9, "renorm_momentum": 0.8, "renorm_clipping": CLIPPING} | options
    bn = BatchNorm(C, renorm=True, renorm_scheme=scheme, dtype=np.float64, **options)
    bn.gamma[:], bn.beta[:] = cases.parameters(C, np.float64)
    return bn


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clipping", [None, CLIPPING, {"rmax": 1.1}, {"rmin": 0.9}, {"dmax": 0.0}, {}], ids=str)
def test_several_batches(scheme, clipping):
    bn, oracle = layer(scheme, renorm_clipping=clipping), Oracle(scheme, 0.9, 0.8, clipping)
    for seed in range(6):
        x = batch(seed)
        np.testing.assert_allclose(bn(x, True), oracle(x, bn.gamma, bn.beta), rtol=1e-10, atol=1e-12)
        for name, array in (bn.state_dict() | bn.renorm_state).items():
            if hasattr(oracle, name):
                np.testing.assert_allclose(array, getattr(oracle, name), rtol=1e-12, atol=1e-14, err_msg=name)
    assert bn.batches == 6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inference_is_that_of_any_layer(scheme):
    bn = layer(scheme)
    bn(batch(0), True)
    x = batch(1)
    kept = {"moving_mean": bn.moving_mean, "moving_variance": bn.moving_variance}
    ref.assert_same_bits(bn(x), batch_norm(x, gamma=bn.gamma, beta=bn.beta, **kept))


def test_the_first_batch_of_tf1_needs_no_correction():
    """Averages that begin with the batch are those of the batch."""
    bn = layer("tf1")
    x = batch(3)
    np.testing.assert_allclose(bn(x, True), batch_norm(x, gamma=bn.gamma, beta=bn.beta, training=True), rtol=1e-12)


def test_same_momentum_and_no_clipping_give_the_same_in_training_and_inference():
    """The averages before a batch are the moving statistics (a property that Keras tests)."""
    bn = layer(renorm_momentum=0.9, renorm_clipping=None)
    for seed in range(4):
        x = batch(seed)
        before = bn(x) if seed else None
        y = bn(x, True)
        if before is not None:
            np.testing.assert_allclose(y, before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(12, C), (3, C, 2, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}, {"activation": "silu"}], ids=str)
def test_gradient_with_r_and_d_as_constants(scheme, shape, options):
    bn = layer(scheme, axis=1) if not options else BatchNorm(
        C, axis=1, renorm=True, renorm_scheme=scheme, renorm_clipping=CLIPPING, dtype=np.float64, **options
    )  # fmt: skip
    for seed in range(3):
        bn(batch(seed, shape), True)
    x, dy = batch(5, shape), cases.normal(shape, np.float64, seed=9)
    oracle = Oracle(scheme, 0.9, 0.8, CLIPPING)
    for name, array in bn.renorm_state.items():
        setattr(oracle, name, array.copy())
    rows = np.moveaxis(x, 1, -1).reshape(-1, C)
    r, d = oracle.correction(rows.mean(0), np.sqrt(rows.var(0) + EPSILON))
    drows = np.moveaxis(dy, 1, -1).reshape(-1, C)
    gamma, beta = (np.ones(C) if bn.gamma is None else bn.gamma), (np.zeros(C) if bn.beta is None else bn.beta)

    def loss(rows, gamma, beta):
        z = ((rows - rows.mean(0)) / np.sqrt(rows.var(0) + EPSILON) * r + d) * gamma + beta
        return (drows * (z / (1 + np.exp(-z)) if bn.activation else z)).sum()

    bn(x, True)
    dx = np.moveaxis(bn.backward(dy), 1, -1).reshape(-1, C)
    arguments = [rows, gamma, beta]
    for i, (name, given) in enumerate([("dx", dx), ("gamma", bn.grads.get("gamma")), ("beta", bn.grads.get("beta"))]):
        if given is None:
            assert options
            continue
        h, flat = 1e-6, given.reshape(-1)
        for at in range(flat.size):
            ends = []
            for step in (h, -h):
                moved = [a.copy() for a in arguments]
                moved[i].reshape(-1)[at] += step
                ends.append(loss(*moved))
            assert flat[at] == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-6, abs=2e-6), name


def test_float32_and_in_place_and_residual():
    bn, plain = BatchNorm(C, renorm=True), BatchNorm(C, renorm=True)
    x, w = batch(0, (300, C), np.float32), batch(1, (300, C), np.float32)
    y = plain(x, True, residual=w)
    assert y.dtype == np.float32
    inside = x.copy()
    assert bn(inside, True, residual=w, out=inside) is inside
    ref.assert_same_bits(inside, y)
    with pytest.raises(ValueError, match="out must not be x"):
        bn.backward(w)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_empty_batch_changes_nothing(scheme):
    bn = layer(scheme)
    before = bn.state_dict()
    assert bn(np.empty((0, C)), True).shape == (0, C)
    for name, array in bn.state_dict().items():
        assert np.array_equal(array, before[name]), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_epsilon_0_and_a_constant_channel(scheme):
    bn = BatchNorm(2, renorm=True, renorm_scheme=scheme, epsilon=0.0, renorm_momentum=0.0, beta_initializer="ones")
    for _ in range(3):
        y = bn(np.full((5, 2), 3.0), True)
    assert (y == 1).all()
    assert np.isfinite(np.concatenate([v.ravel() for v in bn.variables])).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_skip_covers_the_averages(scheme):
    bn = layer(scheme, on_nonfinite="skip")
    x = batch(0)
    x[0, 1] = np.nan
    bn(x, True)
    assert all(np.isfinite(v).all() for v in bn.variables)
    state = bn.renorm_state
    if scheme == "tf1":  # the channel shares the weight of all, so its average must not be one of fewer batches
        expected = np.sqrt(1 + bn.epsilon)
        np.testing.assert_allclose(state["renorm_stddev"][1] / state["renorm_stddev_weight"], expected, rtol=1e-6)
    else:
        assert state["renorm_stddev"][1] == 1
    assert bn.moving_mean[1] == 0
    assert bn.moving_variance[1] == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_momentum_none(scheme):
    bn = layer(scheme, momentum=None, renorm_momentum=0.0)  # the averages are those of the last batch
    data = [batch(seed) for seed in range(3)]
    for x in data:
        bn(x, True)
    np.testing.assert_allclose(bn.moving_mean, np.mean([x.mean(0) for x in data], 0), rtol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b)), "file", "state"])
def test_state(scheme, clone, tmp_path):
    bn = layer(scheme)
    bn(batch(0), True)
    if clone == "file":
        bn.save(tmp_path / "bn")
        twin = BatchNorm.load(tmp_path / "bn")
    elif clone == "state":
        twin = BatchNorm(**bn.get_config())
        twin.load_state_dict(bn.state_dict())
    else:
        twin = clone(bn)
    assert repr(twin) == repr(bn)
    assert twin.renorm_clipping == CLIPPING
    assert list(twin.renorm_state) == list(bn.renorm_state)
    assert len(twin.variables) == len(bn.variables) == (7 if scheme == "keras" else 8)
    ref.assert_same_bits(twin(batch(1), True), bn(batch(1), True))
    for a, b in zip(twin.variables, bn.variables, strict=True):
        ref.assert_same_bits(a, b)


def test_a_state_without_the_averages_is_refused():
    bn = layer()
    state = bn.state_dict()
    del state["renorm_mean"]
    with pytest.raises(ValueError, match="state_dict must have the names"):
        bn.load_state_dict(state)
    with pytest.raises(ValueError, match="renorm_stddev must not be negative, got -1"):
        bn.load_state_dict(bn.state_dict() | {"renorm_stddev": -np.ones(C)})


def test_renorm_state_holds_the_arrays_themselves():
    bn = layer()
    bn.renorm_state["renorm_mean"][:] = 5
    assert (bn.state_dict()["renorm_mean"] == 5).all()
    assert BatchNorm(renorm=True).renorm_state == {}
    assert BatchNorm(C).renorm_state == {}


def test_initial_averages_follow_the_initial_statistics():
    bn = BatchNorm(C, renorm=True, moving_variance_initializer=("constant", 4.0), moving_mean_initializer="ones")
    assert bn.renorm_state["moving_stddev"].tolist() == bn.renorm_state["renorm_stddev"].tolist() == [2.0] * C
    assert bn.renorm_state["renorm_mean"].tolist() == [1.0] * C


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ({"renorm_clipping": {"rmax": 2, "r": 1}}, ValueError, "renorm_clipping must have no keys but rmin, rmax and dmax, "
     "got rmax, r"),
    ({"renorm_clipping": [1]}, TypeError, "renorm_clipping must be a mapping or None, got list"),
    ({"renorm_clipping": {"rmin": 2, "rmax": 1}}, ValueError, "renorm_clipping must have rmin <= rmax, got 2"),
    ({"renorm_clipping": {"dmax": -1}}, ValueError, "dmax of renorm_clipping must be finite and at least 0, got -1.0"),
    ({"renorm_momentum": 2}, ValueError, r"renorm_momentum must be in \[0, 1\], got 2.0"),
    ({"renorm_scheme": "tf2"}, ValueError, "renorm_scheme must be one of keras, tf1, got 'tf2'"),
    ({"renorm": "yes"}, TypeError, "renorm must be a bool, got 'yes'"),
    ({"renorm": True, "ddof": 1}, ValueError, "ddof must be 0 with renorm, got 1"),
    ({"renorm": True, "zero_debias": True}, ValueError, "zero_debias must be False with renorm, got True"),
    ({"renorm": True, "track": False}, ValueError, "track must be True with renorm, got False"),
])  # fmt: skip
def test_messages(wrong, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(C, **wrong)
