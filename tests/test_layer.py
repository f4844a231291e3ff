"""BatchNorm: parameters, state, modes; copies, files, and threads that share a layer."""

from __future__ import annotations

import copy
import pickle
import warnings

import cases
import numpy as np
import pytest
import reference as ref

import fastbn
from fastbn import BatchNorm, batch_norm, batch_norm_backward, batch_norm_forward

C = 5
STATE = ("gamma", "beta", "moving_mean", "moving_variance")


@pytest.fixture
def x():
    return cases.normal((40, C), mean=2, deviation=3)


@pytest.fixture
def bn(x):
    """A layer with parameters and statistics that are not the initial ones."""
    layer = BatchNorm(C, momentum=0.75)
    layer.gamma[:], layer.beta[:] = cases.parameters(C)
    layer(x, True)
    return layer


def same_state(a, b) -> None:
    for name in STATE:
        ref.assert_same_bits(getattr(a, name), getattr(b, name), name)


# -- construction ------------------------------------------------------------------------------------------


def test_initial_values():
    bn = BatchNorm(C)
    assert bn.built
    assert [v.tolist() for v in bn.variables] == [[1] * C, [0] * C, [0] * C, [1] * C]
    assert {v.dtype for v in bn.variables} == {np.dtype(np.float32)}
    assert bn.grads == {}


def test_it_builds_itself_at_the_first_call(x):
    bn = BatchNorm()
    assert not bn.built
    y = bn(x, True)
    assert bn.built
    assert bn.gamma.shape == (C,)
    ref.assert_same_bits(y, BatchNorm(C)(x, True))
    with pytest.raises(ValueError, match=str(C)):
        bn(cases.normal((4, C + 1)), True)


def test_build_by_hand():
    bn = BatchNorm(axis=1)
    bn.build(3)
    assert bn.built
    assert bn.moving_mean.shape == (3,)


@pytest.mark.parametrize(("x_dtype", "dtype", "expected"), [
    (np.float32, None, np.float32),
    (np.float64, None, np.float64),
    (np.float32, np.float64, np.float64),
    (np.float64, np.float32, np.float32),
    (np.float32, "float64", np.float64),
])  # fmt: skip
def test_dtype(x_dtype, dtype, expected):
    bn = BatchNorm(dtype=dtype)
    y = bn(cases.normal((10, 3), x_dtype), True)
    assert y.dtype == x_dtype
    assert {v.dtype for v in bn.variables} == {np.dtype(expected)}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_center_and_scale(center, scale, x):
    bn = BatchNorm(C, center=center, scale=scale)
    assert (bn.beta is not None) is center
    assert (bn.gamma is not None) is scale
    assert len(bn.variables) == 2 + center + scale
    expected = [v for v in (bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance) if v is not None]
    assert all(a is b for a, b in zip(bn.variables, expected, strict=True))
    ref.assert_same_bits(bn(x, True), batch_norm(x, training=True))
    bn.backward(x)
    assert set(bn.grads) == {name for name, there in (("gamma", scale), ("beta", center)) if there}


def test_variables_are_the_arrays_themselves(bn, x):
    kept = bn.variables
    bn.variables[0][:] = 2
    assert (bn.gamma == 2).all()
    bn(x, True)
    bn.load_state_dict(bn.state_dict())
    assert all(a is b for a, b in zip(kept, bn.variables, strict=True))


# -- modes -------------------------------------------------------------------------------------------------

MODES = [
    (True, True, "train"),
    (True, False, "inference"),
    (True, None, "inference"),
    (False, True, "inference"),  # Keras: a frozen layer uses its moving statistics
    (False, False, "inference"),
    (False, None, "inference"),
]


