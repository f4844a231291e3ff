"""Weights of rows, which gradients read in three ways: one for a row, a byte or a number for each value."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from test_bits import digest, row_padded, sliced

import fastbn

pytestmark = pytest.mark.kernels

COLUMNS = (10, 16, 33, 64, 80, 96, 112, 128, 256, 520, 1040, 3000)
CACHES = (1 << 18, 1 << 20, 1 << 21)


def inputs(columns, dtype):
    shape = (200_000 // columns if columns > 100 else 1501, columns)
    x, dy = cases.normal(shape, dtype, mean=1), cases.normal(shape, dtype, seed=1)
    x[::7] = np.nan  # without weight
    return x, dy, *cases.parameters(columns, dtype)


def misaligned(a):
    """A copy that begins 16 bytes behind the beginning of a line, as large arrays do."""
    room = np.empty(a.nbytes + 128, np.uint8)
    begin = -room.ctypes.data % 64 + 16
    copy = room[begin : begin + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def gradients(x, dy, gamma, beta, place, **weights):
    """Those of a batch and those behind fixed statistics, as a digest."""
    x, dy = place(x), place(dy)
    zero = np.zeros(len(gamma), x.dtype)
    found = []
    for training in (True, False):
        moving = {} if training else {"moving_mean": zero, "moving_variance": zero + 2}
        _, cache = fastbn.batch_norm_forward(x, gamma=gamma, beta=beta, axis=1, training=training, **moving, **weights)
        found += fastbn.batch_norm_backward(dy, cache, out=place(np.zeros_like(dy)))
    return digest(dict(enumerate(found)))


def everywhere(given, forms, places):
    """The digests of equal weights, however they are given, walked as is best for any cache."""
    found = set()
    for size in CACHES:
        for place in places:
            for n, weights in enumerate(forms):
                with cases.own_cache(size), fastbn.threads(1 + n % 2):
                    found.add(gradients(*given, place, **weights))
    return found


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_one_weight_for_a_row_is_as_many_as_there_are_values(columns, dtype):
    x, *others = inputs(columns, dtype)
    one = np.random.default_rng(3).random(len(x), np.float32)
    one[::7] = 0
    each = np.repeat(one, columns).reshape(x.shape)
    forms = [{"sample_weight": w} for w in (one, one.astype(np.float64), each, row_padded(each))]
    assert len(everywhere((x, *others), forms, (np.copy, misaligned, sliced))) == 1
    some = one > 0.5
    forms = [{"mask": some}, {"sample_weight": some.astype(np.float32)}, {"mask": each > 0.5}]
    assert len(everywhere((x, *others), forms, (misaligned,))) == 1


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_weights_that_are_bytes_are_the_same_as_numbers(columns, dtype):
    x, *others = inputs(columns, dtype)
    each = np.random.default_rng(4).integers(0, 4, x.shape, np.uint8) * np.uint8(80)
    each[::7] = 0
    padded = np.zeros((len(x), columns + 3), np.uint8)[:, :columns]
    padded[...] = each
    forms = [{"sample_weight": w} for w in (each, each.astype(np.float32), padded, each.astype(np.float64))]
    assert len(everywhere((x, *others), forms, (np.copy, misaligned))) == 1
    some = each > 0
    forms = [{"mask": m} for m in (some, each.view(np.bool_), row_padded(some), sliced(some))]
    forms.append({"sample_weight": some.astype(np.float32)})
    assert len(everywhere((x, *others), forms, (misaligned, row_padded))) == 1


def test_bytes_past_the_caches():
    """A gradient that is stored past the caches, in whole lines and not."""
    x, dy = cases.many((70_001, 64), seed=1), cases.many((70_001, 64), seed=2)
    some = x > -1
    given = x, dy, *cases.parameters(64)
    forms = [{"mask": some}, {"sample_weight": some.astype(np.float32)}]
    assert len(everywhere(given, forms, (np.copy, misaligned))) == 1
    one = some[:, 0].copy()
    forms = [{"mask": one}, {"sample_weight": np.repeat(one, 64).reshape(x.shape).astype(np.float32)}]
    assert len(everywhere(given, forms, (np.copy, misaligned))) == 1
