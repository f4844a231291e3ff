"""Batch norm of one small image, in all three modes, with the numbers that TensorFlow 1 printed for it.

gamma 2, beta 1, momentum 0.99, epsilon 0.001; channels last. TensorFlow's fused kernel for images divides
the variance that goes into the moving average by m - 1: that is ``ddof=1`` here. The batch itself is
normalized with the variance over m.
"""

import numpy as np

import fastbn

image = np.array([[4, 5, 9, 0], [7, 8, 9, 6], [2, 1, 6, 5], [0, 0, 2, 0]], np.float32).reshape(1, 2, 2, 4)
gamma, beta = np.full(4, 2, np.float32), np.full(4, 1, np.float32)


def first_pixel(**options) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The first output pixel, rounded, and the moving statistics afterwards."""
    mean, variance = np.zeros(4, np.float32), np.ones(4, np.float32)
    y = fastbn.batch_norm(
        image,
        gamma=gamma,
        beta=beta,
        moving_mean=mean,
        moving_variance=variance,
        layout="NHWC",
        ddof=1,
        **options,
    )
    return np.rint(y[0, 0, 0]).astype(int).tolist(), mean, variance


for mode, options, pixel, mean, variance in [
    ("inference", {"training": False}, [9, 11, 19, 1], np.zeros(4), np.ones(4)),
    ("batch", {"training": True, "update": False}, [2, 2, 3, -1], np.zeros(4), np.ones(4)),
    (
        "train",
        {"training": True},
        [2, 2, 3, -1],
        [0.03249997, 0.03499997, 0.06499994, 0.02749997],
        [1.0791667, 1.1266665, 1.0999999, 1.0925],
    ),
]:
    found = first_pixel(**options)
    print(f"{mode:<10} first pixel {found[0]}, moving mean {found[1]}, moving variance {found[2]}")
    assert found[0] == pixel
    np.testing.assert_allclose(found[1], mean, rtol=0, atol=2e-7)
    np.testing.assert_allclose(found[2], variance, rtol=0, atol=3e-7)
