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


def test_a_rank_that_raises(rng):
    x = rng.normal(size=(4, 3))

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, dtype="float64")
        with pytest.raises(TypeError if rank == 1 else RuntimeError):
            bn(x.astype(int) if rank == 1 else x, training=True)
        assert not bn.batches
        bn(x, training=True)  # and on they go
        with pytest.raises(ValueError if rank == 1 else RuntimeError):
            bn.backward(x[:2] if rank == 1 else x)
        return bn.batches

    assert run_comms(work, 2) == [1, 1]


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


def test_statistics_that_are_not_finite(rng):
    x = rng.normal(size=(4, 2))
    x[1, 1] = np.inf

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(2, comm=comm, on_nonfinite="raise")
        part = x[2 * rank : 2 * rank + 2].copy()
        with pytest.raises(ValueError) as error:
            bn(part, training=True, out=part)
        np.testing.assert_array_equal(part, x[2 * rank : 2 * rank + 2])
        return str(error.value), bn.batches

    message = 'x must have finite statistics with on_nonfinite="raise", got others in channel 1'
    assert run_comms(work, 2) == [(message, 0)] * 2


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


def test_messages():
    with pytest.raises(ValueError) as weighted:
        run_comms(lambda comm, rank: fastbn.mpi.BatchNorm(comm=comm)(np.ones((2, 2)), mask=np.ones(2, bool)), 1)
    assert str(weighted.value) == "mask must be None where the batch is that of all ranks, got an array"
    with pytest.raises(ValueError) as refused:
        fastbn.mpi.BatchNorm(renorm=True)
    assert str(refused.value) == "renorm must not be given where the batch is that of all ranks, got True"
    with pytest.raises(TypeError) as error:
        fastbn.mpi.BatchNorm(comm=3)
    assert str(error.value) == "comm must have Get_size() and Allgather(sendbuf, recvbuf), got int"
    with pytest.raises(ValueError, match="backward must follow a call of the layer"):
        run_comms(lambda comm, rank: fastbn.mpi.BatchNorm(comm=comm).backward(np.ones(1)), 1)


def test_without_mpi4py():
    """The module needs it only for the default communicator."""
    program = (
        "import sys; sys.modules['mpi4py'] = None; import fastbn.mpi, numpy\n"
        "fastbn.mpi.BatchNorm()(numpy.ones((2, 2)), training=True)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert 'fastbn.mpi needs mpi4py and an MPI library: pip install "fastbn[mpi]"' in run.stderr


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
