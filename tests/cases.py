"""Shapes, data and buffers that the tests are parametrized with."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

import fastbn
from fastbn.kernels import _cpu, dispatch

# Instruction set levels of this build that the processor has.
LEVELS = tuple(level for level in dispatch.built() if level in _cpu.supported())
DTYPES = (np.float32, np.float64)
THREADS = (1, 2, 3)

# (shape, channel axis). Planar: a channel's values are contiguous runs. Interleaved: channels are neighbours.
PLANAR = (
    ((16, 5, 7, 7), 1),
    ((33, 3, 4, 1), 1),
    ((70, 9, 3), 1),
    ((2, 3, 64, 65), 1),
    ((1, 2, 211, 97), 1),
    ((4, 33, 11, 11), 1),
    ((3, 2000), 0),
    ((211, 2, 7, 7), 1),  # several parts of many small planes, the last one shorter
    ((101, 3, 8, 5), 1),
)
INTERLEAVED = (
    ((3000, 1), -1),
    ((2001, 3), -1),
    ((1500, 7), -1),
    ((6, 15, 15, 10), -1),
    ((777, 33), -1),
    ((5, 8, 9, 64), -1),
    ((201, 257), -1),
    ((130, 1100), -1),  # wider than a task
    ((1900, 5, 3, 2), 1),  # planes so small that a row of them is walked like channels
)
BOTH = PLANAR + INTERLEAVED
SMALL = (((6, 5), -1), ((4, 3, 5, 2), 1), ((3, 4, 4, 3), -1), ((9,), -1), ((2, 3, 2, 2, 3), 2))


def name(case) -> str:
    """A test id for a (shape, axis) pair."""
    shape, axis = case
    return "x".join(map(str, shape)) + f"@{axis}"


def normal(shape, dtype=np.float32, *, mean=0.0, deviation=1.0, seed=0) -> np.ndarray:
    """Normal data, generated in float64 and rounded once."""
    rng = np.random.default_rng([seed, *shape])
    return (mean + deviation * rng.standard_normal(shape)).astype(dtype)


@functools.cache
def _drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(1_000_003, dtype=np.float32)


def many(shape, dtype=np.float32, *, seed=0) -> np.ndarray:
    """Normal data for a large array: a million values over and over, since drawing all takes longer than its test.

    They are a prime number, so that neither rows nor planes repeat.
    """
    return np.resize(_drawn(seed), shape).astype(dtype, copy=False)


def parameters(channels: int, dtype=np.float32, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """gamma around 1 of both signs, beta around 0."""
    rng = np.random.default_rng([seed, channels, 7])
    sign = np.where(rng.random(channels) < 0.2, -1.0, 1.0)
    return (sign * rng.uniform(0.5, 1.5, channels)).astype(dtype), rng.uniform(-1, 1, channels).astype(dtype)


def moving(channels: int, dtype=np.float32, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Moving statistics that are not the initial 0 and 1."""
    rng = np.random.default_rng([seed, channels, 11])
    return rng.uniform(-2, 2, channels).astype(dtype), rng.uniform(0.25, 4, channels).astype(dtype)


def batch_statistics(x, *, axis=-1, ddof=0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance that a training call computes, in float64: momentum 0 keeps nothing of the old
    values."""
    shape = channel_shape(x, axis)
    mean, variance = np.full(shape, 3.0), np.full(shape, 5.0)
    fastbn.batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.0, axis=axis, ddof=ddof)
    return mean, variance


def channel_shape(x, axis) -> tuple[int, ...]:
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(np.shape(x)[a] for a in axes)


@contextlib.contextmanager
def own_cache(size: int) -> Iterator[None]:
    """Let the drivers walk memory as is best with so many bytes of cache for each core."""
    drivers = dispatch.drivers(dispatch.level)
    before = [driver.set_own_cache(size) for driver in drivers]
    assert before == [_cpu.own_cache()] * 2
    try:
        yield
    finally:
        for driver, old in zip(drivers, before, strict=True):
            driver.set_own_cache(old)


def training_results(x, dy, *, gamma, beta, axis, activation=None, out=None, dx_out=None) -> dict[str, np.ndarray]:
    """Everything that a training step gives: output, moving statistics, gradients."""
    channels = math.prod(channel_shape(x, axis))
    mean, variance = moving(channels, np.float64)
    y, cache = fastbn.batch_norm_forward(
        x,
        gamma=gamma,
        beta=beta,
        moving_mean=mean,
        moving_variance=variance,
        training=True,
        axis=axis,
        activation=activation,
        out=out,
    )
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache, out=dx_out)
    return {"y": y, "mean": mean, "variance": variance, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def call(channels: int = 6) -> dict[str, object]:
    """The arguments of a training call in which all is right."""
    gamma, beta = parameters(channels)
    mean, variance = moving(channels)
    return {
        "x": normal((4, channels)),
        "gamma": gamma,
        "beta": beta,
        "moving_mean": mean,
        "moving_variance": variance,
        "training": True,
        "out": np.full((4, channels), 5, np.float32),
    }


def snapshot(*values) -> list[tuple[np.ndarray, bytes]]:
    """The arrays among the values, or among those of dicts, with their bytes."""
    flat = [v for value in values for v in (value.values() if isinstance(value, dict) else (value,))]
    return [(v, v.tobytes()) for v in flat if isinstance(v, np.ndarray) and v.dtype != object]


def unchanged(before) -> bool:
    return all(array.tobytes() == content for array, content in before)


@dataclass
class Guarded:
    """Arrays inside larger buffers whose other bytes are all ones: NaN to whoever reads them, and checked
    afterwards."""

    pad: int = 256
    buffers: list[tuple[np.ndarray, int, int]] = field(default_factory=list)

    def empty(self, shape, dtype) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = np.full(nbytes + 2 * self.pad, 0xFF, np.uint8)
        self.buffers.append((buffer, self.pad, nbytes))
        return buffer[self.pad : self.pad + nbytes].view(dtype).reshape(shape)

    def copy(self, a) -> np.ndarray:
        guarded = self.empty(a.shape, a.dtype)
        guarded[...] = a
        return guarded

    def check(self) -> None:
        for buffer, start, nbytes in self.buffers:
            assert (buffer[:start] == 0xFF).all(), "bytes before an array were written"
            assert (buffer[start + nbytes :] == 0xFF).all(), "bytes behind an array were written"
