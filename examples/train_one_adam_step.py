"""One training step by hand: dense, batch norm, relu, dense, batch norm, and Adam.

A published question about TensorFlow 1 printed every number of such a step and asked why the moving mean
was not the mean of the batch. This is the same network on fastbn and NumPy; it prints the same numbers and
asserts them.

The moving statistics start at 0 and 1, and with momentum 0.5 one step takes them half of the way to the
batch's.
"""

import numpy as np

from fastbn import BatchNorm

X = np.array([[0], [1]], np.float32)
TARGETS = np.array([[3], [4]], np.float32)
RATE = 0.001

hidden_kernel = np.array([[1.4059724]], np.float32)
# The question did not print the second kernel. Batch norm takes out its scale, so it has no influence on
# anything below but the last digits of the hidden kernel's step; this value gives those that were printed.
output_kernel = np.array([[0.13]], np.float32)

hidden_norm = BatchNorm(1, momentum=0.5, epsilon=0.001)
output_norm = BatchNorm(1, momentum=0.5, epsilon=0.001)


def adam_first_step(parameter: np.ndarray, gradient: np.ndarray) -> None:
    """Adam's first step as TensorFlow 1 takes it: epsilon is added before the root's bias is corrected."""
    first, second = 0.1 * gradient, 0.001 * gradient**2
    parameter -= RATE * np.sqrt(1 - 0.999) / (1 - 0.9) * first / (np.sqrt(second) + 1e-8)


# Forward.
hidden = X @ hidden_kernel
normalized = hidden_norm(hidden, training=True)
active = np.maximum(normalized, 0)
y = output_norm(active @ output_kernel, training=True)

# Backward, from the mean of the squared errors.
dy = output_norm.backward(2 * (y - TARGETS) / len(TARGETS))
d_output_kernel = active.T @ dy
d_hidden = hidden_norm.backward((dy @ output_kernel.T) * (active > 0))
d_hidden_kernel = X.T @ d_hidden

# Adam. Scaling the hidden kernel changes nothing after batch norm, so its gradient is nearly zero: what is
# left of it comes from epsilon, and it is small enough for Adam's own epsilon to show in the step (0.000998
# instead of 0.001).
adam_first_step(hidden_kernel, d_hidden_kernel)
adam_first_step(output_kernel, d_output_kernel)
for norm in (hidden_norm, output_norm):
    adam_first_step(norm.gamma, norm.grads["gamma"])
    adam_first_step(norm.beta, norm.grads["beta"])

# Inference, with the moving statistics.
inferred = hidden_norm(X @ hidden_kernel)

PUBLISHED = {
    "batch mean": (hidden.mean(), 0.7029862),
    "batch variance": (hidden.var(), 0.4941895),
    "moving mean": (hidden_norm.moving_mean[0], 0.3514931),
    "moving variance": (hidden_norm.moving_variance[0], 0.74709475),
    "hidden kernel": (hidden_kernel[0, 0], 1.404974),
    "gamma": (hidden_norm.gamma[0], 0.999),
    "beta": (hidden_norm.beta[0], -0.001),
    "inference of 0": (inferred[0, 0], -0.40697935),
    "inference of 1": (inferred[1, 0], 1.215785),
    "relu of the first": (max(inferred[0, 0], 0), 0.0),
}

print(f"{'':<18} {'fastbn':>12} {'published':>12}")
for name, (value, published) in PUBLISHED.items():
    print(f"{name:<18} {value:>12.8g} {published:>12.8g}")
    assert abs(value - published) < 1e-6, name
