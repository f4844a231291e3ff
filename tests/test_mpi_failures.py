"""Ranks that fail alone: every rank raises, nothing has changed, and on they go."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
from ranks import run_comms

import fastbn
import fastbn.mpi
from fastbn import synchronized


def test_missing_values_that_are_refused(rng):
    x = rng.normal(size=(6, 3))
    x[4, 2] = np.nan

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, nan_policy="raise")
        with pytest.raises(ValueError if rank else RuntimeError) as error:
            bn(x[3 * rank : 3 * rank + 3], training=True)
        return str(error.value), bn.batches

    assert run_comms(work, 2) == [
        ("rank 1 has raised an error in this call, so no rank goes on", 0),
        ('x must have no NaN with nan_policy="raise", got 1, of them 1 in channel 2', 0),
    ]


def test_weights_that_do_not_fit(rng):
    x = rng.normal(size=(4, 3))

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm)
        with pytest.raises(ValueError if rank else RuntimeError) as error:
            bn(x, training=True, sample_weight=[1.0, -1.0, 1.0, 1.0] if rank else None)
        return str(error.value)

    assert run_comms(work, 2)[1] == "sample_weight must be finite and not negative, got -1.0"
    weight = np.ones((4, 3))

    def overwritten(comm, rank):
        fastbn.mpi.BatchNorm(comm=comm)(x, training=True, sample_weight=weight, out=weight)

    with pytest.raises(ValueError, match="out must"):
        run_comms(overwritten, 1)


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


@pytest.mark.parametrize("name", ["residual", "gamma", "beta", "moving_mean", "moving_variance", "renorm_mean"])
def test_an_output_that_is_taken(name):
    """The rank tells the others before it raises, so none learns from a batch that another has refused."""

    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, dtype="float64", renorm=True)
        before, memory = bn.state_dict(), np.ones(4)
        residual = memory[:3].reshape(1, 3)
        out = memory[1:] if name == "residual" else bn._named(bn._arrays)[name]
        with pytest.raises(ValueError if rank else RuntimeError) as error:
            bn(np.ones((1, 3)), training=True, residual=residual, out=out.reshape(1, 3) if rank else None)
        for key, value in bn.state_dict().items():
            np.testing.assert_array_equal(value, before[key])
        return str(error.value)

    messages = run_comms(work, 2)
    assert messages[0] == "rank 1 has raised an error in this call, so no rank goes on"
    words = "be residual itself or not share memory with it" if name == "residual" else f"not share memory with {name}"
    assert messages[1].startswith(f"out must {words}")


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance", "renorm_mean"])
def test_statistics_that_are_read_only(name):
    def work(comm, rank):
        bn = fastbn.mpi.BatchNorm(3, comm=comm, dtype="float64", renorm=True)
        before = bn.state_dict()
        bn._named(bn._arrays)[name].flags.writeable = not rank
        with pytest.raises(ValueError if rank else RuntimeError) as error:
            bn(np.ones((2, 3)), training=True)
        for key, value in bn.state_dict().items():
            np.testing.assert_array_equal(value, before[key])
        return str(error.value)

    messages = run_comms(work, 2)
    assert messages[0] == "rank 1 has raised an error in this call, so no rank goes on"
    assert messages[1].startswith(f"{name} must be writable")


@pytest.mark.parametrize("step", ["moments", "local_sums"])
def test_an_interrupt_of_one_rank(step, monkeypatch):
    """Ctrl-C while one rank computes does not leave the others waiting."""
    found, this = getattr(synchronized, step), threading.local()

    def interrupted(*arguments, **options):
        if this.interrupted:
            raise KeyboardInterrupt
        return found(*arguments, **options)

    monkeypatch.setattr(synchronized, step, interrupted)

    def work(comm, rank):
        this.interrupted = False
        bn, x = fastbn.mpi.BatchNorm(3, comm=comm), np.ones((2, 3), np.float32)
        bn(x, training=True)
        call = partial(bn, x, training=True) if step == "moments" else partial(bn.backward, x)
        this.interrupted = rank == 1
        with pytest.raises(KeyboardInterrupt if rank else RuntimeError):
            call()
        this.interrupted = False
        bn(x, training=True)  # and on they go
        bn.backward(x)
        return bn.batches

    assert run_comms(work, 2) == [2, 2]


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


def test_messages():
    with pytest.raises(ValueError) as refused:
        fastbn.mpi.BatchNorm(virtual_batch_size=8)
    assert str(refused.value) == "virtual_batch_size must not be given where the batch is that of all ranks, got 8"
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
    needs = 'mpi4py (pip install "fastbn[mpi]") and an MPI library (Debian: apt-get install openmpi-bin)'
    assert f"fastbn.mpi needs {needs}: import of mpi4py halted" in run.stderr  # and how the import failed
