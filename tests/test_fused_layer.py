"""Around act(batch_norm(x) + residual): the life of a layer with an activation, and arguments that do not fit."""

from __future__ import annotations

import copy
import pickle

import cases
import numpy as np
import pytest
import reference as ref
from test_fused import ACTIVATIONS, arrays

from fastbn import BatchNorm, batch_norm, batch_norm_backward, batch_norm_forward, normalize

# -- layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_layer(activation, tmp_path):
    x, residual, dy, _, _ = arrays((8, 5, 6, 7), np.float32, 1)
    bn = BatchNorm(5, axis=1, activation=activation)
    bn.beta[:] = 0.5
    y = bn(x, training=True, residual=residual)
    expected, cache = batch_norm_forward(
        x, gamma=bn.gamma, beta=bn.beta, training=True, axis=1, activation=activation, residual=residual
    )
    ref.assert_same_bits(y, expected)
    dx, dgamma, dbeta, dresidual = batch_norm_backward(dy, cache)
    ref.assert_same_bits(bn.backward(dy), dx)
    assert sorted(bn.grads) == ["beta", "gamma", "residual"]
    for name, gradient in (("gamma", dgamma), ("beta", dbeta), ("residual", dresidual)):
        ref.assert_same_bits(bn.grads[name], gradient)
    inferred = bn(x)
    bn.backward(dy)
    assert sorted(bn.grads) == ["beta", "gamma"]
    bn.save(tmp_path / "bn.npz")
    for other in (
        pickle.loads(pickle.dumps(bn)),
        copy.deepcopy(bn),
        BatchNorm(**bn.get_config()),
        BatchNorm.load(tmp_path / "bn.npz"),
    ):
        assert other.activation == activation
        assert other.get_config() == bn.get_config()
        if not other.built:
            other.load_state_dict(bn.state_dict())
        ref.assert_same_bits(other(x), inferred)
    assert ("activation" in repr(bn)) == (activation is not None)


def test_a_layer_saved_without_an_activation(tmp_path, monkeypatch):
    """As version 0.1.0 did."""
    bn = BatchNorm(3)
    bn(cases.normal((9, 3)), training=True)
    config = {k: v for k, v in bn.get_config().items() if k != "activation"}
    monkeypatch.setattr(bn, "get_config", lambda: config)
    bn.save(tmp_path / "old.npz")
    assert BatchNorm.load(tmp_path / "old.npz").activation is None


def test_a_layer_that_overwrote_what_its_gradient_needs():
    x, residual, dy, _, _ = arrays((30, 6), np.float32, -1)
    bn = BatchNorm(6, activation="relu")
    expected = bn(x, training=True, residual=residual)
    ref.assert_same_bits(bn(x, training=True, residual=residual, out=residual), expected)
    bn.backward(dy)
    bn.activation = "silu"
    bn(x, training=True, residual=residual, out=residual)
    with pytest.raises(ValueError, match="out must not be residual in a forward call whose gradient is taken"):
        bn.backward(dy)


# -- errors ------------------------------------------------------------------------------------------------

CHOICES = r'None, relu, relu6, silu, gelu_tanh, leaky_relu or \("leaky_relu", slope\)'
WRONG = [
    ({"activation": "foo"}, ValueError, rf"activation must be {CHOICES}, got 'foo'"),
    ({"activation": 3}, TypeError, rf"activation must be {CHOICES}, got 3"),
    ({"activation": ["relu"]}, TypeError, r"activation must be .*, got \['relu'\]"),
    ({"activation": ("relu", 1)}, ValueError, r"activation must be .*, got \('relu', 1\)"),
    ({"activation": ("leaky_relu",)}, ValueError, r"activation must be .*, got \('leaky_relu',\)"),
    ({"activation": ("leaky_relu", np.inf)}, ValueError, "slope of leaky_relu must be finite, got inf"),
    ({"activation": ("leaky_relu", np.nan)}, ValueError, "slope of leaky_relu must be finite, got nan"),
    ({"activation": ("leaky_relu", "1")}, TypeError, "slope of leaky_relu must be a real number, got '1'"),
    ({"residual": np.ones((4, 5), np.float32)}, ValueError, r"residual must have shape \(4, 6\), got \(4, 5\)"),
    ({"residual": np.ones(6, np.float32)}, ValueError, r"residual must have shape \(4, 6\), got \(6,\)"),
    ({"residual": np.ones((4, 6))}, TypeError, "residual must have dtype float32, got float64"),
    ({"residual": np.ones((4, 6), int)}, TypeError, "residual must be .*float64, uint8 or int8, got int64"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_errors(wrong, error, message):
    arguments = cases.call() | wrong
    before = cases.snapshot(arguments)
    for function in (batch_norm, batch_norm_forward):
        with pytest.raises(error, match=message):
            function(**arguments)
    with pytest.raises(error, match=message):
        normalize(arguments["x"], np.zeros(6), np.ones(6), **wrong)
    with pytest.raises(error, match=message):
        BatchNorm(6, activation=wrong.get("activation"))(arguments["x"], residual=wrong.get("residual"))
    assert cases.unchanged(before)


def test_the_output_alone_does_not_do():
    """What an activation or a residual hides cannot be found in y."""
    x = cases.normal((4, 6))
    for wrong in ({"activation": "relu"}, {"residual": x}):
        with pytest.raises(ValueError, match="save must be \"input\" with an activation or a residual, got 'output'"):
            batch_norm_forward(x, training=True, save="output", **wrong)


def test_overlap():
    buffer = np.zeros((5, 6), np.float32)
    arguments = cases.call() | {"residual": buffer[1:], "out": buffer[:-1]}
    for function in (batch_norm, batch_norm_forward):
        with pytest.raises(ValueError, match="out must be residual itself or not share memory with it, got a partial"):
            function(**arguments)
    arguments["out"] = arguments["residual"]
    for activation in (None, "relu", "leaky_relu"):
        batch_norm_forward(**arguments, activation=activation)
    for activation in ("silu", "gelu_tanh", ("leaky_relu", -1)):
        with pytest.raises(ValueError, match="out must not share memory with residual"):
            batch_norm_forward(**arguments, activation=activation)
    mean = np.zeros((4, 6), np.float32)
    arguments |= {"moving_mean": mean[0], "residual": mean, "out": None}
    with pytest.raises(ValueError, match="moving_mean must not share memory with residual"):
        batch_norm_forward(**arguments, activation="silu")


def test_overlap_in_the_gradient():
    x, dy = cases.normal((4, 6)), cases.normal((4, 6), seed=1)
    for activation, kept in (("relu", "y"), ("silu", "residual")):
        whole = {"y": np.zeros((5, 6), np.float32), "residual": np.zeros((5, 6), np.float32)}
        options = {"training": True, "activation": activation, "residual": whole["residual"][1:]}
        _, cache = batch_norm_forward(x, out=whole["y"][1:], **options)
        expected = batch_norm_backward(dy, cache)[0]
        with pytest.raises(ValueError, match=f"out must be {kept} itself or not share memory with it"):
            batch_norm_backward(dy, cache, out=whole[kept][:-1])
        ref.assert_same_bits(batch_norm_backward(dy, cache, out=whole[kept][1:])[0], expected)
