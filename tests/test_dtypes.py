"""Half and 8-bit data: the float32 result of the same values, rounded once; statistics as exact as float32's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cases
import numpy as np
import pytest
import reference as ref
import test_bits
from cases import THREADS

import fastbn

pytestmark = pytest.mark.kernels

SHAPES = (
    *cases.BOTH,
    ((2, 3, 5000), 1),  # a run of two parts
    ((40, 16, 9, 2), 1),
    ((3000, 64), -1),
    ((37, 600), -1),
    ((7, 13), -1),
    ((3, 2, 17), 1),
)
# What comes through a smooth activation is kept apart: for each thread some channels of it, or all.
KEPT_APART = (((8, 24, 40, 40), 1), ((3000, 24), -1), ((3000, 37), -1), ((20, 1500), -1), ((3, 2, 9000), 1))
HALVES = ("float16", "bfloat16")
BYTES = ("uint8", "int8")


def dtype_of(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def batch(shape, dtype, seed=0) -> np.ndarray:
    """Data that a type can hold: normal around 2, or all numbers of 8 bits."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.random.default_rng([seed, *shape]).integers(info.min, info.max + 1, shape).astype(dtype)
    return cases.normal(shape, np.float32, mean=2, deviation=3, seed=seed).astype(dtype)


def result_of(dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype.kind in "iu" else dtype


def as_float32(a) -> np.ndarray:
    """Exactly the same values."""
    return a.astype(np.float32)


def rounded(values, dtype):
    """Of float32 values to a type, by whoever defines it: NumPy, ml_dtypes."""
    return np.asarray(values, np.float32).astype(dtype)


def assert_rounded(actual, expected, tolerance, what) -> None:
    """Within a tolerance of float32 arithmetic, and half a unit in the last place of what is stored."""
    dtype = actual.dtype
    expected = np.asarray(expected, ref.LD)
    if dtype.itemsize == 2:
        digits, smallest = (11, -24) if dtype == np.float16 else (8, -133)
        size = np.abs(expected) + tolerance
        tolerance = tolerance + np.maximum(2.0**-digits * size, ref.LD(2) ** (smallest - 1))
        actual = actual.astype(np.float32)
    ref.assert_within(actual, expected, tolerance, what)


def everything(x, dy, axis) -> dict[str, np.ndarray]:
    gamma, beta = cases.parameters(x.shape[axis])
    return test_bits.everything(x, dy, gamma, beta, axis)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES + BYTES)
@pytest.mark.parametrize("case", SHAPES, ids=cases.name)
def test_every_result_against_exact_arithmetic(case, name):
    shape, axis = case
    dtype = dtype_of(name)
    x, dy = batch(shape, dtype), batch(shape, result_of(dtype), seed=1)
    x32, dy32 = as_float32(x), as_float32(dy)
    gamma, beta = cases.parameters(shape[axis])
    s = ref.moments(x32, axis)
    found = fastbn.moments(x, axis=axis)
    ref.assert_within(found.mean, s.mean, ref.mean_tolerance(x32, axis), "mean")
    ref.assert_within(found.variance(), s.variance(), s.variance() * ref.variance_tolerance(x32, axis), "variance")

    y, cache = fastbn.batch_norm_forward(x, gamma=gamma, beta=beta, training=True, axis=axis)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache)
    tolerance = ref.train_tolerance(x32, gamma, beta, axis=axis)
    assert_rounded(y, ref.train(x32, gamma, beta, axis=axis), tolerance, "y")
    expected = ref.backward_train(dy32, x32, gamma, axis=axis)
    tolerances = ref.gradient_tolerances(dy32, x32, s.mean, s.variance(), gamma, axis=axis)
    assert_rounded(dx, expected[0], tolerances[0], "dx")
    ref.assert_within(dgamma, expected[1], tolerances[1], "dgamma")
    ref.assert_within(dbeta, expected[2], tolerances[2], "dbeta")
    assert y.dtype == dx.dtype == result_of(dtype)
    assert dgamma.dtype == dbeta.dtype == np.float32

    mean, variance = cases.moving(shape[axis])
    y = fastbn.normalize(x, mean, variance, gamma=gamma, beta=beta, axis=axis)
    tolerance = ref.apply_tolerance(x32, mean, variance, gamma, beta, axis=axis)
    assert_rounded(y, ref.normalize(x32, mean, variance, gamma, beta, axis=axis), tolerance, "inference")
    assert y.dtype == result_of(dtype)


