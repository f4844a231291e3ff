"""Calls that go straight to a driver give what the full way gives: bits, statistics, gradients, and errors."""

from __future__ import annotations

import types

import numpy as np
import pytest
from cases import normal, parameters

import fastbn
from fastbn import functional, layer
from fastbn.kernels import _calls

SHAPES = [
    ((32, 16), -1),
    ((1, 1), 0),
    ((7,), 0),
    ((5, 3, 7, 7), 1),
    ((2, 3, 1, 4), -4),
    ((2, 130, 5), 1),
    ((300, 200), 1),
]


@pytest.fixture
def direct(monkeypatch):
    """Count calls carried out directly; `direct.off()` sends all of them the full way."""
    state = types.SimpleNamespace(taken=0, enabled=True)

    def counting(function):
        def call(*args):
            result = function(*args) if state.enabled else None
            state.taken += result is not None
            return result

        return call

    def off():
        state.enabled = False

    state.off = off
    stand_in = types.SimpleNamespace(forward=counting(_calls.forward), backward=counting(_calls.backward))
    monkeypatch.setattr(functional, "_calls", stand_in)
    monkeypatch.setattr(layer, "_calls", stand_in)
    return state


def everything(shape, axis, dtype, training, moving, ddof):
    x, dy = normal(shape, dtype, mean=3, seed=1), normal(shape, dtype, seed=2)
    gamma, beta = parameters(shape[axis], dtype)
    mean, variance = np.full(shape[axis], 0.5, moving), np.full(shape[axis], 2.0, moving)
    kw = {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance, "training": training}
    kw |= {"axis": axis, "momentum": 0.9, "ddof": ddof}
    y = fastbn.batch_norm(x, **kw)
    y2, cache = fastbn.batch_norm_forward(x, **kw)
    out = fastbn.batch_norm(x.copy(), out=np.empty_like(x), **kw)
    z = x.copy()
    fastbn.batch_norm(z, out=z, **kw)
    gradients = fastbn.batch_norm_backward(dy, cache)
    frozen = fastbn.batch_norm_backward(dy, cache, out=np.empty_like(x))
    assert repr(cache).endswith(f"mode {'train' if training else 'inference'!r}>")
    return [y, y2, out, z, mean, variance, *gradients, *frozen]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "moving"), [(np.float32, np.float32), (np.float64, np.float32), (np.float32, np.float64)]
)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_bits_are_those_of_the_full_way(direct, shape, axis, dtype, moving, training, ddof):
    fast = everything(shape, axis, dtype, training, moving, ddof)
    assert direct.taken >= 4
    direct.off()
    direct.taken = 0
    full = everything(shape, axis, dtype, training, moving, ddof)
    assert direct.taken == 0
    for a, b in zip(fast, full, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


ACTIVATIONS = [None, "relu", "relu6", ("leaky_relu", 0.2), ("leaky_relu", -0.5), "silu", "gelu_tanh"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((32, 16), -1), ((5, 3, 7, 7), 1), ((2, 40, 3), 1), ((300, 200), 1)])
def test_bits_of_fused_steps_are_those_of_the_full_way(direct, shape, axis, activation, added, dtype):
    channels = shape[axis]
    gamma, beta = parameters(channels, np.float64 if dtype is np.float64 else np.float32)
    x, dy, w = (normal(shape, dtype, mean=1, seed=seed) for seed in (1, 2, 3))

    def run():
        moving = [np.full(channels, 0.5, np.float32), np.full(channels, 2.0, np.float32)]
        kw = {"axis": axis, "activation": activation, "residual": w if added else None, "gamma": gamma, "beta": beta}
        kw |= {"moving_mean": moving[0], "moving_variance": moving[1]}
        results = [fastbn.batch_norm(x, **kw)]
        for training in (True, False):
            y, cache = fastbn.batch_norm_forward(x, training=training, **kw)
            results += [y, *fastbn.batch_norm_backward(dy, cache), *cache.statistics]
            assert len(fastbn.batch_norm_backward(dy, cache)) == 3 + added
            results += [*fastbn.batch_norm_backward(dy, cache, out=np.empty_like(dy))]
            results += [*fastbn.batch_norm_backward(d := dy.copy(), cache, out=d)]
        if added:
            kw["residual"] = z = w.copy()
            results.append(fastbn.batch_norm(x, training=True, out=z, **kw))
        z = x.copy()
        results.append(fastbn.batch_norm(z, training=True, out=z, **kw | {"residual": w if added else None}))
        bn = fastbn.BatchNorm(channels, axis=axis, activation=activation)
        results += [bn(x, training=True, residual=w if added else None), bn.backward(dy), *bn.grads.values()]
        return [*results, *moving]

    # A layer takes it up to a size.
    assert_same_outcome(direct, run, 13 + added + (x.size <= 32767))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_over_what_they_are_told_from(direct, activation):
    """dx in the place of x, of y or of the residual, as the last use of the cache."""

    def run():
        results = []
        for place in ("x", "y", "residual"):
            x, dy, w = (normal((32, 16), np.float32, seed=seed) for seed in (1, 2, 3))
            y, cache = fastbn.batch_norm_forward(x, training=True, activation=activation, residual=w)
            results += fastbn.batch_norm_backward(dy, cache, out={"x": x, "y": y, "residual": w}[place])
        x = normal((32, 16), np.float32, seed=1)
        y, cache = fastbn.batch_norm_forward(x, training=True, activation=activation)
        return [*results, *fastbn.batch_norm_backward(dy, cache, out=x)]

    assert_same_outcome(direct, run, 8)


