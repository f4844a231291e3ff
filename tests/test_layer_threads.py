"""Threads may share a layer: no update is lost, and what is read belongs together."""

from __future__ import annotations

import threading

import cases
import numpy as np
import pytest
import reference as ref

from fastbn import BatchNorm, batch_norm, batch_norm_backward, batch_norm_forward
from fastbn.threads import _owners

C = 5


def run_threads(function, count):
    errors = []

    def guarded(i):
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors


@pytest.mark.parametrize("shape", [(4, C), (3000, C)], ids=str)
def test_threads_that_share_a_layer_lose_no_update(shape):
    """The same batch from every thread: any order of updates gives the same statistics, a lost one does
    not."""
    threads, calls = 4, 50
    x = cases.normal(shape, mean=10)
    shared, alone = BatchNorm(C, dtype=np.float64), BatchNorm(C, dtype=np.float64)
    for bn in (shared, alone):
        bn.moving_mean[:], bn.moving_variance[:] = cases.moving(C, np.float64)
    expected = batch_norm(x, training=True)

    def work(_):
        for _ in range(calls):
            ref.assert_same_bits(shared(x, True), expected)

    run_threads(work, threads)
    for _ in range(threads * calls):
        alone(x, True)
    for a, b in zip(shared.variables, alone.variables, strict=True):
        ref.assert_same_bits(a, b)
    assert shared.state_dict()["batches"] == threads * calls


def test_threads_that_build_a_layer_together():
    x = cases.normal((50, C))
    for _ in range(20):
        bn = BatchNorm()
        run_threads(lambda _, bn=bn: bn(x, True), 4)
        assert bn.state_dict()["batches"] == 4


def test_threads_read_a_state_that_belongs_together():
    """Mean and variance of one moment: x always has variance = mean, so the moving ones stay equal too."""
    bn = BatchNorm(1, momentum=0.5, dtype=np.float64)
    bn.moving_mean[:] = bn.moving_variance[:] = 1
    batches = [np.array([[m - m**0.5], [m + m**0.5]]) for m in (4.0, 16.0, 64.0)]
    stop = threading.Event()

    def work(i):
        if i == 0:
            for n in range(600):
                bn(batches[n % 3], True)
            stop.set()
        while not stop.is_set():
            state = bn.state_dict()
            np.testing.assert_allclose(state["moving_mean"], state["moving_variance"], rtol=1e-12)

    run_threads(work, 2)


def test_every_thread_has_the_gradient_of_its_own_call():
    """Forward and backward of several threads in any order."""
    bn = BatchNorm(C)
    barrier = threading.Barrier(3)

    def work(i):
        for n in range(30):
            x, dy = cases.normal((9, C), seed=10 * i + n), cases.normal((9, C), seed=n)
            barrier.wait()
            bn(x, True)
            barrier.wait()
            dx = bn.backward(dy)
            _, cache = batch_norm_forward(x, training=True)
            ref.assert_same_bits(dx, batch_norm_backward(dy, cache)[0])

    run_threads(work, 3)


def test_layers_of_a_class_with_an_equality_of_its_own():
    """Locks of equal layers are not one lock."""

    class Equal(BatchNorm):
        def __eq__(self, other):
            return True

    class EqualHashed(Equal):
        def __hash__(self):
            return 1

    assert Equal(3).built
    layers = EqualHashed(3), EqualHashed(3)
    owners = list(_owners.values())
    assert all(any(owner is layer for owner in owners) for layer in layers)
