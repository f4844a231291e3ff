"""The layer over ranks: under mpiexec where it is installed, and between threads everywhere."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import reference as ref
from ranks import run_comms

import fastbn
import fastbn.mpi


def cuts(n, size):
    return np.linspace(0, n, size + 1).astype(int)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_several_layers_and_steps(size, dtype, rng):
    """Training as of one layer with the whole batch, also where ranks are empty."""
    batches = [rng.normal(3, 2, (rows, 4, 3)).astype(dtype) for rows in (11, 3, 0, 8)]
    options = {"axis": 1, "momentum": 0.6, "ddof": 1, "epsilon": 1e-2}

    def work(comm, rank):
        layers = [fastbn.mpi.BatchNorm(4, comm=comm, dtype=dtype, **options) for _ in range(2)]
        layers[0].gamma = [1.0, 2.0, 0.5, -1.0]
        results = []
        for x in batches:
            part = slice(*cuts(len(x), size)[rank : rank + 2])
            y = layers[1](layers[0](x[part], training=True), training=True)
            results.append((y, layers[0].backward(layers[1].backward(x[part] ** 2))))
        return results, [layer.state_dict() for layer in layers], [layer.grads for layer in layers]

    ranks = run_comms(work, size)
    plain = [fastbn.BatchNorm(4, dtype=dtype, **options) for _ in range(2)]
    plain[0].gamma = [1.0, 2.0, 0.5, -1.0]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is np.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for i, x in enumerate(batches):
        y = plain[1](plain[0](x, training=True), training=True)
        dx = plain[0].backward(plain[1].backward(x**2))
        np.testing.assert_allclose(np.concatenate([r[0][i][0] for r in ranks]), y, **tolerance)
        np.testing.assert_allclose(np.concatenate([r[0][i][1] for r in ranks]), dx, **tolerance)
    for i, layer in enumerate(plain):
        for name, value in layer.state_dict().items():
            ours = [np.asarray(r[1][i][name]) for r in ranks]
            assert len({a.tobytes() for a in ours}) == 1, name  # the same bits on every rank
            np.testing.assert_allclose(ours[0], value, **tolerance)
        for name, gradient in layer.grads.items():
            np.testing.assert_allclose(sum(r[2][i][name] for r in ranks), gradient, **tolerance)


def test_one_rank_has_the_bits_of_the_plain_layer(rng):
    x, dy = rng.normal(2, 3, (9, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(comm=comm)
        return bn(x, training=True), bn.backward(dy), bn.moving_variance, comm.calls

    plain = fastbn.BatchNorm()
    (got,) = run_comms(work, 1)
    assert got[3] == 2  # one exchange forward, one backward
    for a, b in zip(got[:3], (plain(x, training=True), plain.backward(dy), plain.moving_variance), strict=True):
        ref.assert_same_bits(a, b)


def test_residual_and_activation(rng):
    x, residual, dy = (rng.normal(size=(10, 3)) for _ in range(3))

    def work(comm, rank):
        part = slice(*cuts(10, 3)[rank : rank + 2])
        bn = fastbn.mpi.BatchNorm(activation="silu", comm=comm)
        y = bn(x[part], training=True, residual=residual[part])
        return y, bn.backward(dy[part]), bn.grads["residual"]

    plain = fastbn.BatchNorm(activation="silu")
    wanted = plain(x, training=True, residual=residual), plain.backward(dy), plain.grads["residual"]
    for got, expected in zip(zip(*run_comms(work, 3), strict=True), wanted, strict=True):
        np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-10, atol=1e-12)


def weights_of(kind, x, rng):
    """How some values count, per sample, per position or per value, beside the policy; and x with what is missing."""
    x = x.copy()
    if kind == "omit":
        x[rng.random(x.shape) < 0.2] = np.nan
        return x, {}
    if kind == "mask":
        mask = rng.random(len(x)) < 0.7
        x[~mask] = np.nan  # masked values may be anything
        return x, {"mask": mask}
    if kind == "weights":
        return x, {"sample_weight": rng.integers(0, 4, len(x)) / 2}
    if kind == "large weights":
        return x, {"sample_weight": rng.uniform(1, 2, (len(x), *x.shape[2:])) * 1e15}
    x[rng.random(x.shape) < 0.2] = np.nan
    return x, {"mask": rng.random((len(x), *x.shape[2:])) < 0.8, "sample_weight": rng.uniform(0, 2, x.shape)}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["mask", "weights", "large weights", "omit", "all"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masks_weights_and_missing_values(dtype, kind, size, rng):
    """Training as of one layer with the whole batch: y, gradients, moving statistics, and what counts for them."""
    policy = "omit" if kind in ("omit", "all") else "propagate"
    options = {"axis": 1, "momentum": 0.6, "ddof": 1, "epsilon": 1e-2, "nan_policy": policy, "dtype": dtype}
    batches = []
    for rows in (11, 3, 0, 8):
        x, given = weights_of(kind, rng.normal(3, 2, (rows, 4, 3)).astype(dtype), rng)
        batches.append((x, given, rng.normal(size=x.shape).astype(dtype)))

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(4, comm=comm, **options)
        bn.gamma = [1.0, 2.0, 0.5, -1.0]
        results = []
        for x, given, dy in batches:
            part = slice(*cuts(len(x), size)[rank : rank + 2])
            y = bn(x[part], training=True, **{name: value[part] for name, value in given.items()})
            results.append((y, bn.backward(dy[part]), bn.grads))
        return results, bn.state_dict()

    ranks = run_comms(work, size)
    plain = fastbn.BatchNorm(4, **options)
    plain.gamma = [1.0, 2.0, 0.5, -1.0]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is np.float32 else {"rtol": 1e-9, "atol": 1e-12}
    for i, (x, given, dy) in enumerate(batches):
        y = plain(x, training=True, **given)
        dx = plain.backward(dy)
        np.testing.assert_allclose(np.concatenate([r[0][i][0] for r in ranks]), y, **tolerance)
        np.testing.assert_allclose(np.concatenate([r[0][i][1] for r in ranks]), dx, **tolerance)
        assert np.isfinite(dx).all()
        for name, gradient in plain.grads.items():
            np.testing.assert_allclose(sum(r[0][i][2][name] for r in ranks), gradient, **tolerance)
    for name, value in plain.state_dict().items():
        ours = [np.asarray(r[1][name]) for r in ranks]
        assert len({a.tobytes() for a in ours}) == 1, name  # the same bits on every rank
        np.testing.assert_allclose(ours[0], value, **tolerance)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [
    {"renorm_scheme": "tf1"}, {"renorm_scheme": "keras"}, {"renorm_clipping": {"rmin": 0.5, "rmax": 1.5, "dmax": 0.3}},
    {"scale": False, "momentum": 0.5},
], ids=str)  # fmt: skip
def test_renormalization(options, weighted, built, size, rng):
    """r and d come from the statistics of the whole batch, and from averages that are the same on every rank."""
    batches = []
    for i, rows in enumerate((9, 4, 0, 7)):
        x, dy = (rng.normal(1 + i, 2 + i, (rows, 3)) for _ in range(2))
        given = {"mask": rng.random(rows) < 0.7} if weighted else {}
        if weighted:
            x[:, 1] = np.where(i == 1, np.nan, x[:, 1])  # a batch in which nothing counts in a channel
        batches.append((x, dy, given))
    options = {"renorm": True, "renorm_momentum": 0.8, "nan_policy": "omit" if weighted else "propagate", **options}

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3 if built else None, comm=comm, dtype="float64", **options)
        results = []
        for x, dy, given in batches:
            part = slice(*cuts(len(x), size)[rank : rank + 2])
            y = bn(x[part], training=True, **{name: value[part] for name, value in given.items()})
            results.append((y, bn.backward(dy[part]), bn.grads))
        return results, bn.state_dict()

    ranks = run_comms(work, size)
    plain = fastbn.BatchNorm(3 if built else None, dtype="float64", **options)
    for i, (x, dy, given) in enumerate(batches):
        y = plain(x, training=True, **given)
        for j, wanted in enumerate((y, plain.backward(dy))):
            got = np.concatenate([r[0][i][j] for r in ranks])
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
        for name, gradient in plain.grads.items():
            np.testing.assert_allclose(sum(r[0][i][2][name] for r in ranks), gradient, rtol=1e-9, atol=1e-12)
    for name, value in plain.state_dict().items():
        ours = [np.asarray(r[1][name]) for r in ranks]
        assert len({a.tobytes() for a in ours}) == 1, name
        np.testing.assert_allclose(ours[0], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_weights_behind_an_activation_and_a_residual(activation, rng):
    x, residual, dy = (rng.normal(size=(12, 3)) for _ in range(3))
    mask, weight = rng.random(12) < 0.7, rng.uniform(0, 2, (12, 3))
    x[~mask] = np.nan

    def work(comm, rank):
        part = slice(*cuts(12, 3)[rank : rank + 2])
        bn = fastbn.mpi.BatchNorm(activation=activation, comm=comm)
        y = bn(x[part], training=True, residual=residual[part], mask=mask[part], sample_weight=weight[part])
        buffer = dy[part].copy()
        assert bn.backward(buffer, out=buffer) is buffer
        return y, buffer, bn.grads["residual"]

    plain = fastbn.BatchNorm(activation=activation)
    y = plain(x, training=True, residual=residual, mask=mask, sample_weight=weight)
    wanted = y, plain.backward(dy), plain.grads["residual"]
    for got, expected in zip(zip(*run_comms(work, 3), strict=True), wanted, strict=True):
        np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
def test_weights_of_small_types(dtype, rng):
    """Within the rounding of the type, once, of what one process gives."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = rng.integers(0, 9, (12, 3)).astype(dtype)
    out = np.dtype(np.float32 if x.dtype == np.uint8 else dtype)
    weight, dy = rng.integers(0, 3, 12), rng.normal(size=(12, 3)).astype(out)

    def work(comm, rank):
        part = slice(*cuts(12, 2)[rank : rank + 2])
        bn = fastbn.mpi.BatchNorm(comm=comm)
        return bn(x[part], training=True, sample_weight=weight[part]), bn.backward(dy[part])

    plain = fastbn.BatchNorm()
    wanted = plain(x, training=True, sample_weight=weight), plain.backward(dy)
    u = {"float16": 2.0**-10, "float32": 2.0**-22}.get(out.name, 2.0**-7)
    for got, expected in zip(zip(*run_comms(work, 2), strict=True), wanted, strict=True):
        joined = np.concatenate(got)
        assert joined.dtype == out
        np.testing.assert_allclose(joined.astype(float), expected.astype(float), rtol=u, atol=u)