@pytest.mark.parametrize("name", HALVES + BYTES)
@pytest.mark.parametrize("case", test_bits.BIG + SHAPES, ids=cases.name)
def test_bits_are_those_of_float32_rounded(case, name):
    """Small types are loaded and stored, nothing else: the arithmetic is that of float32, to the bit."""
    shape, axis = case
    dtype = dtype_of(name)
    x, dy = batch(shape, dtype), batch(shape, result_of(dtype), seed=1)
    expected = everything(as_float32(x), as_float32(dy), axis)
    for key, value in everything(x, dy, axis).items():
        small = key in ("y", "dx", "inference", "i.dx")
        ref.assert_same_bits(value, rounded(expected[key], result_of(dtype)) if small else expected[key], key)


@pytest.mark.parametrize("name", HALVES + BYTES)
@pytest.mark.parametrize("values", [16, 31, 49, 100, 127, 128, 129])
def test_short_planes_of_every_number_of_images(values, name):
    """Runs of four images are converted together, as many channels of each as leave room for all."""
    dtype = dtype_of(name)
    for images, channels in ((1, 64), (2, 37), (3, 65), (4, 5), (5, 64), (6, 21), (7, 3), (8, 40), (9, 129)):
        x = batch((images, channels, values), dtype, seed=images)
        dy = batch(x.shape, result_of(dtype), seed=100 + images)
        found, expected = everything(x, dy, 1), everything(as_float32(x), as_float32(dy), 1)
        for key in ("mean", "variance", "dgamma", "dbeta"):
            ref.assert_same_bits(found[key], expected[key], f"{key} of {images} x {channels}")


@pytest.mark.parametrize("name", HALVES + BYTES)
def test_rows_of_every_width(name):
    """Rows are staged in whole lanes: as many as fit the width alone overran the buffers (577, 673 or 817 columns)."""
    dtype = dtype_of(name)
    for columns in range(500, 1050):
        x, dy = batch((9, columns), dtype), batch((9, columns), result_of(dtype), seed=1)
        _, cache = fastbn.batch_norm_forward(x, training=True)
        _, expected = fastbn.batch_norm_forward(as_float32(x), training=True)
        gradients = fastbn.batch_norm_backward(dy, cache)
        exact = fastbn.batch_norm_backward(as_float32(dy), expected)
        ref.assert_same_bits(gradients[0], rounded(exact[0], result_of(dtype)), f"dx of {columns} columns")
        for actual, wanted in zip(gradients[1:], exact[1:], strict=True):
            ref.assert_same_bits(actual, wanted, f"parameters' gradients of {columns} columns")


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("shape,axis", [((2, 32768), 0), ((65536, 1), -1), ((1, 65536), -1), ((4096, 2, 8), 1)])
def test_every_bit_pattern_comes_back(shape, axis, name):
    """Mean 0, variance 1, epsilon 0: x - 0, times 1, plus 0. Only -0.0 becomes 0.0, and NaN becomes quiet."""
    dtype = dtype_of(name)
    bits = np.arange(65536, dtype=np.uint16)
    x = bits.view(dtype).reshape(shape)
    channels = shape[axis]
    y = fastbn.normalize(x, np.zeros(channels), np.ones(channels), epsilon=0.0, axis=axis)
    infinity, quiet = (0x7C00, 0x0200) if name == "float16" else (0x7F80, 0x0040)
    expected = np.where((bits & 0x7FFF) > infinity, bits | quiet, bits)
    expected[bits == 0x8000] = 0
    np.testing.assert_array_equal(y.reshape(-1).view(np.uint16), expected)
    with np.errstate(invalid="ignore"):
        wide = fastbn.normalize(as_float32(x), np.zeros(channels), np.ones(channels), epsilon=0.0, axis=axis)
    same = ~np.isnan(wide).reshape(-1)
    np.testing.assert_array_equal(rounded(wide, dtype).reshape(-1).view(np.uint16)[same], expected[same])


