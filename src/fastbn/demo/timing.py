"""What batch norm costs: fastbn beside the NumPy formula and beside PyTorch, on the same arrays.

Contenders run in blocks, not in turns, because idle OpenMP workers of one library spin for a while and
would slow down the next one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layer import BatchNorm
from ..threads import get_num_threads, threads

__all__ = ["Timing", "time_batch_norm"]

Array = NDArray[Any]
EPSILON = 1e-3


@dataclass(frozen=True)
class Timing:
    """Seconds of one training forward and backward, by contender."""

    label: str
    shape: tuple[int, ...]
    seconds: dict[str, float]


def numpy_formula(x: Array, dy: Array, gamma: Array, beta: Array) -> tuple[Array, Array, Array, Array]:
    """Training forward and backward over the last axis, as it is usually written in NumPy."""
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    inverse = 1 / np.sqrt(x.var(axis=axes) + np.float32(EPSILON))
    x_hat = (x - x.mean(axis=axes)) * inverse
    y = gamma * x_hat + beta
    dbeta = dy.sum(axis=axes)
    dgamma = (dy * x_hat).sum(axis=axes)
    dx = gamma * inverse * (dy - dbeta / np.float32(count) - x_hat * (dgamma / np.float32(count)))
    return y, dx, dgamma, dbeta


def time_batch_norm(shapes: dict[str, tuple[int, ...]], *, seconds: float, torch: bool = True) -> list[Timing]:
    """Time every contender on every shape, channels last, float32; "x2" stands for two threads.

    Parameters
    ----------
    shapes : dict of str to tuple of int
        Labels and shapes.
    seconds : float
        How long each contender runs on each shape.
    torch : bool
        Whether to import PyTorch if it is installed.
    """
    arrays = {}
    rng = np.random.default_rng(0)
    for label, shape in shapes.items():
        arrays[label] = (rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32))
    contenders: dict[str, Callable[[Array, Array], Callable[[], object]]] = {
        f"fastbn x{n}": partial(_fastbn, team=n) for n in sorted({1, get_num_threads()})
    }
    contenders["NumPy"] = _numpy
    if torch and importlib.util.find_spec("torch") is not None:
        contenders["PyTorch"] = _torch
    found: dict[str, dict[str, float]] = {label: {} for label in shapes}
    for name, prepare in contenders.items():
        for label, (x, dy) in arrays.items():
            found[label][name] = _best(prepare(x, dy), seconds)
    return [Timing(label, shapes[label], found[label]) for label in shapes]


def _best(call: Callable[[], object], seconds: float) -> float:
    """The fastest of many calls: what disturbs a call only ever makes it slower."""
    call()
    times: list[float] = []
    end = perf_counter() + seconds
    while (start := perf_counter()) < end or len(times) < 10:
        call()
        times.append(perf_counter() - start)
    return min(times)


def _fastbn(x: Array, dy: Array, team: int) -> Callable[[], object]:
    norm = BatchNorm(x.shape[-1], epsilon=EPSILON)

    def call() -> None:
        with threads(team):
            norm(x, training=True)
            norm.backward(dy)

    return call


def _numpy(x: Array, dy: Array) -> Callable[[], object]:
    gamma, beta = np.ones(x.shape[-1], x.dtype), np.zeros(x.shape[-1], x.dtype)
    return lambda: numpy_formula(x, dy, gamma, beta)


def _torch(x: Array, dy: Array) -> Callable[[], object]:
    torch: Any = importlib.import_module("torch")
    # PyTorch wants the channels second; the memory stays as it is (its "channels_last").
    order = (0, x.ndim - 1, *range(1, x.ndim - 1))
    tensor = torch.from_numpy(x).permute(order).requires_grad_()
    gradient = torch.from_numpy(dy).permute(order)
    channels = x.shape[-1]
    norm = torch.nn.BatchNorm1d(channels) if x.ndim == 2 else torch.nn.BatchNorm2d(channels)

    def call() -> None:
        tensor.grad = norm.weight.grad = norm.bias.grad = None
        norm(tensor).backward(gradient)

    return call