def test_ranks_need_not_agree_about_weights(rng):
    """Without weights every value of a rank counts once; a rank that is empty gives none, and nobody waits."""
    x, dy = rng.normal(size=(9, 3)), rng.normal(size=(9, 3))
    weight, mask = np.ones(9), np.ones(9, bool)
    weight[:4] = rng.uniform(0, 3, 4)
    mask[4:6] = [True, False]
    parts = [slice(0, 4), slice(4, 6), slice(6, 6), slice(6, 9)]
    given = [{"sample_weight": weight[:4]}, {"mask": mask[4:6]}, {}, {}]

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, dtype="float64")
        y = bn(x[parts[rank]], training=True, **given[rank])
        return y, bn.backward(dy[parts[rank]]), bn.moving_variance.tobytes(), comm.calls

    ranks = run_comms(work, 4)
    plain = fastbn.BatchNorm(3, dtype="float64")
    wanted = plain(x, training=True, sample_weight=weight, mask=mask), plain.backward(dy)
    for i, expected in enumerate(wanted):
        np.testing.assert_allclose(np.concatenate([r[i] for r in ranks]), expected, rtol=1e-11, atol=1e-13)
    assert len({r[2] for r in ranks}) == 1
    assert {r[3] for r in ranks} == {3}  # two exchanges forward, one back
    np.testing.assert_allclose(np.frombuffer(ranks[0][2]), plain.moving_variance, rtol=1e-13)


