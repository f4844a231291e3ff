"""Code of TensorFlow 1 on NumPy arrays: the same calls, the same variables, the same numbers.

Four published questions about batch norm in TensorFlow 1, with the numbers that were printed there: the three flags of
``tf.layers``, a network after one step of Adam, ``tf.contrib.layers`` whose statistics moved at test time, and the
names of the moving statistics.
"""

import warnings

import numpy as np

from fastbn.compat import tf_contrib
from fastbn.compat import tf_layers as tf


def run_updates() -> None:
    """What ``with tf.control_dependencies(update_ops)`` did: here the updates are called, after each training step."""
    for update in tf.get_collection(tf.GraphKeys.UPDATE_OPS):
        update()


# Inference before training is part of the questions; fastbn warns about it.
warnings.simplefilter("ignore")

print("1. tf.layers.batch_normalization, gamma 2, beta 1, one image of 2 x 2 pixels")
image = np.array([[4, 5, 9, 0], [7, 8, 9, 6], [2, 1, 6, 5], [0, 0, 2, 0]], np.float32).reshape(1, 2, 2, 4)
PUBLISHED = {
    (False, False): ([9, 11, 19, 1], [0, 0, 0, 0], [1, 1, 1, 1]),
    (True, False): ([2, 2, 3, -1], [0, 0, 0, 0], [1, 1, 1, 1]),
    (True, True): (
        [2, 2, 3, -1],
        [0.03249997, 0.03499997, 0.06499994, 0.02749997],
        [1.0791667, 1.1266665, 1.0999999, 1.0925],
    ),
}
for (training, trainable), (pixel, mean, variance) in PUBLISHED.items():
    tf.reset_default_graph()
    y = tf.batch_normalization(
        image,
        training=training,
        trainable=trainable,
        gamma_initializer=tf.constant_initializer(2.0),
        beta_initializer=tf.ones_initializer(),
    )
    run_updates()
    _, _, moving_mean, moving_variance = tf.global_variables()
    print(f"   training={training}, trainable={trainable}: first pixel {np.round(y[0, 0, 0])}")
    print(f"   {moving_mean.name} {moving_mean.value}, {moving_variance.name} {moving_variance.value}")
    assert np.round(y[0, 0, 0]).tolist() == pixel
    np.testing.assert_allclose(moving_mean.value, mean, rtol=2e-7, atol=6e-8)
    np.testing.assert_allclose(moving_variance.value, variance, rtol=2e-7)

print("2. dense, batch norm, relu, dense, batch norm: one step of Adam")
tf.reset_default_graph()
X, TARGETS = np.array([[0], [1]], np.float32), np.array([[3], [4]], np.float32)
kernels = [np.array([[1.4059724]], np.float32), np.array([[0.13]], np.float32)]


def network(training: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The function that built the graph. A scope that is entered again numbers its layers from the start."""
    with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
        normalized = tf.batch_normalization(X @ kernels[0], momentum=0.5, training=training)
        active = np.maximum(normalized, 0)
        return normalized, active, tf.batch_normalization(active @ kernels[1], momentum=0.5, training=training)


def adam_first_step(parameter: np.ndarray, gradient: np.ndarray) -> None:
    """Adam's first step as TensorFlow 1 takes it."""
    first, second = 0.1 * gradient, 0.001 * gradient**2
    parameter -= 0.001 * np.sqrt(1 - 0.999) / (1 - 0.9) * first / (np.sqrt(second) + 1e-8)


_, active, y = network(training=True)
layers = [tf.get_layer(f"net/{name}") for name in ("batch_normalization", "batch_normalization_1")]
d_active = layers[1].backward(y - TARGETS) @ kernels[1].T
d_hidden = layers[0].backward(d_active * (active > 0))
adam_first_step(kernels[0], X.T @ d_hidden)
for layer in layers:
    adam_first_step(layer.gamma.value, layer.grads["gamma"])
    adam_first_step(layer.beta.value, layer.grads["beta"])
run_updates()
inferred, _, _ = network(training=False)
numbers = {v.name: v.value[0] for v in tf.global_variables("net/batch_normalization/")}
numbers |= {"hidden kernel": kernels[0][0, 0], "inference of 0": inferred[0, 0], "inference of 1": inferred[1, 0]}
for (name, value), published in zip(
    numbers.items(), (0.999, -0.001, 0.3514931, 0.74709475, 1.404974, -0.40697935, 1.215785), strict=True
):
    print(f"   {name:<42} {value:>12.8g}   published {published:.8g}")
    assert abs(value - published) < 1e-6

print("3. tf.contrib.layers.batch_norm, updates in place, is_training from call to call")
tf.reset_default_graph()
state = {"moving_mean": np.array([-0.2, 99.93]), "moving_variance": np.array([0.818, 0.589])}
rows = [([-1.245, 101.126], [-0.304, 100.05], [0.736, 0.53]), ([-0.107, 99.349], [-0.285, 99.98], [0.662, 0.477])]
for row, mean, variance in rows:
    for is_training in (False, True):
        y = tf_contrib.batch_norm(
            np.array([row]),
            decay=0.9,
            is_training=is_training,
            updates_collections=None,
            scope="bn",
            reuse=tf.AUTO_REUSE,
            param_initializers=state,
        )
        moving_mean, moving_variance = (v.value for v in tf.global_variables("bn/moving"))
        print(f"   is_training={is_training!s:<5} y {y[0]}, mean {moving_mean}, variance {moving_variance}")
    np.testing.assert_allclose(moving_mean, mean, atol=0.02)  # three digits were printed
    np.testing.assert_allclose(moving_variance, variance, atol=0.002)

print("4. the moving statistics by name")
tf.reset_default_graph()
layer = tf.BatchNormalization(momentum=0.9)
layer(np.random.default_rng(0).normal(3, 2, (100, 3)), training=True)
run_updates()
for variable in layer.variables:
    print(f"   {variable.name:<38} {variable.value}")
assert [v.name.split("/")[1] for v in layer.variables] == ["gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"]