SMALL_TYPES = ["float16", "bfloat16", "uint8", "int8"]


def of_small_type(shape, name):
    """A batch of such a type, and a gradient of the type of its results."""
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)
    x = np.clip(normal(shape, np.float32, mean=30, deviation=20, seed=1), 0, 100).astype(dtype)
    return x, normal(shape, np.float32, seed=2).astype(np.float32 if "int" in name else dtype)


@pytest.mark.parametrize("arguments", [{}, {"mask": True}, {"nan_policy": "omit"}], ids=["plain", "mask", "omit"])
@pytest.mark.parametrize("name", SMALL_TYPES)
@pytest.mark.parametrize(("shape", "axis"), [((32, 16), -1), ((5, 3, 7, 7), 1), ((40, 5), 1)])
def test_bits_of_small_types_are_those_of_the_full_way(direct, shape, axis, name, arguments):
    x, dy = of_small_type(shape, name)
    gamma, beta = parameters(shape[axis], np.float32)
    if "mask" in arguments:
        arguments = {"mask": np.random.default_rng(3).random(shape) > 0.3}

    def run():
        moving = [np.full(shape[axis], 0.5, np.float32), np.full(shape[axis], 2.0, np.float32)]
        kw = {"gamma": gamma, "beta": beta, "axis": axis, "moving_mean": moving[0], "moving_variance": moving[1]}
        y, cache = fastbn.batch_norm_forward(x, training=True, **kw, **arguments)
        assert y.dtype == dy.dtype
        gradients = fastbn.batch_norm_backward(dy, cache)
        others = fastbn.batch_norm_backward(dy, cache, out=np.empty_like(dy))
        out = fastbn.batch_norm(x, training=True, out=np.empty_like(dy), **kw, **arguments)
        bn = fastbn.BatchNorm(shape[axis], axis=axis)
        return [y, out, fastbn.batch_norm(x, **kw), *moving, *gradients, *others, bn(x, training=True), bn.backward(dy)]

    assert_same_outcome(direct, run, 7)


@pytest.mark.parametrize("name", ["uint8", "int8"])
def test_results_are_never_written_over_bytes(direct, name):
    """x of one byte a value in the memory of y, where it begins or further on."""
    memory = np.zeros(4 * 24 + 8, np.uint8)
    for start in (0, 4, 4 * 24 - 24):
        x, y = memory[start : start + 24].view(name).reshape(6, 4), memory[: 4 * 24].view(np.float32).reshape(6, 4)
        with pytest.raises(ValueError, match="out must"):
            fastbn.batch_norm(x, training=True, out=y)
        _, cache = fastbn.batch_norm_forward(x, training=True)
        with pytest.raises(ValueError, match="out must"):
            fastbn.batch_norm_backward(np.ones((6, 4), np.float32), cache, out=y)
    assert direct.taken == 3


