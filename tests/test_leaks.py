"""Nothing is left behind by a thousand calls, whether they return or raise."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import sys
import tracemalloc
import weakref

import cases
import numpy as np
import pytest

from fastbn import BatchNorm, Moments, batch_norm, batch_norm_backward, batch_norm_forward, moments, normalize

CALLS = 1000
x = cases.normal((64, 33, 4), mean=1)
view = x[::-1, ::2]
gamma, beta = cases.parameters(33)
mean, variance = cases.moving(33)
layer = BatchNorm(axis=1)


def train():
    y, cache = batch_norm_forward(x, gamma=gamma, moving_mean=mean, moving_variance=variance, training=True, axis=1)
    batch_norm_backward(y, cache)


def infer():
    batch_norm(x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, axis=1)


def strided():
    y, cache = batch_norm_forward(view, training=True, axis=1)
    batch_norm_backward(y[::-1, ::-1], cache)


def convert():
    batch_norm(x, gamma=gamma.astype(float), beta=[1] * 33, training=True, axis=1)


def use_layer():
    layer(x, True)
    layer.backward(x)
    layer(x)


def build_layer():
    bn = BatchNorm(axis=1)
    bn(x, True)
    bn.state_dict()
    repr(bn)


def streams():
    s = Moments()
    s.update(x, axis=1).merge(moments(x, axis=1))
    normalize(x, (s + s).mean, s.variance(), axis=1)


sizes = itertools.count()


def many_shapes():
    batch_norm(x[: 1 + next(sizes) % 64, :, : 1 + next(sizes) % 4], training=True, axis=1)


def wrong_shape():
    with contextlib.suppress(ValueError):
        batch_norm(x, gamma=gamma[1:], moving_mean=mean, moving_variance=variance, training=True, axis=1)


def wrong_dtype():
    with contextlib.suppress(TypeError):
        batch_norm(x.astype(int), training=True, axis=1)


def wrong_out():
    with contextlib.suppress(ValueError):
        batch_norm(x[1:], training=True, axis=1, out=x[:-1])


def wrong_gradient():
    _, cache = batch_norm_forward(x, training=True, axis=1)
    with contextlib.suppress(ValueError):
        batch_norm_backward(x[1:], cache)


def wrong_state():
    with contextlib.suppress(KeyError, TypeError, ValueError):
        layer.load_state_dict({"gamma": gamma[1:]})


CALLABLES = [
    train, infer, strided, convert, use_layer, build_layer, streams, many_shapes,
    wrong_shape, wrong_dtype, wrong_out, wrong_gradient, wrong_state,
]  # fmt: skip
INPUTS = (x, gamma, beta, mean, variance)


@pytest.mark.parametrize("call", CALLABLES, ids=lambda f: f.__name__)
def test_python_objects(call):
    """What tracemalloc sees, and the references to the arrays that were passed."""
    for _ in range(300):  # plans and free lists fill up
        call()
    layer.backward(layer(x, True))  # the layer may keep its last cache
    gc.collect()
    references = [sys.getrefcount(a) for a in INPUTS]
    tracemalloc.start()
    try:
        call()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(CALLS):
            call()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    layer.backward(layer(x, True))
    assert [sys.getrefcount(a) for a in INPUTS] == references
    # One leaked object of 16 bytes per call would be 16000. A table of plans may grow a little.
    assert after - before < 15 * CALLS


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("call", CALLABLES, ids=lambda f: f.__name__)
def test_memory_of_the_process(call):
    """What malloc in the kernels would leave behind: scratch is at least 33 float64 values per call."""
    for _ in range(200):
        call()
    gc.collect()
    before = resident()
    for _ in range(CALLS):
        call()
    gc.collect()
    assert resident() - before < 33 * 8 * CALLS


def test_inputs_are_released():
    """A cache keeps x alive as long as it lives, and not longer; the plain calls keep nothing."""

    class Array(np.ndarray):
        """An array that can be referenced weakly through its owner."""

    def alive(function) -> bool:
        array = cases.normal((64, 33)).view(Array)
        reference = weakref.ref(array)
        kept = function(array)
        del array
        gc.collect()
        still = reference() is not None
        del kept
        gc.collect()
        assert reference() is None
        return still

    assert not alive(lambda a: batch_norm(a, training=True))
    assert not alive(lambda a: moments(a))
    assert not alive(lambda a: batch_norm(a, training=True, out=np.empty_like(a, subok=False)))
    alive(lambda a: batch_norm_forward(a, training=True)[1])
