"""Forked children, worker processes and other OpenMP runtimes: every call ends, and with the same bits.

After a parallel region, libgomp's threads are gone in a forked child and the next region would wait for ever.
Each test runs a script in a process group of its own, so that one that hangs fails and leaves nothing behind.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys

import pytest

from fastbn.kernels import _runtime

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

WORK = """
import hashlib, os, sys
{first}
import numpy as np
import fastbn

X = np.random.default_rng(0).standard_normal((64, 32, 16, 16), dtype=np.float32)
fastbn.set_num_threads(3)

def work(axis):
    '''Digest of a large training step.'''
    mean, variance = np.zeros(X.shape[axis]), np.ones(X.shape[axis])
    moving = {"moving_mean": mean, "moving_variance": variance}
    y, cache = fastbn.batch_norm_forward(X, axis=axis, training=True, **moving)
    results = [y, mean, variance, *fastbn.batch_norm_backward(X, cache)]
    return hashlib.sha256(b"".join(a.tobytes() for a in results)).hexdigest()[:16]

def both(_=None):
    return work(1) + work(-1)

def in_fork(function):
    '''What the function returns in a forked child.'''
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer

if __name__ == "__main__":
{main}
"""


def results(tmp_path, main, first="", timeout=90):
    """Run the script; the words it printed."""
    script = tmp_path / "script.py"
    body = "\n".join("    " + line for line in main.strip().splitlines())
    script.write_text(WORK.replace("{first}", first).replace("{main}", body))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"no end within {timeout} seconds")
    assert process.returncode == 0, err
    return out.split()


def assert_one_digest(found, count):
    assert len(found) == count
    assert len(set(found)) == 1
    assert len(found[0]) == 32


def test_fork_after_a_parallel_call(tmp_path):
    found = results(tmp_path, "print(both(), in_fork(both), in_fork(lambda: in_fork(both)), both())")
    assert_one_digest(found, 4)


def test_fork_before_any_call(tmp_path):
    assert_one_digest(results(tmp_path, "print(in_fork(both), both(), in_fork(both))"), 3)


def test_the_child_has_one_thread_and_the_parent_keeps_its_own(tmp_path):
    main = """
both()
def counts():
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(2)
    with fastbn.threads(4):
        return before, fastbn.get_num_threads()
print(*eval(in_fork(counts)), fastbn.get_num_threads(), fastbn.show_config(mode="dicts")["threads"]["forked"])
print(in_fork(lambda: fastbn.show_config(mode="dicts")["threads"]["forked"]))
"""
    own = str(3 if _runtime.openmp_version() else 1)
    assert results(tmp_path, main) == ["1", "1", own, "False", "True"]


def test_fork_while_another_thread_computes(tmp_path):
    main = """
import threading
busy = threading.Event()
stop = threading.Event()
def compute():
    while not stop.is_set():
        both()
        busy.set()
worker = threading.Thread(target=compute)
worker.start()
busy.wait()
print(both(), *(in_fork(both) for _ in range(3)))
stop.set()
worker.join()
"""
    assert_one_digest(results(tmp_path, main), 4)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path, method):
    main = f"""
import multiprocessing
print(both())
with multiprocessing.get_context("{method}").Pool(2) as pool:
    print(*pool.map(both, range(3)))
"""
    assert_one_digest(results(tmp_path, main), 4)


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_joblib(tmp_path, backend):
    pytest.importorskip("joblib")
    main = f"""
import joblib
print(both())
print(*joblib.Parallel(2, backend="{backend}")(joblib.delayed(both)(k) for k in range(3)))
"""
    assert_one_digest(results(tmp_path, main), 4)


def test_joblib_gives_each_worker_its_share(tmp_path):
    pytest.importorskip("joblib")
    main = """
import joblib
def count():
    import fastbn
    return fastbn.get_num_threads()
with joblib.parallel_config("loky", inner_max_num_threads=1):
    print(*joblib.Parallel(2)(joblib.delayed(count)() for _ in range(2)))
"""
    assert results(tmp_path, main) == ["1", "1"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("order", ["before", "after"])
def test_torch_brings_an_openmp_runtime_of_its_own(tmp_path, order):
    use = "import torch; torch.ones(1000, 1000) @ torch.ones(1000, 1000); torch.ones(10**7).sum()"
    main = f"""
print(both())
{use}
print(both(), in_fork(both))
print(both())
assert float(torch.ones(10**7).sum()) == 10**7
"""
    found = results(tmp_path, main, first=use if order == "before" else "")
    assert_one_digest(found, 4)
