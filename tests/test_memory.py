"""Large results live in blocks that are kept for the next call; they are arrays like any other."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fastbn

LARGE = (70_000, 64)  # 18 MB of float32

linux = pytest.mark.skipif(sys.platform != "linux", reason="blocks are kept on Linux only")


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal(LARGE, dtype=np.float32)


def address(a):
    return a.__array_interface__["data"][0]


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@linux
def test_a_freed_result_is_the_place_of_the_next(x):
    y = fastbn.batch_norm(x, training=True)
    before = address(y)
    del y
    gc.collect()
    assert address(fastbn.batch_norm(x, training=True)) == before


@linux
def test_large_results_start_at_whole_lines(x):
    assert address(fastbn.batch_norm(x, training=True)) % 64 == 0


def test_living_results_do_not_share_memory(x):
    results = [fastbn.batch_norm(x, training=True) for _ in range(5)]
    assert len({address(y) for y in results}) == 5
    for y in results:
        assert y.tobytes() == results[0].tobytes()


def test_a_view_keeps_the_memory_alive(x):
    view = fastbn.batch_norm(x, training=True)[::1000]
    copy = view.copy()
    for _ in range(4):
        fastbn.batch_norm(x + 1, training=True, gamma=np.full(64, 7.0))
    np.testing.assert_array_equal(view, copy)


def test_results_can_be_resized(x):
    y = fastbn.batch_norm(x, training=True)
    copy = y.copy()
    y.resize((2 * LARGE[0], 64), refcheck=False)
    np.testing.assert_array_equal(y[: LARGE[0]], copy)
    assert not y[LARGE[0] :].any()
    y.resize((10, 64), refcheck=False)
    np.testing.assert_array_equal(y, copy[:10])


def test_order_of_axes_is_kept():
    x = np.ones((8, 3, 512, 400), np.float32).transpose(0, 2, 3, 1)
    assert fastbn.batch_norm(x, training=True).strides == x.strides


@linux
def test_what_is_kept_is_bounded(x):
    fastbn.batch_norm(x, training=True)
    before = resident_bytes()
    for extra in range(12):  # sizes that never fit what is kept
        shape = (LARGE[0] + 40_000 * extra, 64)
        fastbn.normalize(np.zeros(shape, np.float32), np.zeros(64), np.ones(64))
    largest = (LARGE[0] + 40_000 * 11) * 64 * 4
    assert resident_bytes() - before < 3 * largest


def lazily_free_bytes():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("LazyFree:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not count what it may take")


@linux
def test_kept_blocks_go_where_memory_ends():
    """They are of other sizes, and nobody uses them: results that fit without them are made."""
    code = """
import resource, numpy as np, fastbn
statistics, x = (np.zeros(64), np.ones(64)), np.zeros((90 << 12, 64), np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
for size in (60, 70, 80, 90, 60):
    fastbn.normalize(x[: size << 12], *statistics)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout == "done\n", done.stderr


@linux
def test_a_derivative_is_found_twice_where_memory_ends():
    """What comes through a smooth activation is kept in float32 where there is memory for it. The bits are the same."""
    code = """
import resource, numpy as np, fastbn
x = np.random.default_rng(0).standard_normal((1 << 18, 64), np.float32).astype(np.float16)
_, cache = fastbn.batch_norm_forward(x, training=True, activation="silu")
in_place, out = x.copy(), np.empty_like(x)
results = [fastbn.batch_norm_backward(in_place, cache, out=in_place)[:3]]  # holds nothing else
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), before[1]))
results += [fastbn.batch_norm_backward(x, cache, out=out)[:3]]
try:
    bytearray(64 << 20)  # as much as would be kept
except MemoryError:
    print("none left")
resource.setrlimit(resource.RLIMIT_AS, before)
results += [fastbn.batch_norm_backward(x, cache)[:3]]
print(all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(*results)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout == "none left\nTrue\n", done.stderr


@linux
def test_the_system_may_take_what_is_kept_beyond_a_bound():
    """128 MB of kept blocks stay as they are, so that a loop does not pay for marking them."""
    statistics = np.zeros(64), np.ones(64)

    def leave(*sizes):
        """Give back results of so many MB, the first one first, and return how many MB the system may take."""
        results = [fastbn.normalize(np.zeros((size << 12, 64), np.float32), *statistics) for size in sizes]
        while results:
            del results[0]
        gc.collect()
        return lazily_free_bytes() >> 20

    leave(144, 144)
    others = leave(32, 36)
    assert leave(40, 44) == others
    assert leave(74, 48) == others + 74  # beside the last two
    assert leave(144, 160) == others + 144 + 160
    assert leave(52, 54) == others


@linux
def test_other_arrays_come_from_numpy():
    from numpy._core.multiarray import get_handler_name

    assert get_handler_name() == "default_allocator"
    assert get_handler_name(fastbn.batch_norm(np.ones((4, 4)), training=True)) == "default_allocator"


def test_kept_memory_of_a_call_serves_several_threads_at_once():
    """Few rows of very many channels: what a call needs beside its arrays is kept for the next, whoever makes it."""
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((3, channels), dtype=np.float32) for channels in (40_000, 40_000, 50_001, 90_000)]

    def run(x):
        y, cache = fastbn.batch_norm_forward(x, training=True)
        return [y.tobytes(), *(a.tobytes() for a in fastbn.batch_norm_backward(x, cache))]

    wanted = [run(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for found in [pool.map(run, batches) for _ in range(20)]:
            assert list(found) == wanted