@pytest.mark.parametrize(("trainable", "training", "mode"), MODES)
def test_modes(bn, x, trainable, training, mode):
    bn.trainable = trainable
    assert bn.mode(training) == mode
    before = bn.state_dict()
    y = bn(x, training)
    parameters = {"gamma": before["gamma"], "beta": before["beta"]}
    moving = {"moving_mean": before["moving_mean"], "moving_variance": before["moving_variance"]}
    _, cache = batch_norm_forward(x, training=mode == "train", momentum=0.75, **parameters, **moving)
    ref.assert_same_bits(y, batch_norm(x, training=mode == "train", update=False, **parameters, **moving_of(before)))
    ref.assert_same_bits(bn.moving_mean, moving["moving_mean"])
    ref.assert_same_bits(bn.moving_variance, moving["moving_variance"])
    dy = cases.normal(x.shape, seed=1)
    dx = bn.backward(dy)
    expected = batch_norm_backward(dy, cache)
    for name, a, b in zip(("dx", "gamma", "beta"), (dx, bn.grads["gamma"], bn.grads["beta"]), expected, strict=True):
        ref.assert_same_bits(a, b, name)


def moving_of(state):
    return {name: state[name].copy() for name in STATE[2:]}


@pytest.mark.parametrize("value", ["no", None, 2])
def test_trainable_must_be_a_bool(bn, value, x):
    with pytest.raises(TypeError, match="trainable"):
        bn.trainable = value
    with pytest.raises(TypeError, match="training"):
        bn(x, value if value is not None else "yes")


def test_training_defaults_to_inference(bn, x):
    ref.assert_same_bits(bn(x), bn(x, False))
    ref.assert_same_bits(bn(x, training=True), bn(x, True))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("trained", [np.float32, np.float64])
def test_moving_statistics_of_several_batches(ddof, trained):
    bn = BatchNorm(3, momentum=0.9, ddof=ddof, dtype=trained)
    mean, variance = np.zeros(3), np.ones(3)
    for seed in range(10):
        x = cases.normal((7 + seed, 3), trained, mean=seed, seed=seed)
        bn(x, True)
        mean = 0.9 * mean + 0.1 * x.mean(0, np.float64)
        variance = 0.9 * variance + 0.1 * x.var(0, np.float64, ddof=ddof)
    rtol = 20 * ref.unit(trained) + 1e-7 * (trained == np.float32)
    np.testing.assert_allclose(bn.moving_mean, mean, rtol=rtol)
    np.testing.assert_allclose(bn.moving_variance, variance, rtol=rtol)


def test_out(bn, x):
    out = np.empty_like(x)
    expected = bn(x)
    assert bn(x, out=out) is out
    ref.assert_same_bits(out, expected)
    dx = np.empty_like(x)
    bn(x, True)
    assert bn.backward(x, out=dx) is dx


def test_backward_needs_a_forward():
    with pytest.raises((RuntimeError, ValueError), match=r"backward"):
        BatchNorm(C).backward(np.ones((4, C), np.float32))


# -- the warning -------------------------------------------------------------------------------------------


def test_untrained_warning_comes_once(x):
    bn = BatchNorm(C)
    with pytest.warns(fastbn.UntrainedWarning, match="moving"):
        bn(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn(x)
        other = BatchNorm(C)
        other(x, True)
        other(x)
    with pytest.warns(fastbn.UntrainedWarning):
        BatchNorm(C)(x)  # once per layer, not per process


def test_no_warning_for_loaded_statistics(bn, x, tmp_path):
    bn.save(tmp_path / "bn.npz")
    loaded = BatchNorm(C)
    loaded.load_state_dict(bn.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in (
            loaded,
            BatchNorm.load(tmp_path / "bn.npz"),
            pickle.loads(pickle.dumps(bn)),
            copy.copy(bn),
        ):
            layer(x)


def test_an_empty_batch_trains_nothing(x):
    bn = BatchNorm(C)
    bn(x[:0], True)
    with pytest.warns(fastbn.UntrainedWarning):
        bn(x)


def test_a_warning_raised_as_an_error_leaves_the_layer_usable(x):
    bn = BatchNorm(C)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(fastbn.UntrainedWarning):
            bn(x)
    bn(x, True)
    bn(x)


# -- copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [
    copy.copy, copy.deepcopy, *(lambda b, p=p: pickle.loads(pickle.dumps(b, p)) for p in range(2, 6))
])  # fmt: skip
def test_copies_and_pickles(clone, bn, x):
    bn.trainable = False
    twin = clone(bn)
    same_state(twin, bn)
    assert repr(twin) == repr(bn)
    assert twin.trainable is False
    twin.trainable = True
    ref.assert_same_bits(twin(x), bn(x))
    if clone is not copy.copy:
        before = bn.state_dict()
        twin(x, True)
        for name in STATE:
            ref.assert_same_bits(getattr(bn, name), before[name])