def test_a_channel_in_which_nothing_counts(rng):
    """y is beta, dx is 0, and its statistics stay, whatever the other channels do."""
    x = rng.normal(size=(6, 3))
    x[:, 1] = np.nan

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, dtype="float64", nan_policy="omit")
        bn.beta = [1.0, 2.0, 3.0]
        bn(x[3 * rank : 3 * rank + 3], training=True)
        dx = bn.backward(np.ones((3, 3)))
        return dx, bn.moving_mean, bn.moving_variance, bn.batches

    for dx, mean, variance, batches in run_comms(work, 2):
        assert not dx[:, 1].any()
        assert (mean[1], variance[1], batches) == (0.0, 1.0, 1)
        assert mean[0] != 0.0


def test_inference_and_frozen_layers_send_nothing(rng):
    x = rng.normal(size=(6, 3))

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(comm=comm)
        bn(x, training=True)
        sent = comm.calls
        bn(x)
        frozen = bn.backward(x)
        bn.trainable = False
        bn(x, training=True)
        np.testing.assert_array_equal(bn.backward(x), frozen)
        return comm.calls - sent, "gamma" in bn.grads

    assert run_comms(work, 2) == [(0, True)] * 2


def test_nothing_changes_where_all_ranks_are_empty():
    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm)
        y = bn(np.empty((0, 3), np.float32), training=True)
        return y.shape, bn.batches, bn.moving_variance.tolist()

    assert run_comms(work, 2) == [((0, 3), 0, [1.0] * 3)] * 2


