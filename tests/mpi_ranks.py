"""What every rank does under mpiexec: see test_mpi.py. Exits with an error if anything is wrong on any rank."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import reference as ref
from mpi4py import MPI

import fastbn
import fastbn.mpi

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()


def share(n: int) -> slice:
    """Uneven parts; of one row, all but the first rank are empty."""
    cuts = [n * (i * i + i) // (size * size + size) for i in range(size + 1)]
    return slice(cuts[rank], cuts[rank + 1])


def same_everywhere(array: np.ndarray) -> None:
    rows = comm.allgather(np.ascontiguousarray(array).tobytes())
    assert len(set(rows)) == 1


def main() -> None:
    rng = np.random.default_rng(0)  # the same on every rank
    first = fastbn.mpi.BatchNorm(axis=1, momentum=0.7, activation="relu", comm=comm)
    second = fastbn.mpi.BatchNorm(axis=1, momentum=0.7, ddof=1)  # COMM_WORLD
    alone = [fastbn.BatchNorm(axis=1, momentum=0.7, activation="relu"), fastbn.BatchNorm(axis=1, momentum=0.7, ddof=1)]
    for rows in (12, 5, 1, 0, 7):
        x, dy = (rng.normal(3, 2, (rows, 6, 4, 5)) for _ in range(2))
        part = share(rows)
        y = second(first(x[part], training=True), training=True)
        wanted = alone[1](alone[0](x, training=True), training=True)
        np.testing.assert_allclose(y, wanted[part], rtol=1e-9, atol=1e-9)
        dx = first.backward(second.backward(dy[part]))
        expected = alone[0].backward(alone[1].backward(dy))
        np.testing.assert_allclose(dx, expected[part], rtol=1e-7, atol=1e-9)
        for bn, plain in zip((first, second), alone, strict=True):
            same_everywhere(bn.moving_mean)
            same_everywhere(bn.moving_variance)
            np.testing.assert_allclose(bn.moving_variance, plain.moving_variance, rtol=1e-10)
            assert bn.batches == plain.batches
            for name, gradient in bn.grads.items():
                total = np.empty_like(gradient)
                comm.Allreduce(gradient, total)
                np.testing.assert_allclose(total, plain.grads[name], rtol=1e-7, atol=1e-9)
    # Inference is local: one rank alone may call it.
    if rank == 0:
        np.testing.assert_allclose(first(x), alone[0](x), rtol=1e-9, atol=1e-9)
    # Weights of some ranks, and values that are missing.
    bn = fastbn.mpi.BatchNorm(6, axis=1, nan_policy="omit", dtype="float64")
    plain = fastbn.BatchNorm(6, axis=1, nan_policy="omit", dtype="float64")
    x, dy = (rng.normal(3, 2, (9, 6, 4)) for _ in range(2))
    x[rng.random(x.shape) < 0.2] = np.nan
    weight, part = rng.uniform(0, 2, (9, 4)), share(9)
    weight[: share(9).stop if rank == 0 else 0] = 1  # so that rank 0 has none
    weight = comm.bcast(weight)
    y = bn(x[part], training=True, sample_weight=weight[part] if rank else None)
    np.testing.assert_allclose(y, plain(x, training=True, sample_weight=weight)[part], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(bn.backward(dy[part]), plain.backward(dy)[part], rtol=1e-7, atol=1e-9)
    same_everywhere(bn.moving_variance)
    # float32, and the tolerance of batch norm itself.
    x = rng.normal(1000, 1, (40, 8)).astype(np.float32)
    y = fastbn.mpi.BatchNorm()(x[share(40)], training=True)
    ref.assert_within(y, ref.train(x)[share(40)], np.broadcast_to(ref.train_tolerance(x), x.shape)[share(40)])
    # A rank that fails takes the others along.
    bn = fastbn.mpi.BatchNorm(8)
    with pytest.raises(RuntimeError if rank else TypeError):
        bn(x[:4] if rank else x[:4].astype(complex), training=True)
    comm.Barrier()
    print(f"rank {rank} of {size}: the same")


try:
    main()
except BaseException:
    import traceback

    traceback.print_exc()
    sys.stderr.flush()
    comm.Abort(1)
