"""Files larger than memory: any order, any axis, any block size, the same numbers, constant memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn.npy import NpyFile
from fastbn.stream import moments_of_file, normalize_file


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("block_bytes", [1, 100, 500, 3000, 1 << 20])
def test_any_file_in_any_blocks(tmp_path, rng, order, dtype, axis, block_bytes):
    x = np.asarray(rng.standard_normal((7, 6, 11)) + 3, dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", x)
    seen = []
    found = moments_of_file(tmp_path / "x.npy", axis=axis, block_bytes=block_bytes, progress=seen.append)
    rest = tuple(i for i in range(3) if i != axis % 3)
    wide = x.astype(float)
    assert sum(seen) == x.nbytes
    assert found.count == x.size // x.shape[axis]
    np.testing.assert_allclose(found.mean, wide.mean(rest), rtol=1e-7)
    np.testing.assert_allclose(found.variance(), wide.var(rest), rtol=1e-6)

    gamma, beta = np.arange(1.0, x.shape[axis] + 1), np.arange(x.shape[axis])[::-1] / 2
    options = {"gamma": gamma, "beta": beta, "epsilon": 0.5, "axis": axis}
    normalize_file(
        tmp_path / "x.npy",
        tmp_path / "y.npy",
        found.mean,
        found.variance(),
        block_bytes=block_bytes,
        progress=seen.append,
        **options,
    )
    y = np.load(tmp_path / "y.npy")
    native = x.astype(x.dtype.newbyteorder("="), order="K")
    assert y.dtype == native.dtype
    assert y.flags.f_contiguous == (order == "F")
    assert sum(seen) == 2 * x.nbytes
    np.testing.assert_array_equal(y, fastbn.normalize(native, found.mean, found.variance(), **options))


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    fortran=st.booleans(),
    axis=st.integers(0, 3),
    block_bytes=st.integers(1, 600),
)
def test_blocks_tile_the_file(shape, fortran, axis, block_bytes):
    source = NpyFile("x.npy", tuple(shape), np.dtype(np.float32), fortran, 128)
    axis %= len(shape)
    channels = np.moveaxis(
        np.broadcast_to(np.arange(shape[axis]), [*shape[:axis], *shape[axis + 1 :], shape[axis]]), -1, axis
    )
    stored = channels.ravel(order="F" if fortran else "C")
    at, channel = 128, source.channel_axis(axis)
    for block in source.blocks(axis, block_bytes):
        size = np.prod(block.shape)
        assert block.offset == at
        assert 4 * size <= max(block_bytes, 4)
        assert len(block.shape) == len(shape)
        start = (at - 128) // 4
        index = np.arange(block.channels.start, block.channels.stop)
        view = [1] * len(shape)
        view[channel] = -1
        expected = np.broadcast_to(index.reshape(view), block.shape)
        np.testing.assert_array_equal(stored[start : start + size].reshape(block.shape), expected)
        at += 4 * size
    assert at == 128 + source.nbytes


@pytest.mark.parametrize("shape", [(0, 3), (5, 0, 3), (5, 0)])
def test_files_without_values(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.empty(shape, np.float32))
    found = moments_of_file(tmp_path / "x.npy")
    assert found.count == 0
    assert found.mean.shape == (shape[-1],)
    normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", np.zeros(shape[-1]), np.ones(shape[-1]))
    assert np.load(tmp_path / "y.npy").shape == shape


def test_the_input_is_never_the_output(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    with pytest.raises(ValueError, match="output must differ"):
        normalize_file(tmp_path / "x.npy", tmp_path / "x.npy", np.zeros(3), np.ones(3))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.ones((4, 3)))


@pytest.mark.parametrize("activation", ["relu", "silu", ("leaky_relu", 0.5)])
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_an_activation(tmp_path, rng, activation, order, block_bytes):
    x = np.asarray(rng.standard_normal((7, 6, 11)), np.float32, order=order)
    np.save(tmp_path / "x.npy", x)
    options = {"axis": 1, "activation": activation}
    normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", np.zeros(6), np.ones(6), **options, block_bytes=block_bytes)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), fastbn.normalize(x, np.zeros(6), np.ones(6), **options))


@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_nan_that_is_refused(tmp_path, order, dtype, block_bytes):
    x = np.ones((7, 6, 11), dtype, order=order)
    arguments = tmp_path / "x.npy", tmp_path / "y.npy", np.zeros(6), np.ones(6)
    options = {"axis": 1, "nan_policy": "raise", "block_bytes": block_bytes}
    np.save(tmp_path / "x.npy", x)
    normalize_file(*arguments, **options)
    (tmp_path / "y.npy").unlink()
    x[5, 3, 7] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r'x\.npy must have no NaN with nan_policy="raise", got some in channel 3'):
        normalize_file(*arguments, **options)
    assert not (tmp_path / "y.npy").exists()
    with pytest.raises(ValueError, match="nan_policy must be one of"):
        normalize_file(*arguments, axis=1, nan_policy="drop")


@pytest.mark.filterwarnings("ignore")  # NumPy warns of what it can still read
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_every_flipped_bit_of_a_header(tmp_path, version):
    path = tmp_path / "x.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array(file, np.ones((3, 4), np.float32), version=version)
    whole, found = path.read_bytes(), []
    for bit in range(8 * (len(whole) - 48)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            moments_of_file(path)
        except (ValueError, TypeError) as error:
            found.append(str(error))
    assert found
    assert all(str(path) in message for message in found)


@pytest.mark.parametrize("header", ["{", "[]", "{'descr': (), 'fortran_order': False, 'shape': (3,)}", "((((" * 500])
def test_headers_that_are_none(tmp_path, header):
    text = header.encode().ljust(118) + b"\n"
    (tmp_path / "x.npy").write_bytes(np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text)
    with pytest.raises(ValueError, match=r"x\.npy has a damaged \.npy header"):
        NpyFile.open(tmp_path / "x.npy")


@pytest.mark.parametrize("shape", [(0, 10**30), (10**100, 0, 3), (2**61, 0, 4), (1,) * 65, (0,) * 65], ids=str)
def test_shapes_that_no_array_has(tmp_path, shape):
    with open(tmp_path / "x.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(4))
    with pytest.raises(ValueError, match=r"x\.npy has a damaged \.npy header"):
        NpyFile.open(tmp_path / "x.npy")


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((1000, 4)))
    arguments = {"block_bytes": 8000, "progress": lambda _: os.truncate(path, 10000)}
    with pytest.raises(ValueError, match=r"x\.npy became shorter while it was read"):
        normalize_file(path, tmp_path / "y.npy", np.zeros(4), np.ones(4), **arguments)
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("name", ["mean", "variance", "gamma", "beta"])
def test_parameters_of_another_size(tmp_path, name):
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    arrays = {"mean": np.zeros(3), "variance": np.ones(3), name: np.ones(4)}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\) .*, got \(4,\)"):
        normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", **arrays)
    assert not (tmp_path / "y.npy").exists()


# The peak of a fresh process, in MB above what it needed for a tiny file.
PEAK = """
import resource, sys
from fastbn.stream import moments_of_file, normalize_file
def work(path, axis):
    found = moments_of_file(path, axis=axis)
    normalize_file(path, path + ".out", found.mean, found.variance(), axis=axis)
work(sys.argv[1], -1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work(sys.argv[2], int(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("shape", "fortran", "axis"),
    [((1_250_000, 60), False, -1), ((15_000_000, 5), True, -1), ((3, 5_000_000, 5), False, 0)],
    ids=["rows", "columns", "channels first"],
)
def test_memory_is_constant(tmp_path, shape, fortran, axis):
    size = 4 * int(np.prod(shape))
    assert size == 300_000_000
    with open(tmp_path / "big.npy", "wb") as file:  # sparse: pages of zeros count as memory like any others
        header = {"descr": "<f4", "fortran_order": fortran, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + size)
    np.save(tmp_path / "tiny.npy", np.ones((10, 4), np.float32))
    names = [str(tmp_path / "tiny.npy"), str(tmp_path / "big.npy"), str(axis)]
    run = subprocess.run([sys.executable, "-c", PEAK, *names], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 90  # two blocks of 32 MB, and some room; the file has 286 MB
    assert (tmp_path / "big.npy.out").stat().st_size == (tmp_path / "big.npy").stat().st_size
    (tmp_path / "big.npy.out").unlink()
