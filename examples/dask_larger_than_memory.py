"""Scale a table that fits no worker's memory: 1 GB, made lazily, on two workers that may hold 256 MB each.

Statistics come from one pass over the chunks and merge in a tree; scaling is lazy, chunk by chunk. Needs ``pip install
"fastbn[dask,sklearn]"``.
"""

import time

import dask
import dask.array as da
import numpy as np
from dask.distributed import Client, LocalCluster

from fastbn.dask import BatchNormScaler

ROWS, COLUMNS = 16_000_000, 16
MEMORY = 256  # MB for a worker


def main() -> None:
    with dask.config.set({"distributed.worker.memory.terminate": 0.98, "logging.distributed": "error"}):
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=f"{MEMORY}MB", dashboard_address=None, silence_logs=40
        )
    with cluster, Client(cluster):
        rng = da.random.default_rng(0)
        x = rng.standard_normal((ROWS, COLUMNS), dtype=np.float32, chunks=(125_000, COLUMNS))
        x = x * np.arange(1, COLUMNS + 1, dtype=np.float32) + np.float32(100)
        print(f"{x.nbytes / 1e6:.0f} MB of {x.dtype} in {x.npartitions} chunks, {MEMORY} MB for each worker")
        assert x.nbytes > 2 * MEMORY * 1e6

        start = time.perf_counter()
        scaler = BatchNormScaler().fit(x)
        print(f"fitted {scaler.n_samples_seen_} rows in {time.perf_counter() - start:.1f} s")
        z = scaler.transform(x)  # lazy
        means, deviations = dask.compute(z.mean(axis=0), z.std(axis=0))
        print(f"largest mean {abs(means).max():.1e}, deviations {deviations.min():.6f} to {deviations.max():.6f}")

    assert scaler.n_samples_seen_ == ROWS
    np.testing.assert_allclose(scaler.mean_, 100, atol=0.05)
    np.testing.assert_allclose(scaler.scale_, np.arange(1, COLUMNS + 1), rtol=1e-3)
    np.testing.assert_allclose(deviations, 1, rtol=1e-4)


if __name__ == "__main__":  # workers are new processes, which import this file
    main()
