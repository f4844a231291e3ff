"""A small dense network, forward and backward, from NumPy and `fastbn.BatchNorm`.

dense, batch norm, relu, dense, batch norm, relu, dense; softmax cross entropy; Adam. Without batch norm the
two layers are left out, and nothing else changes.
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional import batch_norm
from ..layer import BatchNorm
from ..moments import Moments, moments

__all__ = ["Adam", "Network", "cross_entropy"]

Array = NDArray[Any]


class Network:
    """Dense layers with batch norm between them.

    Parameters
    ----------
    sizes : tuple of int
        Width of the input, of each hidden layer, and of the output.
    rng : numpy.random.Generator
        Draws the weights, from a normal distribution of variance 2 / inputs (He).
    batch_norm : bool
        Whether a batch norm stands before each relu.
    momentum : float
        Share of the old moving statistics that each batch keeps.
    dtype : numpy.dtype
        float32 or float64.

    Attributes
    ----------
    norms : list of BatchNorm
    batch_norm_seconds : float
        Time spent in batch norm by `train_gradients`, forward and backward.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        rng: np.random.Generator,
        *,
        batch_norm: bool = True,
        momentum: float = 0.9,
        dtype: Any = np.float32,
    ) -> None:
        pairs = list(pairwise(sizes))
        self.weights = [(rng.standard_normal(pair) * np.sqrt(2 / pair[0])).astype(dtype) for pair in pairs]
        self.biases = [np.zeros(outputs, dtype) for _, outputs in pairs]
        self.norms = [BatchNorm(width, momentum=momentum, dtype=dtype) for width in sizes[1:-1] if batch_norm]
        self.batch_norm_seconds = 0.0

    def parameters(self) -> list[Array]:
        """What gradients train, in the order of `train_gradients`."""
        return [*self.weights, *self.biases, *(a for norm in self.norms for a in (norm.gamma, norm.beta))]

    def __call__(self, x: Array) -> Array:
        """Inference: the logits, normalized with the moving statistics."""
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            if index < len(self.norms):
                x = self.norms[index](x)
            if index < len(self.weights) - 1:
                x = np.maximum(x, 0)
        return x

    def train_gradients(self, x: Array, labels: Array) -> tuple[float, list[Array]]:
        """One training pass: the loss and its gradient by every parameter; moving statistics are updated."""
        inputs: list[Array] = []
        hidden = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs.append(x)
            x = x @ weight + bias
            if index < hidden:
                if self.norms:
                    start = perf_counter()
                    x = self.norms[index](x, training=True)
                    self.batch_norm_seconds += perf_counter() - start
                x = np.maximum(x, 0)
        loss, dx = cross_entropy(x, labels)

        d_weights: list[Array] = []
        d_biases: list[Array] = []
        for index in reversed(range(len(self.weights))):
            if index < hidden:
                dx = dx * (inputs[index + 1] > 0)
                if self.norms:
                    start = perf_counter()
                    dx = self.norms[index].backward(dx)
                    self.batch_norm_seconds += perf_counter() - start
            d_weights.insert(0, inputs[index].T @ dx)
            d_biases.insert(0, dx.sum(axis=0))
            if index:
                dx = dx @ self.weights[index].T
        d_norms = [norm.grads[name] for norm in self.norms for name in ("gamma", "beta")]
        return loss, [*d_weights, *d_biases, *d_norms]

    def statistics(self, x: Array) -> list[Moments]:
        """Exact statistics of what enters each batch norm when `x` is one batch."""
        found: list[Moments] = []
        self._batch_pass(x, found)
        return found

    def batch_logits(self, x: Array) -> Array:
        """The logits in mode ``batch``: `x` is normalized with itself, moving statistics stay as they are."""
        return self._batch_pass(x)

    def _batch_pass(self, x: Array, found: list[Moments] | None = None) -> Array:
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            if index < len(self.norms):
                if found is not None:
                    found.append(moments(x))
                norm = self.norms[index]
                x = batch_norm(x, gamma=norm.gamma, beta=norm.beta, epsilon=norm.epsilon, training=True, update=False)
            if index < len(self.weights) - 1:
                x = np.maximum(x, 0)
        return x

    def with_norms(self, norms: list[BatchNorm]) -> Network:
        """The same weights around other batch norm layers."""
        other = Network.__new__(Network)
        other.weights, other.biases, other.norms = self.weights, self.biases, norms
        other.batch_norm_seconds = 0.0
        return other


class Adam:
    """Adam (Kingma and Ba, 2015), in place.

    Parameters
    ----------
    parameters : list of ndarray
        The arrays to train.
    rate : float
        The learning rate.
    """

    def __init__(self, parameters: list[Array], rate: float) -> None:
        self.parameters, self.rate, self.steps = parameters, rate, 0
        self.first = [np.zeros_like(parameter) for parameter in parameters]
        self.second = [np.zeros_like(parameter) for parameter in parameters]

    def step(self, gradients: list[Array]) -> None:
        """Move every parameter against its gradient."""
        self.steps += 1
        rate = self.rate * np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for parameter, gradient, first, second in zip(self.parameters, gradients, self.first, self.second, strict=True):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient * gradient - second)
            parameter -= (rate * first / (np.sqrt(second) + 1e-8)).astype(parameter.dtype)


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Mean softmax cross entropy of integer labels, and its gradient by the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(totals[:, 0]) - shifted[rows, labels]))
    gradient = exponentials / totals
    gradient[rows, labels] -= 1
    gradient /= len(labels)
    return loss, gradient
