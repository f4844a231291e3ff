"""BatchNormScaler on sparse matrices: what it computes of dense ones, zeros included."""

from __future__ import annotations

import numpy as np
import pytest
from scaler_cases import DTYPES

pytest.importorskip("sklearn", minversion="1.6")

from scipy import sparse

from fastbn.sklearn import BatchNormScaler


@pytest.mark.parametrize("container", [sparse.csr_array, sparse.csc_array, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse(dtype, weights, container, rng):
    dense = np.where(rng.random((300, 5)) < 0.3, rng.normal(2, 1, (300, 5)), 0).astype(dtype)
    dense[0, 1] = dense[7, 3] = np.nan
    x, w = container(dense), rng.uniform(0, 2, 300) if weights else None
    scaler = BatchNormScaler(with_mean=False)
    for rows in (slice(0, 100), slice(100, 300)):
        scaler.partial_fit(x[rows], sample_weight=None if w is None else w[rows])
    plain = BatchNormScaler(with_mean=False).fit(dense, sample_weight=w)
    np.testing.assert_allclose(scaler.mean_, plain.mean_, rtol=1e-12)
    np.testing.assert_allclose(scaler.var_, plain.var_, rtol=1e-11)
    np.testing.assert_allclose(scaler.n_samples_seen_, plain.n_samples_seen_)
    before = x.copy()
    y = scaler.transform(x)
    assert y.format == x.format
    assert y.dtype == dtype
    np.testing.assert_allclose(y.toarray(), plain.transform(dense), rtol=1e-5)
    np.testing.assert_allclose(scaler.inverse_transform(y).toarray(), dense, rtol=1e-5)
    np.testing.assert_array_equal(x.toarray(), before.toarray())


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("holes", [False, True])
def test_sparse_in_blocks(holes, weights, form, rng, monkeypatch):
    """Blocks may begin and end within a row or column; rows and columns may be empty, and so may everything."""
    import fastbn.running

    monkeypatch.setattr(fastbn.running, "BLOCK", 7)
    dense = np.where(rng.random((41, 5)) < 0.3, rng.normal(1e3, 1, (41, 5)), 0)
    dense[[0, 3, 40]] = dense[:, 2] = 0
    if holes:
        dense[5, 1] = dense[6, 3] = dense[7, 4] = np.nan
    w = rng.integers(0, 3, 41).astype(float) if weights else None
    for x in (dense, dense * 0 if not holes else np.full((4, 5), np.nan)):
        given = None if w is None else w[: len(x)] + 1
        got = fastbn.running.of_sparse(sparse.csr_array(x).asformat(form), given)
        wanted = fastbn.moments(x, sample_weight=given, nan_policy="omit")
        np.testing.assert_allclose(got.count, np.broadcast_to(wanted.count, 5), rtol=1e-15)
        np.testing.assert_allclose(got.mean + got.low, wanted.mean, rtol=1e-14)
        np.testing.assert_allclose(got.m2, wanted.m2, rtol=1e-12)


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("holes", [False, True])
def test_sparse_columns_without_zeros_far_from_zero(holes, form, rng):
    """What is left of two sums of weights that are the same but for their rounding is no weight of zeros."""
    x, w = rng.normal(1e6, 1, (300, 4)), rng.uniform(size=300)
    w[::7] = 0
    if holes:
        x[rng.random(x.shape) < 0.1] = np.nan
    x[::7] = 0  # without weight
    scaler = BatchNormScaler(with_mean=False).fit(sparse.csr_array(x).asformat(form), sample_weight=w)
    plain = BatchNormScaler().fit(x, sample_weight=w)
    np.testing.assert_allclose(scaler.mean_, plain.mean_, rtol=1e-15)
    np.testing.assert_allclose(scaler.var_, plain.var_, rtol=1e-12)


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("weights", [False, True])
def test_sparse_values_stored_in_parts(weights, form, rng):
    """Entries of one place are one value, their sum; the matrix stays as it is."""
    row, column, part = rng.integers(0, 9, 200), rng.integers(0, 4, 200), rng.normal(size=200)
    x = sparse.coo_array((part, (row, column)), shape=(9, 4))
    w = rng.uniform(size=9) if weights else None
    dense = x.toarray()
    order = np.argsort(row if form == "csr" else column, kind="stable")
    starts = np.searchsorted((row if form == "csr" else column)[order], np.arange(10 if form == "csr" else 5))
    container = sparse.csr_array if form == "csr" else sparse.csc_array
    x = container((part[order], (column if form == "csr" else row)[order], starts), shape=(9, 4))
    assert x.nnz == 200
    x.data, x.indices = np.append(x.data, np.inf), np.append(x.indices, 0)  # room that is not used
    scaler = BatchNormScaler(with_mean=False).fit(x, sample_weight=w)
    plain = BatchNormScaler().fit(dense, sample_weight=w)
    np.testing.assert_allclose(scaler.mean_, plain.mean_, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(scaler.var_, plain.var_, rtol=1e-12)
    np.testing.assert_allclose(scaler.transform(x).toarray(), dense / scaler.scale_, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(x.data[:200], part[order])


@pytest.mark.parametrize("container", [sparse.csr_array, sparse.csc_array])
def test_sparse_in_place(container, rng):
    x = container(np.where(rng.random((30, 4)) < 0.5, rng.normal(2, 1, (30, 4)), 0))
    scaler = BatchNormScaler(with_mean=False, copy=False).fit(x)
    wanted = scaler.transform(x, copy=True)
    data = x.data
    assert scaler.transform(x).data is data
    np.testing.assert_array_equal(data, wanted.data)


def test_sparse_is_not_centered(rng):
    x = sparse.csr_array(np.eye(4))
    with pytest.raises(ValueError, match="Cannot center sparse matrices: pass `with_mean=False`"):
        BatchNormScaler().fit(x)
    fitted = BatchNormScaler().fit(np.eye(4))
    for call in (fitted.transform, fitted.inverse_transform):
        with pytest.raises(ValueError, match="Cannot center sparse matrices"):
            call(x)
    with pytest.raises(ValueError, match=r"beta must be None or 0 for sparse data, got 1\.0"):
        BatchNormScaler(with_mean=False, beta=1.0).fit(x)
    scaled = BatchNormScaler(with_mean=False, gamma=2.0).fit(x)
    np.testing.assert_allclose(scaled.transform(x).toarray(), 2 * np.eye(4) / scaled.scale_)
