"""The experiments of the demo: what is trained, what is recorded, what is compared."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UntrainedWarning
from ..layer import BatchNorm
from .network import Adam, Network

__all__ = [
    "Comparison",
    "Digits",
    "History",
    "Settings",
    "accuracy",
    "compare",
    "deviations",
    "sweep",
    "train",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class Digits:
    """8x8 images of handwritten digits: pixels in [0, 1] and labels, for training and for testing."""

    x: Array
    labels: Array
    test_x: Array
    test_labels: Array


@dataclass(frozen=True)
class Settings:
    """What the demo fixes.

    The learning rate is far above what suits Adam here, because there batch norm shows most; `sweep` puts
    it beside others, the good ones for a network without batch norm included.
    """

    seed: int = 0
    epochs: int = 20
    batch_size: int = 64
    hidden: int = 128
    rate: float = 0.1
    momentum: float = 0.9
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    seeds: int = 3

    def network(self, *, batch_norm: bool, seed: int | None = None) -> Network:
        """A new network; the same weights with and without batch norm."""
        rng = np.random.default_rng(self.seed if seed is None else seed)
        sizes = (64, self.hidden, self.hidden, 10)
        return Network(sizes, rng, batch_norm=batch_norm, momentum=self.momentum)


@dataclass
class History:
    """What a training run records: statistics of each batch norm at every step, accuracy at every fifth."""

    moving_mean: list[list[Array]] = field(default_factory=list)
    moving_variance: list[list[Array]] = field(default_factory=list)
    true_mean: list[list[Array]] = field(default_factory=list)
    true_variance: list[list[Array]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    untouched: list[float] = field(default_factory=list)

    def record_statistics(self, network: Network, x: Array) -> None:
        """Moving statistics beside those of the whole of `x` at the present weights."""
        true = network.statistics(x)
        self.moving_mean.append([np.array(norm.moving_mean) for norm in network.norms])
        self.moving_variance.append([np.array(norm.moving_variance) for norm in network.norms])
        self.true_mean.append([part.mean for part in true])
        self.true_variance.append([part.variance() for part in true])


def accuracy(logits: Array, labels: Array) -> float:
    """Share of rows whose largest logit is that of the label."""
    return float(np.mean(logits.argmax(axis=1) == labels))


def train(
    network: Network,
    digits: Digits,
    settings: Settings,
    *,
    rate: float | None = None,
    seed: int | None = None,
    history: History | None = None,
    progress: Callable[[], object] | None = None,
) -> list[float]:
    """Train in place; the test accuracy after each epoch.

    The batches depend on the seed only, so two networks see the same ones.
    """
    rng = np.random.default_rng([settings.seed if seed is None else seed, 1])
    optimizer = Adam(network.parameters(), settings.rate if rate is None else rate)
    per_epoch = []
    for _ in range(settings.epochs):
        order = rng.permutation(len(digits.x))
        for start in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            rows = order[start : start + settings.batch_size]
            _, gradients = network.train_gradients(digits.x[rows], digits.labels[rows])
            optimizer.step(gradients)
            if history is not None:
                _record(history, network, digits, optimizer.steps)
            if progress is not None:
                progress()
        per_epoch.append(accuracy(network(digits.test_x), digits.test_labels))
    return per_epoch


def _record(history: History, network: Network, digits: Digits, step: int) -> None:
    if network.norms:
        history.record_statistics(network, digits.x)
    if step % 5 and step > 20:  # early steps matter most and are cheap to show in full
        return
    history.steps.append(step)
    history.accuracy.append(accuracy(network(digits.test_x), digits.test_labels))
    if network.norms:
        logits, _ = untouched_logits(network, digits.test_x)
        history.untouched.append(accuracy(logits, digits.test_labels))


def untouched_logits(network: Network, x: Array) -> tuple[Array, list[str]]:
    """The classic mistake: trained gamma and beta beside moving statistics that no batch ever reached.

    Returns the logits and the `UntrainedWarning` messages that came with them.
    """
    fresh = []
    for norm in network.norms:
        gamma, beta, *_ = norm.variables
        other = BatchNorm(gamma.size, epsilon=norm.epsilon, dtype=gamma.dtype)
        other.gamma, other.beta = gamma, beta  # copies: assigning writes into the layer's own arrays
        fresh.append(other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = network.with_norms(fresh)(x)
    return logits, [str(w.message) for w in caught if issubclass(w.category, UntrainedWarning)]


@dataclass(frozen=True)
class Comparison:
    """Test accuracy of a network under every choice of statistics, and of its twin without batch norm."""

    moving: float
    batch: float
    exact: float
    untouched: float
    without: float
    warnings: list[str]


def compare(network: Network, without: Network, digits: Digits) -> Comparison:
    """Test accuracy by the statistics that batch norm uses."""
    exact = []
    for norm, true in zip(network.norms, network.statistics(digits.x), strict=True):
        other = copy.deepcopy(norm)
        state = norm.state_dict() | {"moving_mean": true.mean, "moving_variance": true.variance()}
        other.load_state_dict(state)
        exact.append(other)
    untouched, messages = untouched_logits(network, digits.test_x)

    def of(logits: Array) -> float:
        return accuracy(logits, digits.test_labels)

    return Comparison(
        moving=of(network(digits.test_x)),
        batch=of(network.batch_logits(digits.test_x)),
        exact=of(network.with_norms(exact)(digits.test_x)),
        untouched=of(untouched),
        without=of(without(digits.test_x)),
        warnings=messages,
    )


@dataclass(frozen=True)
class Deviation:
    """How far moving statistics are from those of the whole training set, over the channels of one layer.

    Means in units of the true standard deviation, variances relative to the true ones.
    """

    layer: int
    weights: str
    mean_median: float
    mean_max: float
    variance_median: float
    variance_max: float


def deviations(network: Network, digits: Digits, settings: Settings) -> list[Deviation]:
    """Moving statistics against true ones: after training, and after more batches at the same weights."""
    held = network.with_norms(copy.deepcopy(network.norms))
    rng = np.random.default_rng([settings.seed, 2])
    for _ in range(3):
        order = rng.permutation(len(digits.x))
        for start in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            rows = order[start : start + settings.batch_size]
            held.train_gradients(digits.x[rows], digits.labels[rows])  # moves statistics; nothing moves the weights
    true = network.statistics(digits.x)
    found = []
    for layer in range(len(network.norms)):
        for label, norms in (("moving", network.norms), ("held still", held.norms)):
            norm, variance = norms[layer], true[layer].variance()
            by_mean = np.abs(norm.moving_mean - true[layer].mean) / np.sqrt(variance)
            by_variance = np.abs(norm.moving_variance / variance - 1)
            found.append(
                Deviation(
                    layer + 1,
                    label,
                    float(np.median(by_mean)),
                    float(by_mean.max()),
                    float(np.median(by_variance)),
                    float(by_variance.max()),
                )
            )
    return found


@dataclass(frozen=True)
class Rate:
    """Final test accuracy and epochs until 95 % at a learning rate, without and with batch norm."""

    rate: float
    final: dict[bool, float]
    epochs: dict[bool, float | None]


def sweep(digits: Digits, settings: Settings, progress: Callable[[], object] | None = None) -> list[Rate]:
    """The same comparison over learning rates and seeds, so that no single choice decides it."""
    rows = []
    for rate in settings.rates:
        final: dict[bool, float] = {}
        epochs: dict[bool, float | None] = {}
        for batch_norm in (False, True):
            runs = []
            for seed in range(settings.seed, settings.seed + settings.seeds):
                network = settings.network(batch_norm=batch_norm, seed=seed)
                with np.errstate(over="ignore", invalid="ignore"):  # without batch norm, large rates may diverge
                    runs.append(train(network, digits, settings, rate=rate, seed=seed, progress=progress))
            final[batch_norm] = float(np.mean([run[-1] for run in runs]))
            firsts = [next((epoch for epoch, a in enumerate(run, 1) if a >= 0.95), None) for run in runs]
            reached = [first for first in firsts if first is not None]
            epochs[batch_norm] = sum(reached) / len(reached) if len(reached) == len(firsts) else None
        rows.append(Rate(rate, final, epochs))
    return rows
