"""BatchNormScaler on Dask arrays and data frames: what the plain scaler computes of all of it."""

from __future__ import annotations

import numpy as np
import pytest

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
pytest.importorskip("sklearn", minversion="1.6")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import fastbn.sklearn  # noqa: E402
from fastbn.dask import BatchNormScaler  # noqa: E402

Plain = fastbn.sklearn.BatchNormScaler


@pytest.fixture(autouse=True)
def synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def assert_alike(a, b, rtol=1e-12):
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-18, err_msg=name)


@given(st.integers(1, 50), st.lists(st.integers(0, 50), max_size=12), st.booleans(), st.booleans())
def test_any_chunks(rows, cuts, weighted, missing):
    rng = np.random.default_rng(rows)
    x = rng.normal(1e3, 2, (rows, 3))
    if missing:
        x[rng.random(x.shape) < 0.2] = np.nan
    w = rng.uniform(0.5, 2, rows) if weighted else None
    chunks = tuple(np.diff([0, *sorted(min(c, rows) for c in cuts), rows]))
    d = da.from_array(x, chunks=(chunks, (2, 1)))
    with dask.config.set(scheduler="synchronous"):
        scaler = BatchNormScaler().fit(d, sample_weight=None if w is None else da.from_array(w, chunks=7))
        plain = Plain().fit(x, sample_weight=w)
        assert_alike(scaler, plain, rtol=1e-9)
        y = scaler.transform(d)
        assert y.shape == x.shape
        np.testing.assert_allclose(y.compute(), plain.transform(x), rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(scaler.inverse_transform(y).compute(), x, rtol=1e-12)


def test_batches_of_batches(rng):
    x = rng.normal(size=(90, 3)).astype(np.float32)
    streamed = BatchNormScaler(momentum=0.8)
    plain = Plain(momentum=0.8)
    for part in np.split(x, 3):
        streamed.partial_fit(da.from_array(part, chunks=(8, 3)))
        plain.partial_fit(part)
    assert_alike(streamed, plain)
    streamed.partial_fit(x)  # a plain array
    assert streamed.n_samples_seen_ == 180
    assert isinstance(streamed.transform(x), np.ndarray)
    assert streamed.transform(da.from_array(x)).dtype == np.float32
    assert isinstance(streamed.inverse_transform(x), np.ndarray)
    streamed.fit(da.from_array(x, chunks=(8, 3)))
    assert streamed.n_samples_seen_ == 90


def test_a_feature_without_values_is_not_forgotten():
    streamed = BatchNormScaler(momentum=0.0)
    for batch in ([[1.0, 5.0], [3.0, 7.0]], [[2.0, np.nan], [4.0, np.nan]]):
        streamed.partial_fit(da.from_array(np.array(batch), chunks=(1, 2)))
    np.testing.assert_array_equal(streamed.mean_, [3.0, 6.0])


def test_unknown_chunk_sizes_and_empty_blocks(rng):
    x = rng.normal(2, 1, (100, 3))
    x[20:40, 0] = 0  # a block of which nothing is left
    d = da.from_array(x, chunks=(20, 3))
    keep = d[:, 0] > 2
    kept = x[x[:, 0] > 2]
    scaler = BatchNormScaler().fit(d[keep])
    assert_alike(scaler, Plain().fit(kept))
    np.testing.assert_allclose(scaler.transform(d[keep]).compute(), Plain().fit_transform(kept), rtol=1e-12)
    weights = da.from_array(rng.uniform(1, 2, 100), chunks=20)
    assert BatchNormScaler().fit(d[keep], sample_weight=weights[keep]).n_samples_seen_ > len(kept)


@pytest.mark.parametrize("name", ["with_mean", "with_std"])
def test_what_is_turned_off_after_fit_is_off(name, rng):
    x = rng.normal(2, 3, (20, 3))
    d = da.from_array(x, chunks=(7, 3))
    scaler, plain = BatchNormScaler().fit(x).set_params(**{name: False}), Plain(**{name: False}).fit(x)
    np.testing.assert_array_equal(scaler.transform(d).compute(), plain.transform(x))
    np.testing.assert_array_equal(scaler.inverse_transform(d).compute(), plain.inverse_transform(x))


def test_read_only_blocks(rng):
    """What comes over a wire is; blocks are not written even with copy=False."""
    x = rng.normal(size=(50, 3))

    def freeze(block):
        block = block.copy()
        block.flags.writeable = False
        return block

    d = da.from_array(x, chunks=(9, 3)).map_blocks(freeze, dtype=x.dtype)
    scaler = BatchNormScaler(copy=False).fit(d, sample_weight=da.from_array(np.ones(50), chunks=9).map_blocks(freeze))
    assert_alike(scaler, Plain().fit(x))
    np.testing.assert_allclose(scaler.transform(d).compute(), Plain().fit_transform(x), rtol=1e-12)
    np.testing.assert_allclose(scaler.inverse_transform(scaler.transform(d)).compute(), x, rtol=1e-12)


def test_merging_with_what_others_have_seen(rng):
    """Scalers of Dask, of one process, and moments add up."""
    x = rng.normal(size=(60, 3))
    x[rng.random(x.shape) < 0.2] = np.nan
    d = da.from_array(x, chunks=(9, 2))
    scaler = BatchNormScaler().fit(d[:20]).merge(Plain().fit(x[20:40]))
    scaler.merge(fastbn.dask.moments(d[40:], nan_policy="omit").compute())
    assert_alike(scaler, Plain().fit(x))
    assert_alike(Plain().merge(scaler.to_moments()), Plain().fit(x))
    both = BatchNormScaler().fit(d[:20]) + BatchNormScaler().fit(d[20:])
    assert type(both) is BatchNormScaler
    assert_alike(both, Plain().fit(x))


def test_data_frames(rng):
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    x = rng.normal(5, 2, (60, 2)).astype(np.float32)
    frame = pandas.DataFrame(x, columns=["a", "b"], index=np.arange(100, 160))
    d = frames.from_pandas(frame, npartitions=4)
    scaler = BatchNormScaler().fit(d)
    assert list(scaler.feature_names_in_) == ["a", "b"]
    result = scaler.transform(d).compute()
    assert isinstance(result, pandas.DataFrame)
    assert list(result.columns) == ["a", "b"]
    assert (result.index == frame.index).all()
    assert (result.dtypes == np.float32).all()
    np.testing.assert_allclose(result.to_numpy(), Plain().fit_transform(x), rtol=1e-5, atol=1e-6)
    back = scaler.inverse_transform(scaler.transform(d)).compute()
    np.testing.assert_allclose(back.to_numpy(), x, rtol=1e-5)
    with pytest.raises(ValueError, match=r"X must have the feature names \['a', 'b'\], got \['b', 'a'\]"):
        scaler.transform(d[["b", "a"]])


def test_only_names_that_are_strings_count(rng):
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    frame = pandas.DataFrame(rng.normal(size=(30, 2)))
    scaler = BatchNormScaler().fit(frames.from_pandas(frame, npartitions=3))
    assert not hasattr(scaler, "feature_names_in_")
    np.testing.assert_allclose(scaler.transform(frame), Plain().fit_transform(frame), rtol=1e-12)
    mixed = frames.from_pandas(frame.rename(columns={0: "a"}), npartitions=3)
    for call in (BatchNormScaler().fit, scaler.transform):
        with pytest.raises(TypeError, match="Feature names are only supported if all input features have string names"):
            call(mixed)


@pytest.mark.parametrize("dtype", [
    "float16", "float32", "int32", "bool", "Float32", "Float64", "Int64", "boolean", "float32[pyarrow]",
    "int64[pyarrow]", {"a": "float32", "b": "float16"}, {"a": "Float32", "b": "float32"},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow")  # of pandas, which prints its frames
def test_frames_of_any_real_type(dtype, rng):
    """The type of the result, and what is missing, are those of the plain scaler."""
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    if "pyarrow" in str(dtype):
        pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(rng.integers(0, 2, (30, 2)), columns=["a", "b"]).astype(dtype)
    if "F" in str(dtype) or "I" in str(dtype) or "pyarrow" in str(dtype):
        frame.iloc[3, 0] = pandas.NA
    d = frames.from_pandas(frame, npartitions=3)
    scaler, plain = BatchNormScaler().fit(d), Plain().fit(frame)
    assert_alike(scaler, plain)
    lazy, wanted = scaler.transform(d), plain.transform(frame)
    result = lazy.compute()
    assert (lazy.dtypes == wanted.dtype).all()
    assert (result.dtypes == wanted.dtype).all()
    np.testing.assert_allclose(result.to_numpy(), wanted, rtol=1e-3 if wanted.dtype == np.float16 else 1e-5)
    back = scaler.inverse_transform(lazy).compute()
    np.testing.assert_allclose(back.to_numpy(), plain.inverse_transform(wanted), rtol=1e-2, atol=1e-2)


def test_a_column_alone_is_refused():
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    column = frames.from_pandas(pandas.Series([1.0, 2.0], name="a"), npartitions=1)
    with pytest.raises(TypeError, match="X must be a dask array or data frame, got Series"):
        BatchNormScaler().fit(column)


@pytest.mark.parametrize("dtype", ["object", "str", "complex64"])
def test_frames_of_other_types_are_refused(dtype):
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    frame = frames.from_pandas(pandas.DataFrame({"a": [1.0, 2.0], "b": [1, 2]}), npartitions=1).astype({"b": dtype})
    with pytest.raises(TypeError, match="X must have a real dtype, got "):
        BatchNormScaler().fit(frame)


@pytest.mark.parametrize("everywhere", [False, True])
def test_set_output_leaves_what_is_lazy_alone(everywhere, rng):
    """It is for data that are in memory: there it does what it does for every scaler."""
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    from sklearn import config_context

    x = rng.normal(size=(30, 2))
    d = da.from_array(x, chunks=(7, 2))
    frame = frames.from_pandas(pandas.DataFrame(x, columns=["a", "b"]), npartitions=3)
    wanted = Plain().fit_transform(x)
    scaler = BatchNormScaler()
    if not everywhere:
        scaler.set_output(transform="pandas")
    with config_context(transform_output="pandas" if everywhere else "default"):
        for lazy in (scaler.fit(d).transform(d), scaler.fit_transform(d)):
            assert isinstance(lazy, da.Array)
            np.testing.assert_allclose(lazy.compute(), wanted, rtol=1e-12)
        plain = scaler.transform(x), scaler.fit_transform(x)
        assert all(isinstance(result, pandas.DataFrame) for result in plain)
        for lazy in (scaler.fit(frame).transform(frame), scaler.fit_transform(frame)):
            assert dask.is_dask_collection(lazy)
            np.testing.assert_allclose(lazy.compute().to_numpy(), wanted, rtol=1e-12)


def test_names_that_only_one_of_both_has(rng):
    """A warning, as everywhere in scikit-learn."""
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    x = rng.normal(size=(30, 2))
    d = da.from_array(x, chunks=(7, 2))
    frame = frames.from_pandas(pandas.DataFrame(x, columns=["a", "b"]), npartitions=3)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        BatchNormScaler().fit(frame).transform(d)
    with pytest.warns(UserWarning, match="X has feature names, but BatchNormScaler was fitted without feature names"):
        BatchNormScaler().fit(d).transform(frame)


@pytest.mark.parametrize("form", ["csr", "csc", "lil"])
def test_sparse_blocks(form, rng):
    sparse = pytest.importorskip("scipy.sparse")
    x = np.where(rng.random((60, 4)) < 0.4, rng.normal(2, 1, (60, 4)), 0)
    d = da.from_array(x, chunks=(13, 4)).map_blocks(lambda b: sparse.csr_array(b).asformat(form), dtype=x.dtype)
    w = rng.uniform(0.5, 2, 60)
    scaler, plain = BatchNormScaler(with_mean=False).fit(d, sample_weight=w), Plain(with_mean=False)
    assert_alike(scaler, plain.fit(x, sample_weight=w))
    blocks = dask.compute(*scaler.transform(d).to_delayed().ravel())
    assert all(sparse.issparse(block) for block in blocks)
    np.testing.assert_allclose(sparse.vstack(blocks).toarray(), plain.transform(x), rtol=1e-12)
    with pytest.raises(ValueError, match="Cannot center sparse matrices"):
        BatchNormScaler().fit(d)


@pytest.mark.parametrize("call, error, message", [
    (lambda d: BatchNormScaler().fit(d[:0]), ValueError, "X must have at least one sample, got shape (0, 3)"),
    (lambda d: BatchNormScaler().fit(d[d[:, 0] > 1]), ValueError,
     "X must have at least one sample, got shape (0, 3)"),
    (lambda d: BatchNormScaler().fit(d[:, :0]), ValueError, "X must have at least one feature, got shape (10, 0)"),
    (lambda d: BatchNormScaler().fit(d[:, 0]), ValueError, "X must have two dimensions, got shape (10,)"),
    (lambda d: BatchNormScaler().fit(d.astype(complex)), TypeError, "X must have a real dtype, got complex128"),
    (lambda d: BatchNormScaler().fit(d).transform(d[:, :1]), ValueError, "X must have 3 features, got 1"),
    (lambda d: BatchNormScaler().fit(d).partial_fit(d[:, :1]), ValueError, "X must have 3 features, got 1"),
    (lambda d: BatchNormScaler().fit(d, sample_weight=[1.0]), ValueError,
     "sample_weight must have shape (10,), got (1,)"),
    (lambda d: BatchNormScaler().fit(d, sample_weight=[-1.0] * 10), ValueError,
     "sample_weight must be finite and not negative, got other values"),
    (lambda d: BatchNormScaler().fit(d, sample_weight=[0.0] * 10), ValueError,
     "Sample weights must contain at least one non-zero number."),
    (lambda d: BatchNormScaler().fit(d, sample_weight=[1j] * 10), TypeError,
     "sample_weight must have a real dtype, got complex128"),
    (lambda d: BatchNormScaler().fit(d[d[:, 0] > 0], sample_weight=[0.0] * 10), ValueError,
     "sample_weight must be a dask array where chunk sizes are unknown, got another"),
    (lambda d: BatchNormScaler().fit(d[d[:, 0] > 0], sample_weight=da.ones(10, chunks=10)), ValueError,
     "sample_weight must have 3 chunks, got 1"),
    (lambda d: BatchNormScaler().fit(dask.delayed(1)), TypeError,
     "X must be a dask array or data frame, got DelayedLeaf"),
])  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error) as raised:
        call(da.ones((10, 3), chunks=(4, 3)))
    assert str(raised.value) == message


def test_fit_leaves_parameters_alone():
    gamma = np.array([1.0, 2.0])
    scaler = BatchNormScaler(gamma=gamma).fit(da.ones((10, 2), chunks=(4, 2)))
    assert scaler.gamma is gamma


def test_weights_of_nothing_but_missing_values():
    """It is not the weights that are zero."""
    x = np.full((10, 2), np.nan)
    scaler = BatchNormScaler().fit(da.from_array(x, chunks=(4, 2)), sample_weight=np.arange(10))
    assert scaler.n_samples_seen_ == Plain().fit(x, sample_weight=np.arange(10)).n_samples_seen_ == 0
    assert np.isnan(scaler.mean_).all()


def test_parameters_are_validated_unless_scikit_learn_is_told_not_to():
    from sklearn import config_context

    scaler = BatchNormScaler(copy="yes")
    with config_context(skip_parameter_validation=True):
        scaler.fit(da.ones((10, 3)))
    with pytest.raises(ValueError, match="The 'copy' parameter of BatchNormScaler must be"):
        scaler.partial_fit(da.ones((10, 3)))


def test_infinity_raises_where_it_is(rng):
    x = rng.normal(size=(20, 2))
    x[13, 1] = np.inf
    d = da.from_array(x, chunks=(5, 2))
    scaler = BatchNormScaler().fit(d[:10])
    mean = scaler.mean_.copy()
    for fit in (scaler.partial_fit, scaler.fit):
        with pytest.raises(ValueError, match="infinity"):
            fit(d)
        np.testing.assert_array_equal(scaler.mean_, mean)
    with pytest.raises(ValueError, match="infinity"):
        scaler.transform(d).compute()


@pytest.mark.filterwarnings("ignore")  # of dask-ml, about versions
def test_dask_ml(rng):
    wrappers = pytest.importorskip("dask_ml.wrappers", exc_type=ImportError)
    x = rng.normal(5, 2, (100, 3))
    d = da.from_array(x, chunks=(20, 3))
    parallel = wrappers.ParallelPostFit(Plain().fit(x))
    np.testing.assert_allclose(parallel.transform(d).compute(), Plain().fit_transform(x))
    # Incremental wants a score of everything; a scaler has none.
    incremental = wrappers.Incremental(Plain(), scoring=lambda *_: 0.0, shuffle_blocks=False).fit(d)
    assert_alike(incremental.estimator_, Plain().fit(x))
