"""Scale a table that fits no worker's memory: 1 GB, made lazily, on two workers that may hold 400 MB each.

Statistics come from one pass over the chunks and merge in a tree; scaling is lazy, chunk by chunk. Needs the extra
``dask``.
"""

import time

import dask
import dask.array as da
import numpy as np
from dask.distributed import Client, LocalCluster

import fastbn.dask
from fastbn.dask import BatchNormScaler

ROWS, COLUMNS = 16_000_000, 16
ROWS_OF_A_CHUNK = 62_500
MEMORY = 400  # MB for a worker, half of which Python and its libraries take


def chunk(block_info: dict) -> np.ndarray:
    """Some rows of the table: column j is uniform in 100 - j - 1 .. 100 + j + 1."""
    rng = np.random.default_rng(block_info[None]["chunk-location"][0])
    x = rng.random((ROWS_OF_A_CHUNK, COLUMNS), dtype=np.float32)
    x -= np.float32(0.5)
    x *= np.arange(2, 2 * COLUMNS + 2, 2, dtype=np.float32)
    x += np.float32(100)
    return x


def main() -> None:
    with dask.config.set({"distributed.worker.memory.terminate": 0.98, "logging.distributed": "critical"}):
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=f"{MEMORY}MB", dashboard_address=None, silence_logs=50
        )
    with cluster, Client(cluster):
        chunks = ((ROWS_OF_A_CHUNK,) * (ROWS // ROWS_OF_A_CHUNK), (COLUMNS,))
        x = da.map_blocks(chunk, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32))
        print(f"{x.nbytes / 1e6:.0f} MB of {x.dtype} in {x.npartitions} chunks, {MEMORY} MB for each worker")
        assert x.nbytes > 2 * MEMORY * 1e6

        start = time.perf_counter()
        scaler = BatchNormScaler().fit(x)
        print(f"fitted {scaler.n_samples_seen_} rows in {time.perf_counter() - start:.1f} s")
        result = fastbn.dask.moments(scaler.transform(x)).compute()  # scaled and summed up chunk by chunk
        deviations = np.sqrt(result.variance())
        print(f"largest mean {abs(result.mean).max():.1e}, deviations {deviations.min():.6f} to {deviations.max():.6f}")

    assert scaler.n_samples_seen_ == ROWS
    np.testing.assert_allclose(scaler.mean_, 100, atol=0.05)
    np.testing.assert_allclose(scaler.scale_, np.arange(1, COLUMNS + 1) / np.sqrt(3), rtol=1e-3)
    np.testing.assert_allclose(deviations, 1, rtol=1e-4)


if __name__ == "__main__":  # workers are new processes, which import this file
    main()