@pytest.mark.parametrize("name", HALVES)
def test_rounding_to_nearest_even(name):
    """Every number halfway between two neighbours, and the float32 numbers beside it."""
    dtype = dtype_of(name)
    infinity = 0x7C00 if name == "float16" else 0x7F80
    values = np.arange(infinity, dtype=np.uint16).view(dtype).astype(np.float64)
    half = np.append((values[1:] + values[:-1]) / 2, values[-1] + (values[-1] - values[-2]) / 2)
    middle = half.astype(np.float32)
    exact = middle == half  # not among the smallest bfloat16, which are float32's smallest too
    middle = middle[exact]
    wanted = np.concatenate([np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))])
    with np.errstate(over="ignore"):
        expected = rounded(wanted, dtype)
    # 0 * 1 + beta, so that the float32 numbers go out through the store of half
    zeros, ones = np.zeros(wanted.size), np.ones(wanted.size)
    for shape, axis in (((1, wanted.size), 1), ((wanted.size, 17), 0)):
        y = fastbn.normalize(np.zeros(shape, dtype), zeros, ones, beta=wanted, epsilon=0.0, axis=axis)
        for i in range(y.shape[1 - axis]):
            ref.assert_same_bits(y.take(i, 1 - axis), expected)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("shape,axis", [((4, 3, 40), 1), ((50, 3), -1)])
def test_nan_and_infinity_stay_in_their_channel(shape, axis, name):
    dtype = dtype_of(name)
    x = batch(shape, dtype)
    clean = fastbn.batch_norm(x, training=True, axis=axis)
    for bad in (np.nan, np.inf):
        x[(0, 1, 0)[: len(shape)]] = bad
        y = np.moveaxis(fastbn.batch_norm(x, training=True, axis=axis).astype(np.float32), axis, 0)
        assert np.isnan(y[1]).all()
        kept = np.moveaxis(clean.astype(np.float32), axis, 0)
        ref.assert_same_bits(y[::2], kept[::2])


def test_overflow_of_a_half_is_infinity():
    y = fastbn.normalize(np.full((1, 20), 60000, np.float16), np.zeros(20), np.full(20, 0.25), epsilon=0.0)
    assert np.isposinf(y).all()


@pytest.mark.parametrize("name", HALVES + BYTES)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("case", SHAPES[::3], ids=cases.name)
def test_activation_and_residual_are_those_of_float32(case, activation, name):
    shape, axis = case
    dtype = dtype_of(name)
    out_dtype = result_of(dtype)
    x, added = batch(shape, dtype), batch(shape, out_dtype, seed=2)
    results = []
    for a, b in ((x, added), (as_float32(x), as_float32(added))):
        y, cache = fastbn.batch_norm_forward(a, training=True, axis=axis, activation=activation, residual=b)
        dx, _, _, dresidual = fastbn.batch_norm_backward(y, cache)
        results.append((y, dx, dresidual))
    ref.assert_same_bits(results[0][0], rounded(results[1][0], out_dtype))
    assert all(r.dtype == out_dtype for r in results[0])
    if dtype.kind in "iu":
        for found, expected in zip(*results):
            ref.assert_same_bits(found, expected)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", ("leaky_relu", -0.5), "silu", "gelu_tanh"], ids=str)
@pytest.mark.parametrize("options", [(), ("residual",), ("mask",), ("residual", "mask")], ids="-".join)
@pytest.mark.parametrize("case", (*SHAPES[::2], *KEPT_APART), ids=cases.name)
def test_gradients_behind_an_activation_are_rounded_once(case, options, activation, name):
    """Those of the same values in float32: what comes through the activation is not kept in 16 bits on the way."""
    shape, axis = case
    dtype = dtype_of(name)
    x, dy, added = (batch(shape, dtype, seed=seed) for seed in range(3))
    mask = np.random.default_rng(3).random(shape) < 0.8 if "mask" in options else None
    results = []
    for wide in (False, True):
        for training in (True, False):
            u, g, r = (as_float32(a) if wide else a.copy() for a in (x, dy, added))
            moving = {} if training else {f"moving_{name}": np.full(shape[axis], 2.0) for name in ("mean", "variance")}
            call = {
                "axis": axis,
                "activation": activation,
                "residual": r if "residual" in options else None,
                "mask": mask,
            }
            _, cache = fastbn.batch_norm_forward(u, training=training, **moving, **call)
            results += [fastbn.batch_norm_backward(g, cache, out=out) for out in (None, g.copy(), u)]
    for half, exact in zip(results[:6], results[6:], strict=True):
        ref.assert_same_bits(half[0], rounded(exact[0], dtype), "dx")
        ref.assert_same_bits(half[1], exact[1], "dgamma")
        ref.assert_same_bits(half[2], exact[2], "dbeta")
        for a, b in zip(half[3:], exact[3:], strict=True):
            ref.assert_same_bits(a, rounded(b, dtype), "dresidual")


