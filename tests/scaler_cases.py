"""Data for the tests of BatchNormScaler, and what they compare."""

from __future__ import annotations

import numpy as np

DTYPES = [np.float32, np.float64]


def table(rng, dtype=np.float64, rows=200):
    x = rng.normal([0, 3, -100, 1e4], [1, 0.1, 5, 1], (rows, 4)).astype(dtype)
    return np.column_stack([x, np.full(rows, 14.62, dtype)])  # a constant column


# What the mean of that table's column at 1e4 deviations may be off, in these, where it is rounded to one float64, as in
# Moments: twice u = 2^-53 of it, and as much again for values that are centered in other ways.
ONE_FLOAT64 = 4 * 2.0**-53 * 1e4


def assert_alike(ours, theirs, rtol=1e-6):
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            # A variance is no more exact than the mean that it is relative to: sqrt(u) of it here.
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13, err_msg=name)