def test_layer_takes_the_direct_way_and_agrees(direct):
    def run():
        x, dy = normal((32, 16), np.float32, seed=1), normal((32, 16), np.float32, seed=2)
        bn = fastbn.BatchNorm(16, momentum=0.9)
        results = [bn(x, training=True), bn.backward(dy), bn.grads["gamma"], bn.grads["beta"], bn(x), bn.backward(dy)]
        assert bn.batches == 1
        bn.trainable = False
        results.append(bn(x, training=True))
        assert bn.batches == 1
        return [*results, bn.moving_mean, bn.moving_variance]

    fast = run()
    assert direct.taken >= 5
    direct.off()
    for a, b in zip(fast, run(), strict=True):
        assert a.tobytes() == b.tobytes()


def test_layer_in_place_has_no_gradient(direct):
    bn = fastbn.BatchNorm(4)
    x = normal((8, 4), np.float32)
    assert bn(x, training=True, out=x) is x
    assert direct.taken == 1
    with pytest.raises(ValueError, match="out must not be x in a forward call whose gradient is taken"):
        bn.backward(np.ones_like(x))


X = np.arange(64, dtype=np.float32).reshape(16, 4)
LONG = np.zeros(100, np.float32)
WEIGHTS = np.linspace(0, 1, 16)
UNFIT = {
    "strided x": lambda: {"x": X[::2]},
    "list": lambda: {"x": X.tolist(), "axis": -1, "training": True, "moving_mean": None, "moving_variance": None},
    "masked": lambda: {"x": np.ma.masked_array(X)},
    "foreign": lambda: {"x": X.astype(">f4")},
    "foreign half": lambda: {"x": X.astype(">f2")},
    "short integers": lambda: {"x": X.astype(np.int16)},
    "out of the type of bytes": lambda: {"x": X.astype(np.uint8), "out": np.empty((16, 4), np.uint8)},
    "empty": lambda: {"x": X[:0]},
    "short gamma": lambda: {"gamma": np.ones(3, np.float32)},
    "integer gamma": lambda: {"gamma": np.ones(4, int)},
    "one moving array": lambda: {"moving_mean": None},
    "moving arrays overlap": lambda: {"moving_mean": LONG[:4], "moving_variance": LONG[2:6]},
    "read-only moving array": lambda: {"moving_mean": np.broadcast_to(np.float32(0), 4)},
    "partial overlap": lambda: {"x": LONG[:64].reshape(16, 4), "out": LONG[2:66].reshape(16, 4)},
    "out is gamma": lambda: {"gamma": LONG[:4], "out": LONG[:64].reshape(16, 4)},
    "out of another shape": lambda: {"out": np.empty((4, 16), np.float32)},
    "out of another type": lambda: {"out": np.empty((16, 4))},
    "momentum": lambda: {"momentum": 1.5},
    "integer momentum": lambda: {"momentum": 1},
    "nan epsilon": lambda: {"epsilon": float("nan")},
    "negative epsilon": lambda: {"epsilon": -1.0},
    "axis out of range": lambda: {"axis": 2},
    "huge axis": lambda: {"axis": 2**80},
    "ddof": lambda: {"ddof": 2},
    "huge ddof": lambda: {"ddof": 2**80},
    "training is a number": lambda: {"training": 1},
    "training is a word": lambda: {"training": "yes"},
    "update off": lambda: {"update": False},
    "strided residual": lambda: {"residual": np.repeat(X, 2, axis=1)[:, ::2]},
    "residual of another type": lambda: {"residual": X.astype(np.float64)},
    "residual of another shape": lambda: {"residual": X[:15]},
    "residual of bytes": lambda: {"x": X.astype(np.uint8), "residual": X},
    "residual and mask": lambda: {"residual": X, "mask": WEIGHTS > 0},
    "activation and weights": lambda: {"activation": "relu", "sample_weight": WEIGHTS},
    "activation and missing values": lambda: {"activation": "relu", "nan_policy": "omit"},
    "out overlaps the residual": lambda: {"residual": LONG[:64].reshape(16, 4), "out": LONG[4:68].reshape(16, 4)},
    "moving_mean is in the residual": lambda: {"residual": LONG[:64].reshape(16, 4), "moving_mean": LONG[:4]},
}


