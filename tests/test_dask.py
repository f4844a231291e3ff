"""Statistics and normalization of Dask arrays are those of the one array, in any chunks, on any scheduler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

import fastbn  # noqa: E402
import fastbn.dask  # noqa: E402


@pytest.fixture(autouse=True)
def synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def chunked(n):
    """Any way to cut n values, empty chunks included."""
    return st.lists(st.integers(0, n), max_size=4).map(lambda cuts: tuple(np.diff([0, *sorted(cuts), n])))


@given(st.data(), st.integers(1, 30), st.integers(1, 6), st.sampled_from([None, 2]))
def test_moments_in_random_chunks(data, rows, channels, split_every):
    x = np.random.default_rng(rows).normal(1e3, 2, (rows, channels, 3))
    chunks = tuple(data.draw(chunked(n)) for n in x.shape)
    with dask.config.set(scheduler="synchronous"):
        got = fastbn.dask.moments(da.from_array(x, chunks=chunks), axis=1, split_every=split_every).compute()
    exact = ref.moments(x, 1)
    assert isinstance(got, fastbn.Moments)
    assert got.count == exact.count
    ref.assert_within(got.mean, exact.mean, ref.mean_tolerance(x, 1))
    ref.assert_within(got.variance(), exact.variance(), ref.variance_tolerance(x, 1))


@given(st.data(), st.integers(1, 20))
def test_batch_norm_in_random_chunks(data, rows):
    x = np.random.default_rng(rows).normal(5, 2, (rows, 4, 3)).astype(np.float32)
    gamma, beta = np.array([1.0, -2.0, 0.5, 3.0]), np.arange(4.0)
    chunks = tuple(data.draw(chunked(n)) for n in x.shape)
    with dask.config.set(scheduler="synchronous"):
        y = fastbn.dask.batch_norm(da.from_array(x, chunks=chunks), gamma=gamma, beta=beta, axis=1)
        assert y.chunks == chunks
        assert y.dtype == np.float32
        got = y.compute()
    ref.assert_within(got, ref.train(x, gamma, beta, axis=1), ref.train_tolerance(x, gamma, beta, axis=1))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (2, 1)])
def test_axes(axis, rng):
    x = rng.normal(size=(6, 5, 4))
    m = fastbn.dask.moments(da.from_array(x, chunks=(2, 3, 3)), axis=axis).compute()
    wanted = fastbn.moments(x, axis=axis)
    assert m.count == wanted.count
    np.testing.assert_allclose(m.mean, wanted.mean, rtol=1e-13)
    y = fastbn.dask.batch_norm(da.from_array(x, chunks=(2, 3, 3)), axis=axis).compute()
    np.testing.assert_allclose(y, fastbn.batch_norm(x, axis=axis, training=True), rtol=1e-12, atol=1e-14)


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_several_axes_keep_the_order_given(data, shape):
    """Statistics and parameters have the shape of the axes as they were named, in any chunks, empty ones included."""
    x = np.random.default_rng(sum(shape)).normal(3, 2, shape)
    order = data.draw(st.permutations(range(x.ndim)))
    axis = tuple(a - x.ndim * data.draw(st.booleans()) for a in order[: data.draw(st.integers(1, x.ndim))])
    d = da.from_array(x, chunks=tuple(data.draw(chunked(n)) for n in shape))
    gamma = np.random.default_rng(1).normal(size=[shape[a] for a in axis])
    with dask.config.set(scheduler="synchronous"):
        got, wanted = fastbn.dask.moments(d, axis=axis).compute(), fastbn.moments(x, axis=axis)
        assert got.count == wanted.count
        np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got.m2, wanted.m2, rtol=1e-12, atol=1e-12)
        y = fastbn.dask.batch_norm(d, gamma=gamma, axis=axis).compute()
        z = fastbn.dask.normalize(d, gamma, da.from_array(abs(gamma), chunks=2), beta=gamma, axis=axis).compute()
    wanted = fastbn.batch_norm(x, gamma=gamma, axis=axis, training=True)
    np.testing.assert_allclose(y, wanted, rtol=1e-9, atol=1e-9)
    wanted = fastbn.normalize(x, gamma, abs(gamma), beta=gamma, axis=axis)
    np.testing.assert_allclose(z, wanted, rtol=1e-12, atol=1e-12)


def test_an_empty_chunk_along_one_of_several_channel_axes(rng):
    x = rng.normal(size=(4, 3, 2))
    d = da.from_array(x, chunks=((2, 2), (0, 2, 1), (2,)))
    np.testing.assert_allclose(fastbn.dask.moments(d, axis=(1, 2)).compute().mean, x.mean(axis=0).ravel(), rtol=1e-12)


@pytest.mark.parametrize("split_every", [None, 2])
def test_missing_values(split_every, rng):
    x = rng.normal(1e3, 1, (60, 4, 3))
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:, 3] = np.nan
    d = da.from_array(x, chunks=(7, 3, 2))
    got = fastbn.dask.moments(d, axis=1, nan_policy="omit", split_every=split_every).compute()
    wanted = fastbn.moments(x, axis=1, nan_policy="omit")
    np.testing.assert_array_equal(got.count, wanted.count)
    assert got.count.dtype == np.int64
    np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-14)
    np.testing.assert_allclose(got.m2, wanted.m2, rtol=1e-12)
    assert np.isnan(fastbn.dask.moments(d, axis=1).compute().mean).all()
    with pytest.raises(ValueError, match='x must have no NaN with nan_policy="raise"'):
        fastbn.dask.moments(d, axis=1, nan_policy="raise").compute()


def test_layout_and_vectors(rng):
    x = rng.normal(size=(8, 3, 5, 5))
    d = da.from_array(x, chunks=(3, 2, 5, 5))
    assert fastbn.dask.moments(d, layout="NCHW").compute() == fastbn.dask.moments(d, axis=1).compute()
    one = fastbn.dask.moments(d[0, :, 0, 0]).compute()
    assert one.count == 1
    np.testing.assert_array_equal(one.mean, x[0, :, 0, 0])


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, np.int8, np.float32])
def test_types(dtype, rng):
    x = rng.integers(0, 100, (40, 3)).astype(dtype)
    d = da.from_array(x, chunks=(7, 2))
    y = fastbn.dask.batch_norm(d, activation="relu")
    wanted = fastbn.batch_norm(x, training=True, activation="relu")
    assert y.dtype == y.compute().dtype == wanted.dtype
    np.testing.assert_allclose(y.compute().astype(float), wanted.astype(float), atol=1e-6 if dtype != np.float16 else 0)


def test_unknown_chunk_sizes(rng):
    x = rng.normal(2, 1, (100, 3))
    d = da.from_array(x, chunks=(20, 3))
    d = d[d[:, 0] > 2]
    kept = x[x[:, 0] > 2]
    assert np.isnan(d.shape[0])
    m = fastbn.dask.moments(d).compute()
    assert m.count == len(kept)
    np.testing.assert_allclose(m.mean, kept.mean(axis=0), rtol=1e-13)
    y = fastbn.dask.batch_norm(d).compute()
    np.testing.assert_allclose(y, fastbn.batch_norm(kept, training=True), rtol=1e-12)
    with pytest.raises(ValueError, match="x must have known chunk sizes along its channel axis 0"):
        fastbn.dask.moments(d, axis=0)


def test_read_only_chunks(rng):
    """What comes over a wire is."""
    x = rng.normal(size=(50, 3))

    def freeze(block):
        block = block.copy()
        block.flags.writeable = False
        return block

    d = da.from_array(x, chunks=(9, 3)).map_blocks(freeze, dtype=x.dtype)
    np.testing.assert_allclose(fastbn.dask.moments(d).compute().mean, x.mean(axis=0), atol=1e-15)
    np.testing.assert_allclose(fastbn.dask.batch_norm(d), fastbn.batch_norm(x, training=True), rtol=1e-12)


def test_nothing_is_computed_before_it_is_asked_for():
    def fail(block):
        raise AssertionError("computed")

    d = da.ones((10, 3), chunks=(5, 3)).map_blocks(fail, dtype=float, meta=np.empty((0, 0)))
    fastbn.dask.moments(d)
    fastbn.dask.batch_norm(d)
    fastbn.dask.normalize(d, np.zeros(3), np.ones(3))


def test_no_data():
    m = fastbn.dask.moments(da.zeros((0, 3))).compute()
    assert m == fastbn.Moments(3)


def test_normalize(rng):
    x = rng.normal(size=(12, 4)).astype(np.float32)
    d = da.from_array(x, chunks=(5, 3))
    mean, variance, gamma, beta = (rng.uniform(1, 2, 4) for _ in range(4))
    wanted = fastbn.normalize(x, mean, variance, gamma=gamma, beta=beta, epsilon=0.1, activation="silu")
    options = {"epsilon": 0.1, "activation": "silu"}
    lazy = {"gamma": da.from_array(gamma), "beta": beta.tolist()}
    y = fastbn.dask.normalize(d, da.from_array(mean, chunks=2), variance, **lazy, **options).compute()
    np.testing.assert_allclose(y, wanted, rtol=1e-6)


@pytest.mark.parametrize("call, error, message", [
    (lambda d: fastbn.dask.moments(np.ones((2, 2))), TypeError, "x must be a dask array, got ndarray"),
    (lambda d: fastbn.dask.moments(d.astype(int)), TypeError,
     "x must be float16, bfloat16, float32, float64, uint8 or int8, got int64"),
    (lambda d: fastbn.dask.moments(d, nan_policy="drop"), ValueError,
     "nan_policy must be one of propagate, omit, raise, got 'drop'"),
    (lambda d: fastbn.dask.normalize(d, np.ones(2), np.ones(3)), ValueError, "mean must have shape (3,), got (2,)"),
    (lambda d: fastbn.dask.normalize(d, np.ones(3), da.ones(4)), ValueError, "variance must have shape (3,), got (4,)"),
    (lambda d: fastbn.dask.normalize(d, None, np.ones(3)), ValueError, "mean must be given, got None"),
    (lambda d: fastbn.dask.batch_norm(d, gamma=np.ones(1)), ValueError, "gamma must have shape (3,), got (1,)"),
    (lambda d: fastbn.dask.batch_norm(d, epsilon=-1), ValueError, "epsilon must be finite and at least 0, got -1.0"),
])  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error) as raised:
        call(da.ones((4, 3), chunks=2))
    assert str(raised.value) == message


def test_without_dask():
    program = "import sys; sys.modules['dask'] = None; import fastbn.dask"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert 'fastbn.dask needs Dask: pip install "fastbn[dask]"' in run.stderr
    with pytest.raises(AttributeError, match=r"module 'fastbn\.dask' has no attribute 'nothing'"):
        fastbn.dask.nothing


@pytest.fixture
def client():
    """A cluster of two processes."""
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit="1GiB"
    )
    with dask.config.set(scheduler=None), cluster, distributed.Client(cluster) as client:
        yield client


def random_cuts(rng, n):
    return tuple(int(m) for m in np.diff([0, *sorted(rng.integers(0, n + 1, rng.integers(0, 6))), n]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of distributed, about ports
def test_random_chunks_on_a_cluster_of_processes(client, rng):
    """The answer of the one array: moments, batch norm and the scaler, on blocks that came over a wire."""
    pytest.importorskip("sklearn", minversion="1.6")
    from fastbn.sklearn import BatchNormScaler

    for i in range(8):
        rows, columns = int(rng.integers(1, 300)), int(rng.integers(1, 7))
        x = rng.normal(1e3, 2, (rows, columns)).astype(np.float32 if i % 2 else np.float64)
        if i > 4:
            x[rng.random(x.shape) < 0.1] = np.nan
        d = da.from_array(x, chunks=(random_cuts(rng, rows), random_cuts(rng, columns)))
        policy = "omit" if i > 4 else "propagate"
        m, exact = fastbn.dask.moments(d, nan_policy=policy).compute(), fastbn.moments(x, nan_policy=policy)
        np.testing.assert_array_equal(m.count, exact.count)
        np.testing.assert_allclose(m.mean, exact.mean, rtol=1e-13)
        np.testing.assert_allclose(m.m2, exact.m2, rtol=1e-9, atol=1e-6)
        if i <= 4:
            got = fastbn.dask.batch_norm(d).compute()
            ref.assert_within(got, ref.train(x), ref.train_tolerance(x))
        weight = rng.uniform(0.5, 2, rows)
        scaler = fastbn.dask.BatchNormScaler().fit(d, sample_weight=weight)
        plain = BatchNormScaler().fit(x, sample_weight=weight)
        np.testing.assert_allclose(scaler.mean_, plain.mean_, rtol=1e-13)
        np.testing.assert_allclose(scaler.var_, plain.var_, rtol=1e-8, atol=1e-9)
        y = scaler.transform(d)
        assert y.dtype == x.dtype
        if rows > 2:
            np.testing.assert_allclose(y.compute(), plain.transform(x), rtol=1e-5, atol=1e-5)
    assert len(set(client.run(os.getpid).values())) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of distributed, about ports and the worker that dies
def test_a_worker_is_killed_in_the_middle(client, rng):
    """Processes; one of them dies while it has results that others still need. The answer is the same."""

    def slow_block(block):  # a local function: workers cannot import this file
        time.sleep(0.3)
        return block

    x = rng.normal(1e4, 1, (2000, 4))
    d = da.from_array(x, chunks=(100, 4)).map_blocks(slow_block, dtype=x.dtype, meta=np.empty((0, 0)))
    with dask.config.set(scheduler="synchronous"):
        wanted = fastbn.dask.moments(da.from_array(x, chunks=(100, 4))).compute()
    whole = client.compute(fastbn.dask.moments(d, split_every=4))
    normalized = client.compute(fastbn.dask.batch_norm(d))
    fitted = []
    try:
        fit = threading.Thread(target=lambda: fitted.append(fastbn.dask.BatchNormScaler().fit(d)))
        fit.start()
        end = time.monotonic() + 30
        while sum(map(len, client.has_what().values())) < 4:  # both workers hold parts
            assert time.monotonic() < end
            time.sleep(0.02)
        pids = client.run(os.getpid)
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        assert whole.result(timeout=60) == wanted
        y = normalized.result(timeout=60)
    finally:
        fit.join(timeout=60)
    after = set(client.run(os.getpid).values())
    assert after != set(pids.values())
    np.testing.assert_allclose(y, fastbn.batch_norm(x, training=True), rtol=1e-9, atol=1e-9)
    assert fitted[0].n_samples_seen_ == 2000
    np.testing.assert_allclose(fitted[0].mean_, wanted.mean, rtol=1e-15)
    np.testing.assert_allclose(fitted[0].var_, wanted.variance(), rtol=1e-11)
