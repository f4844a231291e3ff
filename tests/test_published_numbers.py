"""Numbers that questions and answers about TensorFlow 1 have printed come out of fastbn."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, batch_norm, batch_norm_backward, batch_norm_forward

# -- A: tf.layers.batch_normalization on one 2x2x4 image, momentum 0.99, epsilon 0.001, gamma 2, beta 1 ----

IMAGE = np.array([[4, 5, 9, 0], [7, 8, 9, 6], [2, 1, 6, 5], [0, 0, 2, 0]], np.float32).reshape(1, 2, 2, 4)
MOVED_MEAN = [0.03249997, 0.03499997, 0.06499994, 0.02749997]
MOVED_VARIANCE = [1.0791667, 1.1266665, 1.0999999, 1.0925]

# update=False is TensorFlow 1's training=True, trainable=False: this batch normalizes, nothing is written.
ROWS_A = [
    pytest.param({"training": False}, [9, 11, 19, 1], [0] * 4, [1] * 4, id="inference"),
    pytest.param({"training": True, "update": False}, [2, 2, 3, -1], [0] * 4, [1] * 4, id="batch"),
    pytest.param({"training": True}, [2, 2, 3, -1], MOVED_MEAN, MOVED_VARIANCE, id="train"),
]


@pytest.mark.parametrize(("mode", "pixel", "mean", "variance"), ROWS_A)
def test_three_modes_of_tf_layers(mode, pixel, mean, variance):
    moving_mean, moving_variance = np.zeros(4, np.float32), np.ones(4, np.float32)
    y = batch_norm(
        IMAGE,
        gamma=np.full(4, 2, np.float32),
        beta=np.ones(4, np.float32),
        moving_mean=moving_mean,
        moving_variance=moving_variance,
        layout="NHWC",
        ddof=1,
        **mode,
    )
    assert np.round(y[0, 0, 0]).tolist() == pixel
    # Printed with 7 or 8 digits: half a unit in the last one, and TensorFlow's own float32 rounding.
    np.testing.assert_allclose(moving_mean, mean, rtol=2e-7, atol=6e-8)
    np.testing.assert_allclose(moving_variance, variance, rtol=2e-7, atol=0)


def test_inference_of_a_is_the_formula():
    y = batch_norm(IMAGE, gamma=np.full(4, 2.0), beta=np.ones(4), moving_mean=np.zeros(4), moving_variance=np.ones(4))
    np.testing.assert_allclose(y, IMAGE * 2 / np.sqrt(1.001) + 1, rtol=3e-7)


def test_layer_gives_the_same_rows_by_keras_rule():
    bn = BatchNorm(4, ddof=1)
    bn.gamma[:], bn.beta[:] = 2, 1
    bn.trainable = False  # Keras: a frozen layer is in inference mode, where TensorFlow 1 took the batch
    assert bn.mode(True) == "inference"
    with pytest.warns(fastbn.UntrainedWarning):
        assert np.round(bn(IMAGE, True)[0, 0, 0]).tolist() == [9, 11, 19, 1]
    bn.trainable = True
    assert np.round(bn(IMAGE, True)[0, 0, 0]).tolist() == [2, 2, 3, -1]
    np.testing.assert_allclose(bn.moving_mean, MOVED_MEAN, rtol=2e-7, atol=6e-8)
    np.testing.assert_allclose(bn.moving_variance, MOVED_VARIANCE, rtol=2e-7)


# -- B: dense, batch norm, relu, dense, batch norm; one Adam step, momentum 0.5 ----------------------------


def adam_step(parameter, gradient, learning_rate=0.001, b1=0.9, b2=0.999, epsilon=1e-8):
    """The first step of Adam from zero moments, in TensorFlow's form."""
    m, v = (1 - b1) * gradient, (1 - b2) * gradient**2
    return parameter - learning_rate * np.sqrt(1 - b2) / (1 - b1) * m / (np.sqrt(v) + epsilon)