UNFIT_WEIGHTS = {
    "both": lambda: {"mask": WEIGHTS > 0, "sample_weight": WEIGHTS},
    "list": lambda: {"mask": (WEIGHTS > 0).tolist()},
    "mask of numbers": lambda: {"mask": WEIGHTS},
    "integers": lambda: {"sample_weight": np.arange(16)},
    "booleans": lambda: {"sample_weight": WEIGHTS > 0},
    "strided": lambda: {"sample_weight": np.repeat(WEIGHTS, 2)[::2]},
    "broadcast": lambda: {"sample_weight": np.broadcast_to(WEIGHTS[:, None], X.shape)},
    "short": lambda: {"sample_weight": WEIGHTS[:15]},
    "per channel": lambda: {"mask": np.ones(4, bool)},
    "transposed": lambda: {"mask": np.ones((4, 16), bool)},
    "one row": lambda: {"mask": np.ones((1, 4), bool)},
    "too many axes": lambda: {"mask": np.ones((16, 4, 1), bool)},
    "negative": lambda: {"sample_weight": -WEIGHTS},
    "negative per value": lambda: {"sample_weight": -np.ones_like(X)},
    "infinite": lambda: {"sample_weight": WEIGHTS / 0.0},
    "NaN per value": lambda: {"sample_weight": X * np.nan},
    "large": lambda: {"sample_weight": WEIGHTS * 1e30},
    "tiny": lambda: {"sample_weight": WEIGHTS * 1e-30},
    "raise": lambda: {"nan_policy": "raise"},
    "raise, of a mask": lambda: {"mask": WEIGHTS > 0, "nan_policy": "raise"},
    "unknown policy": lambda: {"nan_policy": "drop"},
    "policy is none": lambda: {"nan_policy": None},
    "inference": lambda: {"mask": WEIGHTS > 0, "training": False},
    "out is the weights": lambda: {"sample_weight": LONG[:64].reshape(16, 4), "out": LONG[:64].reshape(16, 4)},
    "out overlaps the mask": lambda: {"mask": LONG[20:24].view(bool), "out": LONG[:64].reshape(16, 4)},
    "moving_mean overlaps": lambda: {"sample_weight": LONG[:16], "moving_mean": LONG[12:16]},
    "moving_variance overlaps": lambda: {"mask": LONG[:16].view(bool).reshape(16, 4), "moving_variance": LONG[12:16]},
}


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("change", [*UNFIT.values(), *UNFIT_WEIGHTS.values()], ids=[*UNFIT, *UNFIT_WEIGHTS])
def test_what_does_not_plainly_fit_is_left_to_the_checks(direct, change):
    def run():
        LONG[:] = np.arange(100)
        kw = {"x": X.copy(), "training": True, "axis": 1, "momentum": 0.9}
        kw |= {"moving_mean": np.zeros(4, np.float32), "moving_variance": np.ones(4, np.float32), **change()}
        try:
            return np.asarray(fastbn.batch_norm(kw.pop("x"), **kw)).tobytes()
        except (TypeError, ValueError) as error:
            return type(error), str(error)

    outcome = run()
    assert direct.taken == 0
    direct.off()
    assert outcome == run()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_forward_call_never_writes_over_a_residual_that_the_gradient_needs(direct, activation):
    def run():
        w = normal((16, 4), np.float32)
        try:
            y, cache = fastbn.batch_norm_forward(X, training=True, activation=activation, residual=w, out=w)
            return [y.tobytes(), *(g.tobytes() for g in fastbn.batch_norm_backward(X, cache))]
        except ValueError as error:
            return str(error)

    outcome = run()
    assert (activation == "silu") == (outcome == "out must not share memory with residual, got overlapping arrays")
    direct.off()
    assert outcome == run()