# -- memory and bits -------------------------------------------------------------------------------------------------


def in_place(x, axis, **options):
    z = x.copy()
    assert fastbn.batch_norm(z, axis=axis, out=z, **options) is z
    return z


@pytest.mark.parametrize("name", HALVES + BYTES)
@pytest.mark.parametrize("memory", test_bits.MEMORY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", (*SHAPES[::3], ((24, 6, 40, 41), 1)), ids=cases.name)
def test_any_memory(case, memory, name):
    shape, axis = case
    dtype = dtype_of(name)
    if memory is test_bits.swapped and name != "float16":
        pytest.skip("no byte order, or none that NumPy knows")
    if dtype.kind in "iu":
        memory = without_nan(memory)
    x, dy = batch(shape, dtype), batch(shape, result_of(dtype), seed=1)
    expected = everything(x, dy, axis)
    for a, b in ((memory(x), dy), (x, test_bits.sliced(dy)), (memory(x), test_bits.reversed_memory(dy))):
        for key, value in everything(a, b, axis).items():
            ref.assert_same_bits(value, expected[key], key)


def without_nan(memory):
    """The same memory of a type without NaN, which marks the gaps of the others: made of float16, where 8 bits are
    the first of every two."""

    def made(a):
        pairs = np.zeros((*a.shape, 2), a.dtype)
        pairs[..., 0] = a
        return memory(pairs.view(np.float16)[..., 0]).view(np.dtype([("value", a.dtype), ("other", a.dtype)]))["value"]

    return made


@pytest.mark.parametrize("name", HALVES + BYTES)
@pytest.mark.parametrize("case", SHAPES[::2] + test_bits.BIG[::3], ids=cases.name)
def test_out_and_threads(case, name):
    shape, axis = case
    dtype = dtype_of(name)
    out_dtype = result_of(dtype)
    x, dy = batch(shape, dtype), batch(shape, out_dtype, seed=1)
    gamma, beta = cases.parameters(shape[axis])
    expected = cases.training_results(x, dy, gamma=gamma, beta=beta, axis=axis)
    strided = np.empty([2 * n for n in shape], out_dtype)[tuple(slice(None, None, 2) for _ in shape)]
    guarded = cases.Guarded()
    for out in (guarded.empty(shape, out_dtype), strided):
        d = dy.copy()
        for n in THREADS:
            d[...] = dy
            with fastbn.threads(n):
                found = cases.training_results(x, d, gamma=gamma, beta=beta, axis=axis, out=out, dx_out=d)
            assert found["y"] is out
            assert found["dx"] is d
            for key, value in found.items():
                ref.assert_same_bits(value, expected[key], key)
    guarded.check()
    if dtype == out_dtype:
        ref.assert_same_bits(in_place(x, axis, gamma=gamma, beta=beta, training=True), expected["y"])
        mean, variance = cases.moving(shape[axis])
        options = {"moving_mean": mean, "moving_variance": variance}
        ref.assert_same_bits(in_place(x, axis, **options), fastbn.batch_norm(x, axis=axis, **options))


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import fastbn, test_bits, test_dtypes
for name in sys.argv[2:]:
    dtype = test_dtypes.dtype_of(name)
    for shape, axis in test_dtypes.SHAPES[::2] + test_bits.BIG[2:]:
        x, dy = test_dtypes.batch(shape, dtype), test_dtypes.batch(shape, test_dtypes.result_of(dtype), seed=1)
        print(test_bits.digest(test_dtypes.everything(x, dy, axis)))
    if dtype.kind not in "iu":
        for shape in ((1, 65536), (65536, 1)):
            x = np.arange(65536, dtype=np.uint16).view(dtype).reshape(shape)
            y = fastbn.normalize(x, np.zeros(shape[1]), np.ones(shape[1]), epsilon=0.0)
            print(test_bits.digest({"y": y.view(np.uint16)}))
"""


def test_every_instruction_set_level():
    names = [name for name in HALVES + BYTES if name != "bfloat16" or find_spec("ml_dtypes")]
    outputs = set()
    for level in cases.LEVELS:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), *names],
            env=os.environ | {"FASTBN_ISA": level},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1
    assert outputs.pop().count("\n") > 10


# -- the face --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES + BYTES)
def test_layer(name):
    dtype = dtype_of(name)
    x = batch((50, 4, 5), dtype)
    bn, same = fastbn.BatchNorm(axis=1), fastbn.BatchNorm(axis=1)
    y, expected = bn(x, training=True), same(as_float32(x), training=True)
    ref.assert_same_bits(y, rounded(expected, result_of(dtype)))
    assert {v.dtype for v in bn.variables} == {np.dtype(np.float32)}
    for a, b in zip(bn.variables, same.variables):
        ref.assert_same_bits(a, b)
    dy = np.ones(x.shape, result_of(dtype))
    assert bn.backward(dy).dtype == result_of(dtype)
    same.backward(as_float32(dy))
    for key, value in bn.grads.items():
        ref.assert_same_bits(value, same.grads[key], key)
    ref.assert_same_bits(bn(x), rounded(same(as_float32(x)), result_of(dtype)))


@pytest.mark.parametrize("name", HALVES)
def test_fold(name):
    dtype = dtype_of(name)
    bn = fastbn.BatchNorm(4)
    bn.moving_mean[:], bn.moving_variance[:] = cases.moving(4)
    weight, bias = fastbn.fold(batch((3, 4), dtype), None, bn, axis=-1)
    expected, expected_bias = fastbn.fold(as_float32(batch((3, 4), dtype)), None, bn, axis=-1)
    ref.assert_same_bits(weight, rounded(expected, dtype))
    assert bias.dtype == dtype
    np.testing.assert_allclose(bias.astype(np.float64), expected_bias, rtol=2.0**-8)


@pytest.mark.parametrize("name", HALVES)
def test_parameters_of_half_are_read_as_float32(name):
    dtype = dtype_of(name)
    x = batch((30, 5), np.dtype(np.float32))
    gamma, mean = np.arange(1, 6).astype(dtype), np.ones(5, dtype)
    y = fastbn.normalize(x, mean, np.ones(5, dtype), gamma=gamma)
    ref.assert_same_bits(y, fastbn.normalize(x, np.ones(5), np.ones(5), gamma=as_float32(gamma)))


def test_empty():
    for dtype in (np.float16, np.uint8):
        y, cache = fastbn.batch_norm_forward(np.zeros((0, 3), dtype), training=True)
        assert y.shape == (0, 3)
        assert fastbn.batch_norm_backward(y, cache)[0].dtype == y.dtype
    assert fastbn.moments(np.zeros((0, 3), np.int8)).count == 0


TYPES = "float16, bfloat16, float32, float64, uint8 or int8"
WRONG = (
    (lambda: fastbn.moments(np.ones((4, 3), np.int16)), f"x must be {TYPES}, got int16"),
    (lambda: fastbn.moments(np.ones((4, 3), np.uint32)), f"x must be {TYPES}, got uint32"),
    (lambda: fastbn.moments(np.ones((4, 3), "V2")), rf"x must be {TYPES}, got \|V2"),
    (lambda: fastbn.moments(np.ones((4, 3), "V1")), rf"x must be {TYPES}, got \|V1"),
    (lambda: half(np.ones((4, 3), np.float32)), "out must have dtype float16, got float32"),
    (lambda: byte(np.ones((4, 3), np.uint8)), "out must have dtype float32, got uint8"),
    (lambda: gradient(np.float16, np.float32), "dy must have dtype float16, got float32"),
    (lambda: gradient(np.int8, np.int8), "dy must have dtype float32, got int8"),
    (lambda: gradient(np.float32, np.uint8), "dy must have dtype float32, got uint8"),
)


def half(out):
    return fastbn.batch_norm(np.ones((4, 3), np.float16), training=True, out=out)


def byte(out):
    return fastbn.batch_norm(np.ones((4, 3), np.uint8), training=True, out=out)


def gradient(x, dy):
    _, cache = fastbn.batch_norm_forward(np.ones((4, 3), x), training=True)
    return fastbn.batch_norm_backward(np.ones((4, 3), dy), cache)


@pytest.mark.parametrize("call,message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_out_at_the_places_of_bytes():
    """Equal addresses and strides are not "in place" where the types differ."""
    out = np.zeros((4, 3), np.float32)
    x = out.view(np.uint8)[:, ::4]
    assert x.strides == out.strides
    with pytest.raises(ValueError, match="out must be x itself or not share memory with it, got a partial overlap"):
        fastbn.batch_norm(x, training=True, out=out)


def test_fastbn_never_imports_ml_dtypes():
    program = "import sys, fastbn; assert 'ml_dtypes' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