def test_copies_and_files_leave_the_communicator_out(tmp_path, rng):
    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(comm=comm, momentum=0.5)
        bn(rng.normal(size=(5, 3)), training=True)
        bn.save(tmp_path / "bn.npz")
        return bn

    (bn,) = run_comms(work, 1)
    for other in (pickle.loads(pickle.dumps(bn)), copy.deepcopy(bn), fastbn.mpi.BatchNorm.load(tmp_path / "bn.npz")):
        assert type(other) is fastbn.mpi.BatchNorm
        assert other._comm is None
        assert other.momentum == 0.5
        np.testing.assert_array_equal(other.moving_mean, bn.moving_mean)
        other.comm = bn.comm
    np.testing.assert_array_equal(fastbn.BatchNorm.load(tmp_path / "bn.npz").moving_mean, bn.moving_mean)


def test_the_warning_is_at_the_line_of_the_call(rng):
    def work(comm, rank):
        with pytest.warns(fastbn.UntrainedWarning) as caught:
            fastbn.mpi.BatchNorm(3, comm=comm)(rng.normal(size=(5, 3)))
        return caught[0].filename

    assert run_comms(work, 1) == [__file__]


@pytest.mark.filterwarnings("ignore::fastbn.UntrainedWarning")
@pytest.mark.parametrize("options", [
    {"momentum": None}, {"zero_debias": True, "momentum": 0.9}, {"on_nonfinite": "skip"}, {"track": False}, {"ddof": 1},
    {"trainable": False}, {"center": False, "activation": "relu"},
], ids=str)  # fmt: skip
def test_options_of_the_layer(options, rng):
    """Whatever the plain layer makes of the whole batch."""
    batches = [rng.normal(2, 3, (7, 3)) for _ in range(3)]
    if "on_nonfinite" in options:
        batches[1][2, 1] = np.nan

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, dtype="float64", **options)
        parts = [x[slice(*cuts(7, 2)[rank : rank + 2])] for x in batches]
        return [bn(x, training=True) for x in parts], [bn.backward(parts[-1])], bn.state_dict()

    ranks = run_comms(work, 2)
    plain = fastbn.BatchNorm(3, dtype="float64", **options)
    ys = [plain(x, training=True) for x in batches]
    for i, y in enumerate([*ys, plain.backward(batches[-1])]):
        got = [(*r[0], *r[1])[i] for r in ranks]
        np.testing.assert_allclose(np.concatenate(got), y, rtol=1e-10, atol=1e-12)
    for name, value in plain.state_dict().items():
        for r in ranks:
            np.testing.assert_allclose(r[2][name], value, rtol=1e-12)


def test_statistics_recomputed_over_all_ranks(rng):
    batches = [rng.normal(5, 2, (8, 3)) for _ in range(4)]

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, dtype="float64")
        fastbn.recompute_statistics(bn, [x[4 * rank : 4 * rank + 4] for x in batches], forward=bn)
        return bn.moving_mean, bn.moving_variance

    whole = fastbn.moments(np.concatenate(batches))
    for mean, variance in run_comms(work, 2):
        np.testing.assert_allclose(mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(variance, whole.variance(), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_under_mpiexec(size, tmp_path):
    if find_spec("mpi4py") is None or shutil.which("mpiexec") is None:
        pytest.skip("mpi4py or mpiexec is not installed")
    here = Path(__file__).parent
    version = subprocess.run(["mpiexec", "--version"], capture_output=True, text=True, check=False).stdout
    options = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in version or "OpenRTE" in version else []
    run = subprocess.run(
        ["mpiexec", "-n", str(size), *options, sys.executable, here / "mpi_ranks.py"],
        env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(f"of {size}: the same") == size