@pytest.mark.parametrize("activation", ["tanh", ("leaky_relu", "steep"), 3, np.str_("relu"), np.str_("leaky_relu")])
def test_names_of_activations(direct, activation):
    """Also strings of NumPy's type, which are strings."""

    def run():
        try:
            return fastbn.batch_norm(X, training=True, activation=activation).tobytes()
        except (TypeError, ValueError) as error:
            return type(error), str(error)

    outcome = run()
    assert isinstance(outcome, bytes) == isinstance(activation, np.str_)
    if isinstance(outcome, bytes):
        assert outcome == fastbn.batch_norm(X, training=True, activation=str(activation)).tobytes()
    direct.off()
    assert outcome == run()


@pytest.mark.parametrize(("layout", "shape", "taken"), [("NCHW", (2, 3, 4, 5), 2), ("channels_first", (4, 3), 2)])
def test_named_layouts_go_the_direct_way(direct, layout, shape, taken):
    x = normal(shape, np.float32)
    bn = fastbn.BatchNorm(3, layout=layout)
    y = bn(x, training=True)
    assert fastbn.batch_norm(x, training=True, layout=layout).tobytes() == y.tobytes()
    assert direct.taken == taken
    with pytest.raises(ValueError, match="axis must agree with layout"):
        fastbn.batch_norm(x, training=True, layout=layout, axis=0)
    with pytest.raises(ValueError, match="layout must be one of"):
        fastbn.batch_norm(x, training=True, layout="HWCN")


def test_a_layer_of_a_batch_that_is_its_own_statistics_is_left_to_the_checks(direct):
    bn = fastbn.BatchNorm(4)
    with pytest.raises(ValueError, match="moving_mean must not share memory with x"):
        fastbn.batch_norm_forward(
            bn.moving_mean.reshape(1, 4),
            moving_mean=bn.moving_mean,
            moving_variance=bn.moving_variance,
            training=True,
        )
    assert direct.taken == 0


def weighted(shape, axis, form):
    """Arguments that make values of a batch of that shape count in one form."""
    rng = np.random.default_rng(3)
    at = axis % len(shape)
    short = tuple(n for a, n in enumerate(shape) if a != at)
    kind, place = form.split(" per ")
    extent = {
        "sample": shape[:1],
        "position": short,
        "long position": tuple(1 if a == at else n for a, n in enumerate(shape)),
        "value": shape,
    }[place]
    drawn = rng.uniform(0, 2, extent)
    if kind == "mask":
        return {"mask": drawn > 0.7}
    drawn[drawn < 0.3] = 0
    return {"sample_weight": drawn.astype(kind)}


WEIGHTED_SHAPES = [
    ((32, 16), -1),
    ((5, 3, 7, 7), 1),
    ((4, 9, 5), -1),
    ((6, 2, 33), 0),
    ((40, 5, 3), -1),
    ((8, 3, 4), 1),
]
FORMS = [
    f"{kind} per {place}"
    for kind in ("mask", "float32", "float64")
    for place in ("sample", "position", "long position", "value")
]


def outcome_of_weights(x, axis, arguments):
    """Everything there is to compare of a call on a batch whose values do not count alike."""
    dy = normal(x.shape, x.dtype, seed=2)
    channels = x.shape[axis]
    gamma, beta = parameters(channels, x.dtype)
    moving = [np.full(channels, 0.5, np.float32), np.full(channels, 2.0)]
    kw = {"gamma": gamma, "beta": beta, "training": True, "axis": axis, "momentum": 0.9, "ddof": 1, **arguments}
    kw |= dict(zip(("moving_mean", "moving_variance"), moving))
    y = fastbn.batch_norm(x, **kw)
    y2, cache = fastbn.batch_norm_forward(x, out=np.empty_like(x), **kw)
    z = x.copy()
    fastbn.batch_norm(z, out=z, **kw)
    gradients = fastbn.batch_norm_backward(dy, cache)
    others = fastbn.batch_norm_backward(dy, cache, out=np.empty_like(x))
    weights = cache.weights
    array = np.zeros(1) if weights.array is None else weights.array
    assert weights.checked
    assert weights.array is None or array.shape == x.shape
    assert cache.mode == "train"
    counted = weights.counts(cache.total)
    return [y, y2, z, *moving, *gradients, *others, *cache.statistics, counted, array, np.array(weights.omits)]