def test_an_unbuilt_layer_can_be_copied(x):
    twin = pickle.loads(pickle.dumps(BatchNorm(momentum=0.5, name="first")))
    assert not twin.built
    ref.assert_same_bits(twin(x, True), BatchNorm(momentum=0.5)(x, True))


def test_repr(bn):
    text = repr(BatchNorm(C, momentum=0.5, layout="NHWC", name="stem"))
    assert text.startswith("BatchNorm(")
    for part in (str(C), "momentum=0.5", "NHWC", "stem"):
        assert part in text
    assert "BatchNorm(" in repr(BatchNorm())


# -- state -------------------------------------------------------------------------------------------------


def test_state_dict_is_a_copy(bn, x):
    state = bn.state_dict()
    assert [name for name in state if name in STATE] == list(STATE)
    assert state["batches"] == 1
    before = {name: state[name].copy() for name in STATE}
    bn(x, True)
    for name in STATE:
        ref.assert_same_bits(state[name], before[name])
    state["gamma"][:] = 99
    assert (bn.gamma != 99).all()
    assert bn.state_dict()["batches"] == 2


def test_load_state_dict_restores(bn, x):
    state = bn.state_dict()
    expected = bn(x)
    bn(x * 3, True)
    bn.load_state_dict(state)
    ref.assert_same_bits(bn(x), expected)
    lazy = BatchNorm(momentum=0.75)
    lazy.load_state_dict(state)
    ref.assert_same_bits(lazy(x), expected)
    state["moving_mean"][:] = 77  # the layer keeps no reference to what it was given
    ref.assert_same_bits(lazy(x), expected)


def bad_states():
    yield "missing", lambda s: s.pop("moving_variance")
    yield "unknown", lambda s: s.update(running_mean=np.zeros(C))
    yield "short", lambda s: s.update(moving_variance=np.ones(C - 1))
    yield "2-d", lambda s: s.update(beta=np.ones((1, C)))
    yield "0-d", lambda s: s.update(moving_mean=np.float32(1))
    yield "complex", lambda s: s.update(moving_variance=np.ones(C, complex))
    yield "object", lambda s: s.update(gamma=np.array([None] * C))
    yield "negative variance", lambda s: s.update(moving_variance=np.array([1, 1, -1, 1, 1.0]))
    yield "batches", lambda s: s.update(batches=-1)
    yield "batches type", lambda s: s.update(batches="many")
    yield "None", lambda s: s.update(gamma=None)


@pytest.mark.parametrize(("kind", "spoil"), list(bad_states()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_state_changes_nothing(kind, spoil, bn):
    state = {name: value * 2 for name, value in bn.state_dict().items()}  # good, but different
    spoil(state)
    before = bn.state_dict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        bn.load_state_dict(state)
    after = bn.state_dict()
    for name in STATE:
        ref.assert_same_bits(after[name], before[name], name)
    assert after["batches"] == before["batches"]


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}, {"dtype": np.float64}], ids=str)
def test_save_and_load(options, tmp_path, x):
    bn = BatchNorm(C, momentum=0.9, epsilon=1e-5, ddof=1, name="stem", **options)
    bn(x, True)
    bn.trainable = False
    bn.save(tmp_path / "bn.npz")
    twin = BatchNorm.load(tmp_path / "bn.npz")
    assert repr(twin) == repr(bn)
    assert twin.trainable is False
    for a, b in zip(twin.variables, bn.variables, strict=True):
        ref.assert_same_bits(a, b)
    ref.assert_same_bits(twin(x), bn(x))
    assert [p.name for p in tmp_path.iterdir()] == ["bn.npz"]


