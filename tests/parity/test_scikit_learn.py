"""scikit-learn: moments and normalize do what its StandardScaler does, over batches, weights and back.

The scaler divides by the deviation, without an epsilon, and keeps statistics in float64. It has no gradients.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from parity import frameworks
from parity.configurations import SHAPES, configurations
from parity.tolerances import Step, assert_within

import fastbn

preprocessing = frameworks.load("sklearn.preprocessing", "pip install scikit-learn")


@frameworks.configurations
@given(
    configuration=configurations(shapes=tuple(s for s in SHAPES if len(s) == 2 and s[0] > 2)),
    dtype=st.sampled_from((np.float32, np.float64)),
)
def test_standard_scaler(configuration, dtype):
    c = configuration
    c.axis, c.axes, c.channels = 1, (1,), (c.shape[1],)
    batches = [c.batch(dtype) for _ in range(c.steps)]
    for x in batches:
        x += c.rng.uniform(-1e-3, 1e-3, x.shape)  # no column is constant: the scaler does something else with these
    scaler = preprocessing.StandardScaler()
    moments = fastbn.Moments()
    for x in batches:
        scaler.partial_fit(x)
        moments.update(x)
    whole = np.concatenate(batches)
    exact = Step(whole.astype(np.float64), 1, 0.0)
    # Both merge in float64; the scaler's sums of several batches, and squares about the first batch's mean.
    e_mean = 8 * exact.flat(exact.e_mean)
    e_variance = 8 * exact.flat(exact.g(whole.shape[0] + 8) * ((whole.astype(np.float64) ** 2).mean(0)))
    assert moments.count == scaler.n_samples_seen_
    assert_within(moments.mean, scaler.mean_, e_mean, "mean_")
    assert_within(moments.variance(), scaler.var_, e_variance, "var_")
    assert_within(np.sqrt(moments.variance()), scaler.scale_, e_variance / np.sqrt(scaler.var_), "scale_")

    # Inference from the same numbers, which the scaler rounds to the type of x.
    x = batches[-1]
    statistics = (scaler.mean_.astype(x.dtype), scaler.var_)
    step = Step(x, 1, 0.0, given=statistics)
    assert_within(fastbn.normalize(x, *statistics, epsilon=0.0), scaler.transform(x), step.e_y, "transform")

    # And back: the exact pooled statistics make a scaler that goes on.
    back = preprocessing.StandardScaler()
    back.mean_, back.var_, back.scale_ = moments.mean, moments.variance(), np.sqrt(moments.variance())
    back.n_samples_seen_, back.n_features_in_ = np.int64(moments.count), x.shape[1]
    back.partial_fit(x)
    moments.update(x)
    assert_within(moments.variance(), back.var_, 2 * e_variance, "var_ after another batch")
    frameworks.agreed("scikit-learn: StandardScaler")