def assert_same_outcome(direct, run, taken):
    fast = run()
    assert direct.taken == taken
    direct.off()
    for a, b in zip(fast, run(), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("policy", ["propagate", "omit"])
@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize(("shape", "axis"), WEIGHTED_SHAPES)
def test_bits_of_weights_are_those_of_the_full_way(direct, shape, axis, form, policy, dtype):
    if form is None and policy == "propagate":
        form = "mask per value"
    if form is not None and form.endswith("sample") and axis == 0:
        form = form.replace("sample", "value")
    x = normal(shape, dtype, mean=3, seed=1)
    arguments = {"nan_policy": policy} | ({} if form is None else weighted(shape, axis, form))
    if policy == "omit":
        x[np.random.default_rng(4).random(shape) < 0.2] = np.nan
    elif "mask" in arguments:
        x[~np.broadcast_to(fastbn.weights.spread(arguments["mask"], "mask", shape, (axis % len(shape),)), shape)] = (
            np.inf
        )
    assert_same_outcome(direct, lambda: outcome_of_weights(x, axis, arguments), 5)


@pytest.mark.parametrize("policy", ["propagate", "omit"])
def test_where_nothing_counts_moving_statistics_stay(direct, policy):
    """A channel without a value, and a whole batch without one."""
    x = normal((9, 3), np.float32, mean=3)
    mask = np.ones(x.shape, bool)
    arguments = {"mask": mask, "nan_policy": policy}
    for some in (mask[:, 1], mask):
        some[...] = False
        direct.enabled, direct.taken = True, 0
        assert_same_outcome(direct, lambda: outcome_of_weights(x, 1, arguments), 5)
        results = outcome_of_weights(x, 1, arguments)
        assert results[3][1] == 0.5
        assert results[4][1] == 2
    bn = fastbn.BatchNorm(3)
    bn(x, training=True, mask=mask)
    assert bn.batches == 0


def test_weights_that_sums_cannot_take_are_scaled(direct):
    x = normal((40, 6), np.float32)
    w = np.full(x.shape, 1e30)
    assert_same_outcome(direct, lambda: outcome_of_weights(x, 1, {"sample_weight": w}), 2)  # the gradients


@pytest.mark.parametrize("policy", ["propagate", "omit"])
@pytest.mark.parametrize("form", ["mask per sample", "float32 per value"])
def test_layers_of_weights_take_the_direct_way_and_agree(direct, form, policy):
    x, dy = normal((32, 16), np.float32, seed=1), normal((32, 16), np.float32, seed=2)
    x[3, 4] = np.nan

    def run():
        bn = fastbn.BatchNorm(16, momentum=0.9, nan_policy=policy)
        arguments = weighted(x.shape, 1, form)
        results = [bn(x, training=True, **arguments), bn.backward(dy), bn.grads["gamma"], bn.grads["beta"]]
        assert bn.batches == 1
        z = x.copy()
        bn(z, training=True, out=z, **arguments)
        with pytest.raises(ValueError, match="out must not be x in a forward call whose gradient is taken"):
            bn.backward(dy)
        return [*results, z, bn.moving_mean, bn.moving_variance]

    assert_same_outcome(direct, run, 3)


def test_a_gradient_into_the_weights_is_refused(direct):
    x, w = normal((16, 4), np.float32), np.ones((16, 4), np.float32)
    _, cache = fastbn.batch_norm_forward(x, training=True, sample_weight=w)
    assert direct.taken == 1
    with pytest.raises(ValueError, match="out must not share memory with mask or sample_weight"):
        fastbn.batch_norm_backward(x.copy(), cache, out=w)
    assert direct.taken == 1