def test_one_adam_step_of_a_small_network():
    """The output kernel was not printed: any of about 0.1 gives gradients large enough for Adam's epsilon."""
    x, targets = np.array([[0.0], [1.0]]), np.array([[3.0], [4.0]])
    hidden_kernel, output_kernel = np.array([[1.4059724]]), np.array([[0.1]])
    first, second = BatchNorm(1, momentum=0.5, dtype=np.float64), BatchNorm(1, momentum=0.5, dtype=np.float64)

    hidden = x @ hidden_kernel
    normalized = first(hidden, True)
    active = np.maximum(normalized, 0)
    prediction = second(active @ output_kernel, True)
    d_hidden_out = second.backward(2 * (prediction - targets) / 2) @ output_kernel.T
    d_hidden = first.backward(d_hidden_out * (normalized > 0))

    np.testing.assert_allclose(first.moving_mean, 0.3514931, rtol=2e-7)
    np.testing.assert_allclose(first.moving_variance, 0.74709475, rtol=2e-7)
    assert (x.T @ d_hidden).item() > 0
    np.testing.assert_allclose(adam_step(hidden_kernel, x.T @ d_hidden), 1.404974, rtol=4e-7)
    first.gamma[:] = adam_step(first.gamma, first.grads["gamma"])
    first.beta[:] = adam_step(first.beta, first.grads["beta"])
    np.testing.assert_allclose(first.gamma, 0.999, rtol=1e-6)
    np.testing.assert_allclose(first.beta, -0.001, rtol=1e-4)

    y = first(np.array([[0.0], [1.404974]]))
    np.testing.assert_allclose(y.ravel(), [-0.40697935, 1.215785], rtol=5e-7)
    np.testing.assert_allclose(np.maximum(y, 0).ravel(), [0, 1.215785], rtol=5e-7)


# -- C: tf.contrib.layers.batch_norm, decay 0.9, batches of one value --------------------------------------

ROWS_C = [
    ([-1.782, 100.941], [-1.843, 1.388], [-0.2, 99.93], [0.818, 0.589]),
    ([-1.245, 101.126], [-1.156, 1.557], [-0.304, 100.05], [0.736, 0.53]),
    ([-0.107, 99.349], [0.23, -0.961], [-0.285, 99.98], [0.662, 0.477]),
]


@pytest.mark.parametrize("row", [1, 2])
def test_rows_of_contrib_replayed_from_the_row_above(row):
    x, y, mean_after, variance_after = (np.array([v]) for v in ROWS_C[row])
    mean, variance = np.array(ROWS_C[row - 1][2]), np.array(ROWS_C[row - 1][3])
    # The statistics are printed with three digits: half a unit of the last (0.0005, and 0.005 for the second
    # mean) over a deviation of about 0.7 to 0.9 in y.
    result = batch_norm(x, moving_mean=mean, moving_variance=variance)
    assert np.abs(result - y).max() < 0.005 / np.sqrt(0.53) + 0.002
    batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.9)
    assert np.abs(mean - mean_after)[0, 0] < 0.0011
    assert np.abs(mean - mean_after)[0, 1] < 0.011
    np.testing.assert_allclose(variance, variance_after[0], atol=0.0011)  # 0.9 * old + 0.1 * 0


def test_inference_moves_nothing():
    mean, variance = np.array([-0.2, 99.93]), np.array([0.818, 0.589])
    for x, *_ in ROWS_C:
        batch_norm(np.array([x]), moving_mean=mean, moving_variance=variance)
    assert mean.tolist() == [-0.2, 99.93]
    assert variance.tolist() == [0.818, 0.589]


# -- D: NumPy, batchnorm_forward(X, gamma, beta) -----------------------------------------------------------


