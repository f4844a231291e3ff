"""``fastbn demo``: batch norm on real data, in seconds.

A small dense network learns the handwritten digits that scikit-learn ships, with and without batch norm.
The demo prints what the choice of statistics does to the accuracy, how close moving statistics come to the
true ones, and what batch norm costs; it saves two plots. Everything but the times is determined by the
seed.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from . import report, timing, training

__all__ = ["Result", "run"]


@dataclass(frozen=True)
class Result:
    """What a run found, as printed."""

    accuracy: training.Comparison
    deviations: list[training.Deviation]
    rates: list[training.Rate]
    timings: list[timing.Timing]
    plots: list[Path]


def run(
    output: str | os.PathLike[str] = "fastbn-demo",
    *,
    quick: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Train, print the tables, save the plots.

    Parameters
    ----------
    output : path-like
        The folder for the plots; made if it does not exist.
    quick : bool
        Fewer epochs, rates, seeds and timings.
    seed : int
        Of weights, batches and the split of the data.
    progress : bool
        Whether to draw a bar on stderr, if that is a terminal.

    Returns
    -------
    Result

    Raises
    ------
    ImportError
        If scikit-learn, Matplotlib or tqdm is missing; the message says what to install.
    """
    _require("sklearn.datasets", "scikit-learn")
    _require("matplotlib.figure", "Matplotlib")
    _require("tqdm", "tqdm")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = training.Settings(seed=seed)
    if quick:
        settings = replace(settings, epochs=8, rates=(0.003, 0.03, 0.3), seeds=1)
    digits = load_digits(seed)

    with _one_thread():
        network, without = settings.network(batch_norm=True), settings.network(batch_norm=False)
        history, history_without = training.History(), training.History()
        steps = settings.epochs * (len(digits.x) // settings.batch_size)
        with _bar(2 * steps, "training", progress) as step:
            training.train(network, digits, settings, history=history, progress=step)
            training.train(without, digits, settings, history=history_without, progress=step)
        found = training.compare(network, without, digits)
        print(report.accuracy_table(found, len(digits.test_x), settings), end="\n\n")

        with _bar(2 * steps * len(settings.rates) * settings.seeds, "learning rates", progress) as step:
            rates = training.sweep(digits, settings, step)
        print(report.sweep_table(rates, settings), end="\n\n")

        deviations = training.deviations(network, digits, settings)
        print(report.deviation_table(deviations, settings), end="\n\n")
        batch_norm, total = time_training(digits, settings)

    shapes: dict[str, tuple[int, ...]] = {
        "a batch of this demo": (settings.batch_size, settings.hidden),
        "its whole training set": (len(digits.x), settings.hidden),
    }
    if not quick:
        shapes["a convolution's output"] = (16, 56, 56, 64)
    timings = timing.time_batch_norm(shapes, seconds=0.05 if quick else 0.4, torch=not quick)
    print(
        report.timing_table(timings, batch_norm=batch_norm, training=total),
        end="\n\n",
    )

    plots = [folder / "statistics.png", folder / "accuracy.png"]
    report.plot_statistics(history, settings, plots[0])
    report.plot_accuracy(history, history_without, rates, settings, plots[1])
    print("Plots: " + ", ".join(map(str, plots)))
    return Result(found, deviations, rates, timings, plots)


def load_digits(seed: int) -> training.Digits:
    """The digits of scikit-learn, a quarter of them for testing, every label in proportion."""
    images: Any
    images, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    x, test_x, labels, test_labels = importlib.import_module("sklearn.model_selection").train_test_split(
        (images / 16).astype(np.float32), labels, test_size=0.25, random_state=seed, stratify=labels
    )
    return training.Digits(x, labels, test_x, test_labels)


def time_training(digits: training.Digits, settings: training.Settings) -> tuple[float, float]:
    """Seconds in batch norm and in total of a training run in which nothing is recorded."""
    network = settings.network(batch_norm=True)
    start = perf_counter()
    training.train(network, digits, settings)
    return network.batch_norm_seconds, perf_counter() - start


def _require(module: str, name: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'the demo needs {name}: pip install "fastbn[demo]"') from error


def _one_thread() -> Any:
    """Limit BLAS and OpenMP to one thread: small matrices gain nothing from more, and idle workers spin."""
    return importlib.import_module("threadpoolctl").threadpool_limits(1)


@contextmanager
def _bar(total: int, label: str, wanted: bool) -> Iterator[Callable[[], object] | None]:
    if not (wanted and sys.stderr is not None and sys.stderr.isatty()):
        yield None
        return
    with importlib.import_module("tqdm").tqdm(total=total, desc=label, unit="step", leave=False) as bar:
        yield bar.update
