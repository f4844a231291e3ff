"""Scalers add up, to what one would be that had seen everything, and turn into moments and back."""

from __future__ import annotations

import numpy as np
import pytest
from scaler_cases import ONE_FLOAT64, assert_alike, table

pytest.importorskip("sklearn", minversion="1.6")

import fastbn
from fastbn.sklearn import BatchNormScaler


def test_merging(rng):
    x = table(rng)
    a, b = BatchNormScaler(gamma=2.0).fit(x[:70]), BatchNormScaler().fit(x[70:])
    both = a + b
    assert both.gamma == 2.0
    assert_alike(both, BatchNormScaler().fit(x), rtol=1e-11)
    assert a.n_samples_seen_ == 70
    assert a.merge(b) is a
    np.testing.assert_array_equal(a.var_, both.var_)
    assert a.merge(BatchNormScaler()) is a  # has seen nothing
    assert a.merge(fastbn.Moments()) is a
    assert not hasattr(BatchNormScaler().merge(fastbn.Moments()), "mean_")
    moments = fastbn.moments(x)
    from_moments = BatchNormScaler().merge(moments)
    np.testing.assert_array_equal(from_moments.mean_, moments.mean)
    np.testing.assert_allclose(from_moments.transform(x), BatchNormScaler().fit_transform(x), rtol=0, atol=ONE_FLOAT64)
    near = x[:, :3]
    assert BatchNormScaler().fit(near).to_moments() == fastbn.moments(near)
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError, match="other must be a BatchNormScaler or Moments, got int"):
        a.merge(1)
    with pytest.raises(ValueError, match="other must have 5 features, got 2"):
        a.merge(BatchNormScaler().fit(np.eye(2)))
    with pytest.raises(ValueError, match="other must have at least one feature, got 0"):
        BatchNormScaler().merge(fastbn.Moments(0))


def test_moments_with_counts_of_each_feature(rng):
    """Whatever a scaler has seen goes into moments and back."""
    x, w = table(rng), rng.integers(0, 4, 200).astype(float)
    x[3, 1] = x[5:9, 2] = np.nan
    for options in ({"nan_policy": "omit"}, {"nan_policy": "omit", "sample_weight": w}):
        scaler = BatchNormScaler().fit(x, sample_weight=options.get("sample_weight"))
        moments, wanted = scaler.to_moments(), fastbn.moments(x, **options)
        assert moments.count.dtype == wanted.count.dtype
        np.testing.assert_array_equal(moments.count, wanted.count)
        np.testing.assert_allclose(moments.mean, wanted.mean, rtol=1e-14)
        np.testing.assert_allclose(moments.m2, wanted.m2, rtol=1e-12, atol=1e-20)
        again = BatchNormScaler().merge(moments)
        np.testing.assert_array_equal(again.n_samples_seen_, scaler.n_samples_seen_)
        np.testing.assert_allclose(again.transform(x), scaler.transform(x), rtol=0, atol=ONE_FLOAT64)
    whole = BatchNormScaler().fit(np.eye(3), sample_weight=[1.0, 2.0, 1.0]).to_moments().count
    assert (type(whole), whole) == (float, 4.0)
    assert type(BatchNormScaler().fit(np.eye(3)).to_moments().count) is int
    stream = BatchNormScaler(momentum=0.3).partial_fit(np.eye(3)).partial_fit(np.eye(3))
    assert stream.to_moments().count == 3 * 0.3 + 3


def test_merging_takes_names_over(rng):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rng.normal(size=(5, 2)), columns=["a", "b"])
    merged = BatchNormScaler().merge(BatchNormScaler().fit(frame))
    assert list(merged.feature_names_in_) == ["a", "b"]
    with pytest.raises(ValueError, match=r"other must have the features \['a', 'b'\], got \['b', 'a'\]"):
        merged.merge(BatchNormScaler().fit(frame[["b", "a"]]))


def test_a_map_of_jobs_merges(rng):
    """The recipe for joblib: a scaler per part, then their sum."""
    joblib = pytest.importorskip("joblib")
    x = rng.normal(3, 2, (1000, 4)).astype(np.float32)
    parts = np.array_split(x, 5)
    fitted = joblib.Parallel(n_jobs=2, prefer="threads")(joblib.delayed(BatchNormScaler().fit)(p) for p in parts)
    total = sum(fitted[1:], start=fitted[0])
    assert_alike(total, BatchNormScaler().fit(x), rtol=1e-12)
    jobs = joblib.Parallel(n_jobs=2, prefer="threads")(joblib.delayed(fastbn.moments)(p) for p in parts)
    moments = sum(jobs, start=fastbn.Moments())
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, total.mean_, rtol=1e-14)
