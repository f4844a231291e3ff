"""One digest: results do not depend on threads, strides, alignment, the output array, or the process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES, THREADS

import fastbn

pytestmark = pytest.mark.kernels

# Large enough for several blocks and for a parallel region, in both patterns; and small remainders.
BIG = (
    ((24, 6, 40, 41), 1),
    ((2, 2, 300, 301), 1),
    ((400, 33, 7, 7), 1),
    ((90_001, 3), -1),
    ((9001, 70), -1),
    ((600, 2000), -1),
)


def inputs(shape, axis, dtype):
    gamma, beta = cases.parameters(shape[axis], dtype)
    x, dy = cases.normal(shape, dtype, mean=10, seed=3), cases.normal(shape, dtype, seed=4)
    return x, dy, gamma, beta


def digest(results: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name, value in results.items():
        sha.update(f"{name} {value.dtype} {value.shape}".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()


def everything(x, dy, gamma, beta, axis, **outs) -> dict[str, np.ndarray]:
    """Training, moments and inference with its gradients."""
    results = cases.training_results(x, dy, gamma=gamma, beta=beta, axis=axis, **outs)
    if outs:
        return results
    s = fastbn.moments(x, axis=axis)
    results |= {"s.mean": s.mean, "s.m2": s.m2}
    mean, variance = cases.moving(len(gamma))
    y, cache = fastbn.batch_norm_forward(
        x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, axis=axis
    )
    gradients = fastbn.batch_norm_backward(dy, cache)
    return results | {"inference": y} | dict(zip(("i.dx", "i.dgamma", "i.dbeta"), gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BIG + BOTH, ids=cases.name)
def test_any_number_of_threads(case, dtype):
    shape, axis = case
    x, dy, gamma, beta = inputs(shape, axis, dtype)
    digests = set()
    for n in (*THREADS, 1, 5):
        with fastbn.threads(n):
            digests.add(digest(everything(x, dy, gamma, beta, axis)))
    assert len(digests) == 1


# One each for every way that a core's own cache decides about: short, middling and longer runs, such whose results go
# past the caches, rows in the caches, rows from memory, narrow and wide, and few rows.
WAYS = (
    ((40, 48, 20, 20), 1),
    ((12, 24, 50, 50), 1),
    ((10, 16, 70, 70), 1),
    ((18, 180, 33, 32), 1),
    ((900, 520), -1),
    ((27_000, 130), -1),
    ((1200, 2100), -1),
    ((100, 3000), -1),
)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", WAYS, ids=cases.name)
def test_any_size_of_a_cores_own_cache(case, dtype, activation):
    shape, axis = case
    x, dy, gamma, beta = inputs(shape, axis, dtype)
    mean, variance = cases.moving(len(gamma))
    digests = set()
    for size in (1 << 18, 1 << 20, 1 << 21):
        for n in (1, 2):
            with cases.own_cache(size), fastbn.threads(n):
                got = cases.training_results(x, dy, gamma=gamma, beta=beta, axis=axis, activation=activation)
                got["inference"] = fastbn.batch_norm(
                    x, moving_mean=mean, moving_variance=variance, axis=axis, activation=activation
                )
            digests.add(digest(got))
    assert len(digests) == 1


def sliced(a):
    """Every second element of a larger array, along every axis."""
    big = np.full([2 * n + 1 for n in a.shape], np.nan, a.dtype)
    view = big[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def row_padded(a):
    """The last axis is contiguous, the rows are apart."""
    view = np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan, a.dtype)[..., :-3]
    view[...] = a
    return view


def outer_padded(a):
    """The first axis takes every second block."""
    view = np.full((2 * a.shape[0], *a.shape[1:]), np.nan, a.dtype)[::2]
    view[...] = a
    return view


def reversed_memory(a):
    every = tuple(slice(None, None, -1) for _ in a.shape)
    return np.ascontiguousarray(a[every])[every]


def reversed_rows(a):
    return np.ascontiguousarray(a[::-1])[::-1]


def unaligned(a):
    raw = np.empty(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def off_cache_line(a):
    raw = np.empty(a.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + a.itemsize
    view = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def field_of_a_record(a):
    """One of two columns of records, neighbours of which lie in between."""
    records = np.full(a.shape, np.nan, np.dtype([("other", a.dtype), ("value", a.dtype)]))
    records["value"] = a
    return records["value"]


def packed_field(a):
    """The same behind one byte: no value is aligned."""
    records = np.zeros(a.shape, np.dtype([("tag", np.uint8), ("value", a.dtype)]))
    records["value"] = a
    return records["value"]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def swapped(a):
    return a.astype(a.dtype.newbyteorder())


MEMORY = (
    sliced, row_padded, outer_padded, reversed_memory, reversed_rows, unaligned, off_cache_line,
    field_of_a_record, packed_field, read_only, swapped,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BOTH[::2] + BIG[:1] + BIG[3:4], ids=cases.name)
def test_any_memory(case, memory, dtype):
    shape, axis = case
    x, dy, gamma, beta = inputs(shape, axis, dtype)
    expected = everything(x, dy, gamma, beta, axis)
    result = everything(memory(x), memory(dy), gamma, beta, axis)
    for name, value in expected.items():
        ref.assert_same_bits(result[name], value, name)
    mixed = everything(memory(x), dy, gamma, beta, axis)
    assert digest(mixed) == digest(expected)


def some_channels(a, axis):
    """The channels of an array that has more of them."""
    shape = list(a.shape)
    shape[axis] += 7
    channels = [slice(None)] * a.ndim
    channels[axis] = slice(3, -4)
    view = np.full(shape, np.nan, a.dtype)[tuple(channels)]
    view[...] = a
    return view


# Rows of one position, of several that fill lanes together, of more columns than are taken at once, of small planes.
TABLES = (
    ((700, 300), -1),
    ((3000, 300), -1),
    ((4, 20, 21, 48), -1),
    ((5000, 10), -1),
    ((2000, 3), -1),
    ((900, 5, 3, 2), 1),
)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("case", TABLES, ids=cases.name)
def test_some_channels_of_an_array(case, dtype, activation):
    shape, axis = case
    x, dy, gamma, beta = inputs(shape, axis, dtype)
    residual, weights = cases.normal(shape, dtype, seed=5), np.abs(cases.normal(shape, np.float32, seed=6))

    def step(x, dy, residual, out, dx_out):
        options = {"gamma": gamma, "beta": beta, "training": True, "axis": axis}
        y, cache = fastbn.batch_norm_forward(x, residual=residual, activation=activation, out=out, **options)
        gradients = fastbn.batch_norm_backward(dy, cache, out=dx_out)
        weighted, cache = fastbn.batch_norm_forward(x, sample_weight=weights, **options)
        return digest(dict(enumerate([y, *gradients, weighted, *fastbn.batch_norm_backward(dy, cache)])))

    expected = step(x, dy, residual, np.empty_like(x), np.empty_like(x))
    parts = [some_channels(a, axis) for a in (x, dy, residual, x, x)]
    assert step(*parts) == expected
    assert step(parts[0], dy, residual, np.empty_like(x), parts[4]) == expected
    assert step(x, parts[1], parts[2], parts[3], np.empty_like(x)) == expected
    for part, filled in zip(parts[:3], (x, dy, residual), strict=True):
        ref.assert_same_bits(np.ascontiguousarray(part), filled)
    for part in parts:  # nothing was written beside them
        assert np.isnan(part.base).sum() == part.base.size - part.size


@pytest.mark.parametrize("case", [((40, 5, 33), 1), ((60, 50, 7), -1), ((6, 50, 4, 5), 1)], ids=cases.name)
def test_fortran_order_copies_of_one_memory_order(case):
    """However an F-ordered array came about, its bits are those of the same memory read as C order."""
    shape, axis = case
    x, dy, gamma, beta = inputs(shape, axis, np.float32)
    xf, dyf = np.asfortranarray(x), np.asfortranarray(dy)
    expected = everything(xf, dyf, gamma, beta, axis)
    assert digest(everything(x.copy(order="F"), dy.copy(order="F"), gamma, beta, axis)) == digest(expected)
    assert digest(everything(xf, dy, gamma, beta, axis)) == digest(expected)
    transposed = everything(xf.T, dyf.T, gamma, beta, len(shape) - 1 - axis % len(shape))
    for name in ("mean", "variance", "dgamma", "dbeta"):
        ref.assert_same_bits(transposed[name], expected[name], name)
    for name in ("y", "dx"):
        ref.assert_same_bits(transposed[name].T, expected[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BOTH[::2] + BIG[:1] + BIG[3:4], ids=cases.name)
def test_in_place_or_not(case, dtype):
    shape, axis = case
    x, dy, gamma, beta = inputs(shape, axis, dtype)
    expected = cases.training_results(x, dy, gamma=gamma, beta=beta, axis=axis)
    outs = {"out": np.empty_like(x), "dx_out": np.empty_like(dy)}
    result = everything(x, dy, gamma, beta, axis, **outs)
    assert result["y"] is outs["out"]
    assert result["dx"] is outs["dx_out"]
    assert digest(result) == digest(expected)
    apart = everything(x, dy, gamma, beta, axis, out=sliced(x), dx_out=reversed_memory(dy))
    assert digest(apart) == digest(expected)
    d = dy.copy()
    assert digest(everything(x, d, gamma, beta, axis, dx_out=d)) == digest(expected)
    for training in (True, False):
        mean, variance = cases.moving(shape[axis], np.float64)
        again = mean.copy(), variance.copy()
        options = {"gamma": gamma, "beta": beta, "training": training, "axis": axis}
        y = fastbn.batch_norm(x, moving_mean=mean, moving_variance=variance, **options)
        z = x.copy()
        assert fastbn.batch_norm(z, moving_mean=again[0], moving_variance=again[1], out=z, **options) is z
        ref.assert_same_bits(z, y)
        ref.assert_same_bits(again[0], mean)
        ref.assert_same_bits(again[1], variance)


# A little more than what is stored past the caches, by runs that share lines of memory, and by rows; and less, by rows
# whose packs are moved to where lines begin.
LARGE = (
    ((6001, 64), -1),
    ((1500, 528), -1),
    ((65, 1001, 10, 10), 1),
    ((5, 7, 461, 461), 1),
    ((42, 300, 23, 23), 1),
    ((100_000, 67), -1),
    ((420_003, 16), -1),
    ((38_001, 176), -1),
    ((4600, 2096), -1),
    ((5000, 2048), -1),
)
SIZES = {np.float64: 0.5, np.float32: 1, np.float16: 2}


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", SIZES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("case", LARGE, ids=cases.name)
def test_past_the_caches_or_through_them(case, dtype, activation):
    """In place results are stored through the caches and row by row, others of this size not."""
    shape, axis = case
    shape = (int(SIZES[dtype] * shape[0]) + 1, *shape[1:])
    x, dy = (cases.many(shape, dtype, seed=seed) for seed in range(2))
    memory = np.full((2, x.size + 9), 7, dtype)
    y, dx = (m[1:-8].reshape(shape) for m in memory)  # not where a line begins
    options = {"axis": axis, "training": True, "activation": activation}
    _, cache = fastbn.batch_norm_forward(x, out=y, **options)
    fastbn.batch_norm_backward(dy, cache, out=dx)
    fastbn.batch_norm_backward(dy, cache, out=dy)
    ref.assert_same_bits(dx, dy)
    fastbn.batch_norm(x, out=x, **options)
    ref.assert_same_bits(y, x)
    assert (memory[:, 0] == 7).all()
    assert (memory[:, -8:] == 7).all()


@pytest.mark.parametrize("shape", [(38_001, 176), (3500, 2048), (42, 300, 23, 23)], ids=["rows", "wide rows", "planes"])
def test_past_the_caches_with_a_residual(shape):
    """At every third place of a line; the gradient of the residual is kept beside that of x."""
    x, residual, dy = (cases.many(shape, seed=seed) for seed in range(3))
    memory = np.empty(x.size + 16, np.float32)
    options = {"axis": 1, "training": True, "activation": "relu"}
    for first in range(0, 16, 3):
        y = memory[first : first + x.size].reshape(x.shape)
        fastbn.batch_norm(x, residual=residual, out=y, **options)
        if first == 0:
            expected = y.copy()
            _, cache = fastbn.batch_norm_forward(x, residual=residual, **options)
            dx, *_, gradient = fastbn.batch_norm_backward(dy, cache)
        ref.assert_same_bits(y, expected)
        _, *_, again = fastbn.batch_norm_backward(dy, cache, out=y)
        ref.assert_same_bits(y, dx)
        ref.assert_same_bits(again, gradient)
    in_place, *_ = fastbn.batch_norm_backward(dy, cache, out=dy)
    ref.assert_same_bits(in_place, dx)
    fastbn.batch_norm(x, residual=residual, out=x, **options)
    ref.assert_same_bits(x, expected)


@pytest.mark.parametrize("kind", ["float32", "float64", "bool", "missing", "per sample", "per position"])
def test_past_the_caches_with_weights(kind):
    """A gradient whose values have weights, of any form, or of which some are missing, by runs that share lines."""
    shape = (20, 350, 23, 23)
    x, dy, weights = (cases.many(shape, seed=seed) for seed in range(3))
    options = {"axis": 1, "training": True}
    if kind == "bool":
        options["mask"] = weights > -1
    elif kind == "missing":
        x[weights > 1] = np.nan
        options["nan_policy"] = "omit"
    elif kind == "per sample":
        options["sample_weight"] = np.abs(weights[:, 0, 0, 0])
    elif kind == "per position":
        options["sample_weight"] = np.abs(weights[:, 0])
    else:
        options["sample_weight"] = np.abs(weights).astype(kind)
    _, cache = fastbn.batch_norm_forward(x, **options)
    memory = np.full(x.size + 32, 7, np.float32)
    for first in (8, 11, 16, 23):
        dx = memory[first : first + x.size].reshape(shape)
        fastbn.batch_norm_backward(dy, cache, out=dx)
        if first == 8:
            expected = dx.copy()
        ref.assert_same_bits(dx, expected)
        assert (memory[:first] == 7).all()
        assert (memory[first + x.size :] == 7).all()
        memory[:] = 7
    in_place, *_ = fastbn.batch_norm_backward(dy, cache, out=dy)
    ref.assert_same_bits(in_place, expected)


def test_past_the_caches_where_a_piece_is_one_value():
    """A plane so long that its pieces, all but the last equally long, leave it a single value."""
    x = cases.many((1, 1, 4096 * 4200 + 1))
    memory = np.full(x.size + 9, 7, np.float32)
    y = memory[1:-8].reshape(x.shape)
    _, cache = fastbn.batch_norm_forward(x, axis=1, training=True, out=y)
    expected = x.copy()
    ref.assert_same_bits(fastbn.batch_norm(expected, axis=1, training=True, out=expected), y)
    gradient = fastbn.batch_norm_backward(expected, cache, out=expected)[0]
    ref.assert_same_bits(fastbn.batch_norm_backward(y.copy(), cache, out=y)[0], gradient)
    assert memory[0] == 7
    assert (memory[-8:] == 7).all()


@pytest.mark.parametrize("weights", [None, "position"])
def test_past_the_caches_into_rows_of_whole_lines(weights):
    """Planes whose last piece is whole lines long, of which the one before is not, in an array whose rows are."""
    shape, width = (13, 490, 993), 1008  # pieces of 497 and of 496 values
    x, dy = (cases.many(shape, seed=seed) for seed in range(2))
    w = np.random.default_rng(9).random((13, 993), np.float32) if weights else None
    memory = np.empty(2 * shape[0] * shape[1] * width + 16, np.float32)
    memory = memory[-memory.ctypes.data % 64 // 4 :]
    y, dx = memory[: 2 * shape[0] * shape[1] * width].reshape(2, *shape[:2], width)[..., : shape[2]]
    _, cache = fastbn.batch_norm_forward(x, axis=1, training=True, sample_weight=w, out=y)
    fastbn.batch_norm_backward(dy, cache, out=dx)
    fastbn.batch_norm_backward(dy, cache, out=dy)
    ref.assert_same_bits(dx, dy)
    fastbn.batch_norm(x, axis=1, training=True, sample_weight=w, out=x)
    ref.assert_same_bits(y, x)


@pytest.mark.parametrize("odd", [0, 1])
def test_past_the_caches_into_padded_rows(odd):
    """Rows that start at a line; where they end within lanes, the last ones overlap those before and never stream."""
    rows, channels, width = 4700, 2000 + odd, 2016
    x, dy = (cases.many((rows, channels), seed=seed) for seed in range(2))
    memory = np.empty(2 * rows * width + 16, np.float32)
    memory = memory[-memory.ctypes.data % 64 // 4 :]
    y, dx = memory[: 2 * rows * width].reshape(2, rows, width)[..., :channels]
    _, cache = fastbn.batch_norm_forward(x, training=True, out=y)
    fastbn.batch_norm_backward(dy, cache, out=dx)
    fastbn.batch_norm_backward(dy, cache, out=dy)
    ref.assert_same_bits(dx, dy)
    fastbn.batch_norm(x, training=True, out=x)
    ref.assert_same_bits(y, x)


def test_run_after_run():
    for shape, axis in BIG:
        x, dy, gamma, beta = inputs(shape, axis, np.float32)
        assert len({digest(everything(x, dy, gamma, beta, axis)) for _ in range(3)}) == 1


@pytest.mark.levels
def test_training_equals_moments_then_normalize():
    """The fused training pass computes what its parts compute."""
    for shape, axis in BIG + BOTH:
        x, _, gamma, beta = inputs(shape, axis, np.float32)
        s = fastbn.moments(x, axis=axis)
        mean, variance = cases.batch_statistics(x, axis=axis)
        ref.assert_same_bits(mean, s.mean)
        ref.assert_same_bits(variance, s.variance())
        y = fastbn.batch_norm(x, gamma=gamma, beta=beta, training=True, axis=axis)
        parts = fastbn.normalize(x, s.mean, s.variance(), gamma=gamma, beta=beta, axis=axis)
        ref.assert_same_bits(parts, y)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import fastbn, test_bits
fastbn.set_num_threads(int(sys.argv[2]))
for dtype in test_bits.DTYPES:
    for shape, axis in test_bits.BIG[:1] + test_bits.BIG[3:] + test_bits.BOTH[::4]:
        x, dy, gamma, beta = test_bits.inputs(shape, axis, dtype)
        print(test_bits.digest(test_bits.everything(x, dy, gamma, beta, axis)))
"""


def in_another_process(threads: int, **variables: str) -> str:
    """Print the digests in a fresh interpreter."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(threads)]
    environment = os.environ | variables
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return run.stdout


def test_process_after_process_and_every_instruction_set_level():
    """What malloc finds in fresh memory, the order of hashes, and the level of the kernels do not matter."""
    assert "base" in cases.LEVELS
    outputs = {
        in_another_process(n, PYTHONHASHSEED=str(n), MALLOC_PERTURB_=str(n * 50), FASTBN_ISA=level)
        for n, level in zip((*THREADS, 2), (cases.LEVELS * 4)[:4], strict=True)
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") > 10