def test_numpy_forward_with_cache_and_moving_averages(rng):
    x, gamma, beta = rng.normal(2, 3, (50, 6)), rng.uniform(0.5, 2, 6), rng.normal(0, 1, 6)
    moving_mean, moving_variance = np.zeros(6), np.zeros(6)
    expected_mean, expected_variance = np.zeros(6), np.zeros(6)
    for batch in (x, x[:20], x[20:]):
        y, cache = batch_norm_forward(
            batch,
            gamma=gamma,
            beta=beta,
            moving_mean=moving_mean,
            moving_variance=moving_variance,
            training=True,
            momentum=0.9,
            epsilon=1e-8,
        )
        mu, var = batch.mean(0), batch.var(0)
        np.testing.assert_allclose(y, (batch - mu) / np.sqrt(var + 1e-8) * gamma + beta, rtol=1e-12, atol=1e-13)
        expected_mean, expected_variance = 0.9 * expected_mean + 0.1 * mu, 0.9 * expected_variance + 0.1 * var
    np.testing.assert_allclose(moving_mean, expected_mean, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(moving_variance, expected_variance, rtol=1e-13)
    y = batch_norm(x, gamma=gamma, beta=beta, moving_mean=moving_mean, moving_variance=moving_variance, epsilon=1e-8)
    np.testing.assert_allclose(
        y, (x - expected_mean) / np.sqrt(expected_variance + 1e-8) * gamma + beta, rtol=1e-12, atol=1e-13
    )
    dx, dgamma, dbeta = batch_norm_backward(np.ones((30, 6)), cache)
    np.testing.assert_allclose(dbeta, 30)
    np.testing.assert_allclose(dgamma, 0, atol=1e-12)
    assert np.abs(dx).max() < 1e-13


def test_variables_are_listed_in_tensorflow_order():
    bn = BatchNorm(3)
    for variable, expected in zip(bn.variables, (bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance), strict=True):
        assert variable is expected


def test_forgetting_training_normalizes_with_zero_and_one_and_warns(rng):
    x = rng.normal(5, 2, (40, 3)).astype(np.float32)
    bn = BatchNorm(3)
    with pytest.warns(fastbn.UntrainedWarning):
        y = bn(x)
    np.testing.assert_allclose(y, x / np.sqrt(1.001), rtol=3e-7)


# -- the same through the old APIs, names included ---------------------------------------------------------


@pytest.fixture
def tf():
    from fastbn.compat import tf_layers

    tf_layers.reset_default_graph()
    yield tf_layers
    tf_layers.reset_default_graph()


@pytest.mark.parametrize(
    ("training", "trainable", "pixel", "mean", "variance"),
    [
        (False, False, [9, 11, 19, 1], [0] * 4, [1] * 4),
        (True, False, [2, 2, 3, -1], [0] * 4, [1] * 4),
        (True, True, [2, 2, 3, -1], MOVED_MEAN, MOVED_VARIANCE),
    ],
)
def test_a_through_tf_layers(tf, training, trainable, pixel, mean, variance):
    with pytest.warns(fastbn.UntrainedWarning) if not training else contextlib.nullcontext():
        y = tf.batch_normalization(
            IMAGE,
            training=training,
            trainable=trainable,
            gamma_initializer=tf.constant_initializer(2.0),
            beta_initializer=tf.constant_initializer(1.0),
        )
    assert np.round(y[0, 0, 0]).tolist() == pixel
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    assert len(updates) == (2 if trainable else 0)
    for update in updates:
        update()
    found = {v.name: v.value for v in tf.global_variables()}
    assert list(found) == [
        f"batch_normalization/{name}:0" for name in ("gamma", "beta", "moving_mean", "moving_variance")
    ]
    np.testing.assert_allclose(found["batch_normalization/moving_mean:0"], mean, rtol=2e-7, atol=6e-8)
    np.testing.assert_allclose(found["batch_normalization/moving_variance:0"], variance, rtol=2e-7, atol=0)
    assert [v.name for v in tf.trainable_variables()] == (list(found)[:2] if trainable else [])


def test_b_through_tf_layers(tf):
    x, targets = np.array([[0.0], [1.0]], np.float32), np.array([[3.0], [4.0]], np.float32)
    hidden_kernel, output_kernel = np.array([[1.4059724]], np.float32), np.array([[0.13]], np.float32)

    def network(training):
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            normalized = tf.batch_normalization(x @ hidden_kernel, momentum=0.5, training=training)
            active = np.maximum(normalized, 0)
            return normalized, active, tf.batch_normalization(active @ output_kernel, momentum=0.5, training=training)

    normalized, active, prediction = network(True)
    first, second = tf.get_layer("net/batch_normalization"), tf.get_layer("net/batch_normalization_1")
    d_output = second.backward(prediction - targets)
    d_hidden = first.backward((d_output @ output_kernel.T) * (active > 0))
    for update in tf.get_collection("update_ops"):
        update()
    hidden_kernel = adam_step(hidden_kernel, x.T @ d_hidden).astype(np.float32)
    for layer in (first, second):
        layer.gamma.assign(adam_step(layer.gamma.value, layer.grads["gamma"]))
        layer.beta.assign(adam_step(layer.beta.value, layer.grads["beta"]))

    values = {v.name: v.value for v in tf.global_variables("net/batch_normalization/")}
    np.testing.assert_allclose(values["net/batch_normalization/moving_mean:0"], 0.3514931, rtol=2e-7)
    np.testing.assert_allclose(values["net/batch_normalization/moving_variance:0"], 0.74709475, rtol=2e-7)
    np.testing.assert_allclose(values["net/batch_normalization/gamma:0"], 0.999, rtol=1e-6)
    np.testing.assert_allclose(values["net/batch_normalization/beta:0"], -0.001, rtol=1e-4)
    np.testing.assert_allclose(hidden_kernel, 1.404974, rtol=4e-7)
    normalized, active, _ = network(False)
    np.testing.assert_allclose(normalized.ravel(), [-0.40697935, 1.215785], rtol=5e-7)
    np.testing.assert_allclose(active.ravel(), [0, 1.215785], rtol=5e-7)


@pytest.mark.parametrize("row", [1, 2])
def test_c_through_tf_contrib(tf, row):
    """What the asker saw: inference by one tower, while a second one with the same variables went on to update."""
    from fastbn.compat import tf_contrib

    x, y, mean_after, variance_after = (np.array([v]) for v in ROWS_C[row])
    initial = {"moving_mean": np.array(ROWS_C[row - 1][2]), "moving_variance": np.array(ROWS_C[row - 1][3])}

    def tower(is_training):
        return tf_contrib.batch_norm(
            x,
            decay=0.9,
            is_training=is_training,
            updates_collections=None,
            scope="bn",
            reuse=tf.AUTO_REUSE,
            param_initializers=initial,
        )

    result = tower(False)
    assert np.abs(result - y).max() < 0.005 / np.sqrt(0.53) + 0.002
    mean, variance = tf.global_variables("bn/moving")
    assert (mean.name, variance.name) == ("bn/moving_mean:0", "bn/moving_variance:0")
    assert mean.value.tolist() == ROWS_C[row - 1][2]  # the right behaviour: nothing has moved
    tower(True)
    assert np.abs(mean.value - mean_after)[0, 0] < 0.0011
    assert np.abs(mean.value - mean_after)[0, 1] < 0.011
    np.testing.assert_allclose(variance.value, variance_after[0], atol=0.0011)


def test_d_through_tf_layers(tf, rng):
    """The moving statistics by name, the order of the variables, and the mistake of the asker."""
    x = rng.normal(2, 3, (50, 6))
    layer = tf.BatchNormalization(momentum=0.9, epsilon=1e-8)
    with pytest.warns(fastbn.UntrainedWarning):
        np.testing.assert_allclose(layer(x), x, rtol=1e-7)  # by 0 and 1, while the network trains
    for batch in (x, x[:20], x[20:]):
        y = layer(batch, training=True)
        np.testing.assert_allclose(y, (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-8), rtol=1e-10, atol=1e-12)
        for update in tf.get_collection("update_ops"):
            update()
    mean, variance = np.zeros(6), np.ones(6)
    for batch in (x, x[:20], x[20:]):
        mean, variance = 0.9 * mean + 0.1 * batch.mean(0), 0.9 * variance + 0.1 * batch.var(0)
    assert [v.name for v in layer.variables] == [
        f"batch_normalization/{name}:0" for name in ("gamma", "beta", "moving_mean", "moving_variance")
    ]
    with tf.variable_scope("batch_normalization", reuse=True):
        np.testing.assert_allclose(tf.get_variable("moving_mean").value, mean, rtol=1e-12)
        np.testing.assert_allclose(tf.get_variable("moving_variance").value, variance, rtol=1e-12)