# -- errors ------------------------------------------------------------------------------------------------


def test_a_call_that_raises_changes_nothing(bn, x):
    before = bn.state_dict()
    for bad in (x[:, :-1], x.astype(int), x.astype(complex), np.float32(1)):
        with pytest.raises((TypeError, ValueError)):
            bn(bad, True)
    with pytest.raises(ValueError, match="out"):
        bn(x, True, out=np.empty((3, 3), np.float32))
    with pytest.raises((TypeError, ValueError)):
        bn.backward(x[:-1])
    after = bn.state_dict()
    for name in STATE:
        ref.assert_same_bits(after[name], before[name], name)
    assert after["batches"] == before["batches"]


@pytest.mark.parametrize("bad", [np.ones((4, C), int), np.ones(()), np.ones((4, C), complex)], ids=str)
def test_a_failed_first_call_does_not_build(bad, x):
    bn = BatchNorm()
    with pytest.raises((TypeError, ValueError)):
        bn(bad, True)
    assert not bn.built
    bn(x, True)


# -- what no array tells -------------------------------------------------------------------------------------

BARE = {"center": False, "scale": False}
MORE_THAN_A_PASS = [
    {"virtual_batch_size": 2},
    {"on_nonfinite": "skip"},
    {"on_nonfinite": "raise"},
    {"zero_debias": True},
    {"renorm": True},
    {"track": False},
]


@pytest.mark.parametrize("options", MORE_THAN_A_PASS, ids=str)
@pytest.mark.parametrize(("built", "shape"), [(3, (4, 5)), (1, (4, 5)), ((2, 3), (4, 3, 2))])
def test_other_channels_than_those_of_a_layer_without_parameters(options, built, shape):
    axis = tuple(range(1, len(shape)))
    layer = BatchNorm(built, axis=axis if len(axis) > 1 else 1, **BARE, **options)
    x, out = np.ones(shape, np.float32), np.full(shape, 7, np.float32)
    with pytest.raises(ValueError, match=r"x must have .* channels, got"):
        layer(x, True, out=out)
    assert (out == 7).all()
    with pytest.raises(ValueError, match=r"x must have .* channels, got"):
        fastbn.recompute_statistics(BatchNorm(built, axis=layer.axis, **BARE), [x], forward=lambda b: layer(b, True))


def test_a_layer_without_arrays_remembers_its_channels(tmp_path):
    layer = BatchNorm((2, 3), axis=(1, 2), track=False, **BARE)
    layer.save(tmp_path / "layer.npz")
    loaded = BatchNorm.load(tmp_path / "layer.npz")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert other.built
        assert repr(other) == repr(layer)
        with pytest.raises(ValueError, match=r"x must have \(2, 3\) channels, got \(3, 2\)"):
            other(np.ones((4, 3, 2)), True)
    loaded.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "layer.npz").read_bytes()


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_statistics_that_could_not_be_loaded_are_not_saved(bn, name, tmp_path):
    bn.save(tmp_path / "layer.npz")
    before = (tmp_path / "layer.npz").read_bytes()
    getattr(bn, name)[1] = np.nan
    with pytest.raises(ValueError, match=f"{name} must be finite in a layer that is saved, got NaN or infinity"):
        bn.save(tmp_path / "layer.npz")
    assert (tmp_path / "layer.npz").read_bytes() == before


class Labelled(np.ndarray):
    """An array of a class of its own."""


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 20}, {"zero_debias": True}], ids=str)
def test_what_is_returned_is_out_itself(x, options):
    layer = BatchNorm(C, **options)
    for training in (True, False):
        out, dx = (np.empty_like(x).view(Labelled) for _ in range(2))
        assert layer(x, training, out=out) is out
        assert layer.backward(x, out=dx) is dx
    ref.assert_same_bits(np.asarray(out), layer(x))
