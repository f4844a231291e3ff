"""fastbn.compat.tf_layers: numbers that need no TensorFlow, gradients, and what is refused."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
from graphs import names, run_updates

import fastbn
from fastbn.compat import tf_layers as tf

pytestmark = pytest.mark.usefixtures("graph")

f32 = np.float32

# -- fused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "fused"),
    [
        ((4, 2, 3, 5), {}, True),
        ((4, 2, 3, 5), {"axis": 1}, True),
        ((4, 2, 3, 5), {"axis": -3}, True),
        ((4, 2, 3, 5), {"axis": [3]}, True),
        ((4, 2, 3, 5), {"fused": True}, True),
        ((4, 2, 3, 5), {"fused": False}, False),
        ((4, 2, 3, 5), {"axis": 2}, False),
        ((4, 2, 3, 5), {"axis": 0, "fused": True}, False),
        ((4, 2, 3, 5), {"axis": [1, 3]}, False),
        ((4, 2, 3, 5), {"renorm": True}, False),
        ((4, 2, 3, 5), {"virtual_batch_size": 2}, False),
        ((4, 2, 3, 5), {"adjustment": lambda shape: (1.0, 0.0)}, False),
        ((8, 5), {"fused": True}, False),
        ((4, 2, 5), {}, False),
        ((4, 2, 1, 3, 5), {}, False),
    ],
)
def test_what_takes_the_fused_path(rng, shape, options, fused):
    x = rng.normal(1, 2, shape).astype(f32)
    layer = tf.BatchNormalization(momentum=0.0, epsilon=0.0, **options)
    y = layer(x, training=True)
    assert layer.fused is fused
    run_updates()
    axes = options.get("axis", -1)
    kept = {a % x.ndim for a in (axes if isinstance(axes, list) else [axes])}
    reduced = tuple(a for a in range(x.ndim) if a not in kept)
    if not {"renorm", "virtual_batch_size"} & set(options):
        variance = x.astype(np.float64).var(reduced, ddof=int(fused))
        np.testing.assert_allclose(layer.moving_variance.value.ravel(), variance.ravel(), rtol=1e-5)
    if "virtual_batch_size" not in options and "renorm" not in options:
        biased = x.astype(np.float64).var(reduced, keepdims=True)
        wanted = (x - x.mean(reduced, np.float64, keepdims=True)) / np.sqrt(biased + (1.001e-5 if fused else 0))
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


def test_one_value_per_channel_is_finite():
    layer = tf.BatchNormalization(momentum=0.0)
    y = layer(np.full((1, 1, 1, 3), 7, f32), training=True)
    run_updates()
    assert y.tolist() == [[[[0, 0, 0]]]]
    assert layer.moving_variance.value.tolist() == [0, 0, 0]


def test_an_empty_batch_defers_nothing():
    layer = tf.BatchNormalization()
    assert layer(np.ones((0, 3), f32), training=True).shape == (0, 3)
    assert tf.get_collection("update_ops") == []


# -- features ----------------------------------------------------------------------------------------------


def test_renormalization_in_both_schemes(x):
    """One step by hand: the first batch is corrected by nothing in the scheme of TensorFlow 1."""
    first = tf.BatchNormalization(renorm=True, renorm_momentum=0.9, momentum=0.5)
    y = first(x, training=True)
    plain = fastbn.BatchNorm(3)(x, training=True)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    assert names(first.variables)[4:] == [
        f"batch_normalization/{n}:0"
        for n in ("renorm_mean", "renorm_mean_weight", "renorm_stddev", "renorm_stddev_weight")
    ]
    run_updates()
    mean, sigma = x.mean(0, np.float64), np.sqrt(x.var(0, np.float64) + 1e-3)
    values = {v.op_name.split("/")[1]: v.value for v in first.variables}
    np.testing.assert_allclose(values["renorm_mean"], 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(values["renorm_stddev"], 0.1 * sigma, rtol=1e-6)
    np.testing.assert_allclose([values["renorm_mean_weight"], values["renorm_stddev_weight"]], 0.1, rtol=1e-6)
    np.testing.assert_allclose(values["moving_mean"], 0.5 * mean, rtol=1e-6)
    np.testing.assert_allclose(values["moving_variance"], 0.5 + 0.5 * (sigma**2 - 1e-3), rtol=1e-6)
    tf.set_renorm_scheme("keras")
    second = tf.BatchNormalization(renorm=True, momentum=0.5, renorm_clipping={"rmax": 1.5, "rmin": 0.5, "dmax": 0.5})
    y = second(x, training=True)
    assert names(second.variables)[4:] == [
        f"batch_normalization_1/{n}:0" for n in ("moving_stddev", "renorm_mean", "renorm_stddev")
    ]
    r, d = np.clip(sigma, 0.5, 1.5), np.clip(mean, -0.5, 0.5)
    np.testing.assert_allclose(y, (x - mean) / sigma * r + d, rtol=1e-4, atol=1e-5)


def test_the_halves_of_an_update_are_apart(x):
    layer = tf.BatchNormalization(renorm=True)
    layer(x, training=True)
    mean, variance = layer.updates
    before = [v.eval() for v in layer.variables]
    mean()
    changed = [n for v, b, n in zip(layer.variables, before, names(layer.variables)) if (v.value != b).any()]
    assert [n.split("/")[1] for n in changed] == ["moving_mean:0", "renorm_mean:0", "renorm_mean_weight:0"]
    variance()
    assert sum((v.value != b).any() for v, b in zip(layer.variables, before)) == 6


def test_ghost_batches_are_strided_rows(rng):
    x = rng.normal(0, 1, (6, 2)).astype(f32)
    layer = tf.BatchNormalization(virtual_batch_size=2, momentum=0.0)
    y = layer(x, training=True)
    for g in range(3):
        group = x[g::3].astype(np.float64)
        np.testing.assert_allclose(
            y[g::3], (group - group.mean(0)) / np.sqrt(group.var(0) + 1e-3), rtol=1e-4, atol=1e-5
        )
    run_updates()
    variances = np.mean([x[g::3].astype(np.float64).var(0) for g in range(3)], 0)
    np.testing.assert_allclose(layer.moving_variance.value.ravel(), variances, rtol=1e-5)
    layer(x[:5])  # inference divides nothing


def test_adjustment(x):
    seen = []

    def adjustment(shape):
        seen.append(shape)
        return np.array([2.0, 1.0, 0.5]), np.ones(3)

    layer = tf.BatchNormalization(adjustment=adjustment)
    y = layer(x, training=True)
    plain = fastbn.BatchNorm(3)(x, training=True)
    np.testing.assert_allclose(y, plain * [2, 1, 0.5] + 1, rtol=1e-5, atol=1e-6)
    assert seen == [(8, 3)]
    run_updates()
    layer(x)
    assert seen == [(8, 3)]


def test_regularizers_and_constraints(x):
    layer = tf.BatchNormalization(
        gamma_regularizer=lambda w: 0.5 * (w**2).sum(), beta_regularizer=("l1", 2.0), gamma_constraint="non_neg"
    )
    layer(x, training=True)
    gamma_loss, beta_loss = layer.losses
    assert tf.get_collection(tf.GraphKeys.REGULARIZATION_LOSSES) == layer.losses
    assert gamma_loss.name == "batch_normalization/gamma/Regularizer:0"
    assert (gamma_loss(), float(beta_loss)) == (1.5, 0.0)
    layer.gamma.assign([-1, 2, 3])
    layer.beta.assign([-1, 2, 3])
    assert (gamma_loss(), beta_loss()) == (7.0, 12.0)
    tf.apply_constraints()
    assert layer.gamma.value.tolist() == [0, 2, 3]
    assert layer.beta.value.tolist() == [-1, 2, 3]
    tf.batch_normalization(x, training=True, name="batch_normalization", reuse=True, gamma_regularizer="l2")
    assert len(tf.get_collection("regularization_losses")) == 2  # a variable that exists keeps what it has
    assert repr(gamma_loss) == "<fastbn regularization loss 'batch_normalization/gamma/Regularizer:0'>"


def test_a_regularizer_without_a_penalty(x):
    layer = tf.BatchNormalization(gamma_regularizer=lambda w: None, beta_regularizer=("l1", 0.0))
    layer(x, training=True)
    assert [loss.name for loss in layer.losses] == ["batch_normalization/beta/Regularizer:0"]
    assert tf.get_collection("regularization_losses") == layer.losses


@pytest.mark.parametrize(
    "bounds", [{"rmax": np.inf}, {"dmax": np.inf}, {"rmin": -np.inf}, {"rmin": -1}, {"rmin": -1.0, "rmax": np.inf}]
)
@pytest.mark.parametrize("scheme", ["tf1", "keras"])
def test_bounds_that_bound_nothing(x, bounds, scheme):
    tf.set_renorm_scheme(scheme)
    y = tf.batch_normalization(x, training=True, renorm=True, renorm_clipping=bounds)
    np.testing.assert_array_equal(y, tf.batch_normalization(x, training=True, renorm=True))


# -- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_a_functional_call(rng, x, training):
    dy = rng.normal(0, 1, x.shape).astype(f32)
    bn = fastbn.BatchNorm(3)
    bn(x, training=True)
    bn(x, training=training)
    expected = bn.backward(dy)
    with tf.variable_scope("net"):
        tf.batch_normalization(x, training=True, name="bn")
        run_updates()
        tf.batch_normalization(x, training=training, name="bn", reuse=True)
    layer = tf.get_layer("net/bn")
    np.testing.assert_allclose(layer.backward(dy), expected, rtol=1e-5, atol=1e-6)
    for name in ("gamma", "beta"):
        np.testing.assert_allclose(layer.grads[name], bn.grads[name], rtol=1e-5, atol=1e-5)


def test_gradients_come_for_what_there_is(x):
    layer = tf.BatchNormalization(scale=False)
    with pytest.raises(ValueError, match="backward must follow a call of the layer in the same thread, got none"):
        layer.backward(x)
    layer(x, training=True)
    layer.backward(x)
    assert list(layer.grads) == ["beta"]
    with pytest.raises(ValueError, match=r"dy must have shape \(8, 3\), got \(8,\)"):
        layer.backward(np.ones(8, f32))


def test_an_unknown_layer(x):
    with pytest.raises(ValueError, match="name must be the scope of a layer: there is none, got 'bn'"):
        tf.get_layer("bn")
    tf.batch_normalization(x, training=True)
    with pytest.raises(ValueError, match="name must be the scope of a layer: batch_normalization, got 'bn'"):
        tf.get_layer("bn")


# -- what is refused ---------------------------------------------------------------------------------------

WRONG = [
    ({"axis": 5}, ValueError, "axis must be in -2 to 1 .*, got 5"),
    ({"axis": [1, 1]}, ValueError, r"axis must name each axis once, got \(1, 1\)"),
    ({"axis": 1.0}, TypeError, "axis must be an int or a tuple of ints, got 1.0"),
    ({"axis": [0.5]}, TypeError, r"axis must be an int or a tuple of ints, got \[0.5\]"),
    ({"axis": True}, TypeError, "axis must be an int or a tuple of ints, got True"),
    ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
    ({"momentum": None}, TypeError, "momentum must be a real number, got None"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be finite and at least 0, got -1.0"),
    ({"center": "yes"}, TypeError, "center must be a bool, got 'yes'"),
    ({"scale": None}, TypeError, "scale must be a bool, got None"),
    ({"training": "yes"}, TypeError, "training must be a bool, got 'yes'"),
    ({"trainable": 2}, TypeError, "trainable must be a bool, got 2"),
    ({"fused": "no"}, TypeError, "fused must be a bool, got 'no'"),
    ({"renorm": 3}, TypeError, "renorm must be a bool, got 3"),
    ({"renorm": True, "renorm_clipping": {"max": 1}}, ValueError, "renorm_clipping must have no keys but rmin, rmax"),
    (
        {"renorm": True, "renorm_clipping": {"rmin": np.inf}},
        ValueError,
        "rmin of renorm_clipping must be finite, got inf",
    ),
    (
        {"renorm": True, "renorm_clipping": {"rmax": -np.inf}},
        ValueError,
        "rmax of renorm_clipping must be finite and at ",
    ),
    ({"renorm": True, "renorm_momentum": 2.0}, ValueError, r"renorm_momentum must be in \[0, 1\], got 2.0"),
    ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be at least 1, got 0"),
    ({"virtual_batch_size": 3, "training": True}, ValueError, "virtual_batch_size=3"),
    ({"virtual_batch_size": 2, "axis": 0}, ValueError, "axis must not be that of the samples with virtual_batch_size"),
    ({"virtual_batch_size": 2, "adjustment": lambda s: (1, 0)}, ValueError, "adjustment must be None with virtual_bat"),
    ({"adjustment": 3}, TypeError, "adjustment must be callable or None, got 3"),
    ({"adjustment": lambda s: 3, "training": True}, TypeError, "adjustment must return a tuple of scale and shift"),
    ({"name": "a b"}, ValueError, r"name must hold nothing but letters, .*, got 'a b'"),
    ({"name": "_x"}, ValueError, "must begin with a letter, digit or dot"),
    ({"name": 3}, TypeError, "name.* must be a string, got 3"),
    ({"reuse": "yes"}, ValueError, r"reuse must be None, True, False or \"auto\" \(AUTO_REUSE\), got 'yes'"),
    ({"reuse": 1}, ValueError, r"reuse must be None, True, False or \"auto\" \(AUTO_REUSE\), got 1"),
    ({"gamma_initializer": "two"}, ValueError, "initializer of .*gamma must be callable, or one of zeros"),
    ({"beta_initializer": np.ones(2)}, ValueError, r"initializer of .*beta must have shape \(3,\), got \(2,\)"),
    ({"beta_initializer": 1j}, TypeError, "initializer of .*beta must have a real dtype, got complex128"),
    ({"gamma_regularizer": "l3"}, ValueError, "regularizer of .*gamma must be callable, or one of l1"),
    ({"gamma_constraint": "small"}, ValueError, "constraint of .*gamma must be callable, or one of non_neg"),
    ({"inputs": np.ones((4, 3), int)}, TypeError, "inputs must be float16, .*, got int64"),
    ({"inputs": f32(3)}, ValueError, "must have at least 1 dimension"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[f"{next(iter(w[0]))}-{w[2][:30]}" for w in WRONG])
def test_a_wrong_argument_changes_nothing(x, wrong, error, message):
    with pytest.raises(error, match=message):
        tf.batch_normalization(**{"inputs": x} | wrong)
    assert tf.global_variables() == []
    assert all(not tf.get_collection(key) for key in ("update_ops", "regularization_losses", "trainable_variables"))
    tf.batch_normalization(x, training=True)
    assert names()[0] == "batch_normalization/gamma:0"


def test_a_first_call_that_fails_builds_nothing(x):
    layer = tf.BatchNormalization(virtual_batch_size=3)
    with pytest.raises(ValueError, match="virtual_batch_size"):
        layer(x, training=True)
    assert not layer.built
    assert layer.variables == tf.global_variables() == []
    layer(x[:6], training=True)
    assert layer.scope_name == "batch_normalization"


def test_values_go_on_waiting_where_a_call_fails(x):
    tf.load_variables({"bn/gamma": [1, 2, 3], "bn/beta": [1, 2]})
    with pytest.raises(ValueError, match="loaded bn/beta must have shape"):
        tf.batch_normalization(x, training=True, name="bn")
    assert tf.global_variables() == []
    tf.load_variables({"bn/beta": [4, 5, 6]})
    tf.batch_normalization(x, training=True, name="bn")
    assert [v.value.tolist() for v in tf.trainable_variables()] == [[1, 2, 3], [4, 5, 6]]


def test_later_inputs_must_fit(x, image):
    layer = tf.BatchNormalization()
    layer(x, training=True)
    with pytest.raises(ValueError, match="inputs must have 2 dimensions, as the first ones, got 4"):
        layer(image, training=True)
    with pytest.raises(ValueError, match=r"inputs must have 3 channels, as batch_normalization/gamma, got \(2,\)"):
        layer(x[:, :2], training=True)
    with pytest.raises(ValueError, match=r"batch_normalization/gamma must have shape \(2,\), got \(3,\)"):
        tf.batch_normalization(x[:, :2], training=True, reuse=True)


def test_schemes_of_renormalization():
    with pytest.raises(ValueError, match="scheme must be one of keras, tf1, got 'tf2'"):
        tf.set_renorm_scheme("tf2")


def test_threads_share_variables(x):
    tf.batch_normalization(x, training=True, name="bn", momentum=0.0)
    run_updates()

    def work():
        for _ in range(50):
            tf.batch_normalization(x, training=True, name="bn", reuse=True, momentum=0.0)
            for update in tf.get_collection("update_ops"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    update()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run_updates()
    assert tf.get_collection("update_ops") == []
    np.testing.assert_allclose(tf.global_variables("bn/moving_mean")[0].value, x.mean(0), rtol=1e-5)
