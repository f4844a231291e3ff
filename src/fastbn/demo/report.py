"""Tables and plots of the demo."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from .timing import Timing
from .training import Comparison, Deviation, History, Rate, Settings

__all__ = [
    "accuracy_table",
    "deviation_table",
    "plot_accuracy",
    "plot_statistics",
    "sweep_table",
    "timing_table",
]

# Those of `fastbn.plot`, which needs Matplotlib.
COLOURS = ("#0072B2", "#D55E00", "#009E73")


def accuracy_table(found: Comparison, images: int, settings: Settings) -> str:
    """Test accuracy by the statistics used."""
    rows = [
        ("moving statistics", found.moving, "what inference uses"),
        ("statistics of the training set", found.exact, "computed at the final weights, for comparison"),
        ("batch statistics", found.batch, f"of the {images} test images as one batch"),
        ("untouched statistics", found.untouched, "mean 0, variance 1: the classic mistake"),
        ("without batch norm", found.without, "the same weights at the start, the same batches"),
    ]
    lines = [
        f"Test accuracy on {images} images after {settings.epochs} epochs at learning rate {settings.rate}",
        "",
        *(f"  {name:<31} {100 * value:5.1f} %   {note}" for name, value, note in rows),
    ]
    if found.warnings:
        lines += ["", "  With untouched statistics fastbn warned, once for each layer (UntrainedWarning):"]
        for message in dict.fromkeys(found.warnings):
            lines += _paragraph(message, "    ")
    return "\n".join(lines)


def _paragraph(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, 96, initial_indent=indent, subsequent_indent=indent)


def sweep_table(rows: list[Rate], settings: Settings) -> str:
    """Accuracy and speed of learning over learning rates."""

    remark = (
        "-: not in every run. At a well chosen rate both end up close together; batch norm gets there "
        "sooner, and forgives rates that are too large."
    )

    def epochs(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    return "\n".join(
        [
            "The same over learning rates: test accuracy, and epochs until it reaches 95 %, "
            f"mean of {settings.seeds} seed{'s' if settings.seeds > 1 else ''}",
            "",
            f"  {'learning rate':>13}   {'without batch norm':>20}   {'with batch norm':>20}",
            *(
                f"  {row.rate:>13g}   {100 * row.final[False]:>10.1f} % {epochs(row.epochs[False]):>7}"
                f"   {100 * row.final[True]:>10.1f} % {epochs(row.epochs[True]):>7}"
                for row in rows
            ),
            "",
            *_paragraph(remark),
        ]
    )


def deviation_table(rows: list[Deviation], settings: Settings) -> str:
    """Moving statistics against those of the whole training set."""
    labels = {"moving": "after training", "held still": "weights held still"}
    remark = (
        f"Momentum {settings.momentum} averages over about {round(1 / (1 - settings.momentum))} batches. "
        "They saw other weights than the final ones, and the second layer feels the first one move too: the "
        "moving statistics lag. After 3 more epochs with the weights held still, what remains is the scatter "
        f"of batches of {settings.batch_size} images."
    )
    return "\n".join(
        [
            "Moving statistics against those of the whole training set at the final weights",
            "",
            f"  {'':<7} {'':<19} {'mean, in deviations':>21}   {'variance, relative':>20}",
            f"  {'layer':<7} {'':<19} {'median':>12} {'max':>8}   {'median':>11} {'max':>8}",
            *(
                f"  {row.layer:<7} {labels[row.weights]:<19} {row.mean_median:>12.3f} {row.mean_max:>8.3f}"
                f"   {row.variance_median:>11.3f} {row.variance_max:>8.3f}"
                for row in rows
            ),
            "",
            *_paragraph(remark),
        ]
    )


def timing_table(rows: list[Timing], *, batch_norm: float, training: float) -> str:
    """Time of batch norm by contender."""
    names = list(rows[0].seconds)
    lines = [
        f"Time: batch norm took {batch_norm:.2f} s of a training run of {training:.2f} s",
        "",
        "  One forward and backward in microseconds, float32, channels last, best of many calls",
        f"  {'':<24} {'shape':>16} " + " ".join(f"{name:>10}" for name in names),
    ]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        lines.append(
            f"  {row.label:<24} {shape:>16} " + " ".join(f"{1e6 * row.seconds[name]:>10.0f}" for name in names)
        )
    return "\n".join(lines)


def _figure(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    # A figure without pyplot needs no display, touches no global state, and is collected like any object.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def plot_statistics(history: History, settings: Settings, path: Path, channels: int = 3) -> None:
    """Moving mean and variance of some channels over the steps, beside their true values.

    Parameters
    ----------
    history : History
        Of the network with batch norm.
    settings : Settings
    path : Path
        The PNG file to write.
    channels : int
        How many channels of each layer to show: those whose true mean moved most.
    """
    plot = importlib.import_module("fastbn.plot")
    layers = len(history.moving_mean[0])
    figure, axes = _figure(11, 3.4 * layers + 0.6, layers, 2, sharex=True, squeeze=False)
    for layer in range(layers):
        drift = np.ptp([part[layer] for part in history.true_mean], axis=0)
        chosen = np.argsort(drift)[::-1][:channels]
        for panel, name, moving, true in (
            (axes[layer, 0], "mean", history.moving_mean, history.true_mean),
            (axes[layer, 1], "variance", history.moving_variance, history.true_variance),
        ):
            rows, truth = ([part[layer] for part in parts] for parts in (moving, true))
            plot.statistics(rows, truth, channels=chosen, name=name, ax=panel)
            panel.set_title(f"batch norm layer {layer + 1}: {name}")
            if layer < layers - 1:
                panel.set_xlabel("")
        axes[layer, 1].get_legend().remove()
    figure.suptitle(f"Moving statistics (bold, momentum {settings.momentum}) follow those of the training set (thin)")
    figure.savefig(path, dpi=120)


def plot_accuracy(history: History, without: History, rates: list[Rate], settings: Settings, path: Path) -> None:
    """Test accuracy over steps and learning rates: with batch norm, without, with the classic mistake."""
    figure, (left, right) = _figure(12, 4.8, 1, 2, sharey=True, width_ratios=(3, 2))
    mistake = {"color": COLOURS[2], "linewidth": 1.2, "linestyle": "--"}
    left.plot(
        history.steps,
        np.multiply(100, history.accuracy),
        color=COLOURS[0],
        linewidth=2,
        label="with batch norm",
    )
    left.plot(
        without.steps,
        np.multiply(100, without.accuracy),
        color=COLOURS[1],
        linewidth=2,
        label="without batch norm",
    )
    left.plot(
        history.steps,
        np.multiply(100, history.untouched),
        label="with, but statistics left at 0 and 1",
        **mistake,
    )
    left.set(
        xlabel=f"training step (batches of {settings.batch_size})",
        ylabel="test accuracy (%)",
        ylim=(0, 103),
        title=f"Handwritten digits, Adam at learning rate {settings.rate}",
    )
    left.margins(x=0.01)
    left.legend(loc="lower right", bbox_to_anchor=(1, 0.12))
    at = [row.rate for row in rates]
    for batch_norm, colour, label in ((True, COLOURS[0], "with"), (False, COLOURS[1], "without")):
        final = [100 * row.final[batch_norm] for row in rates]
        right.plot(at, final, "o-", color=colour, linewidth=2, label=f"{label} batch norm")
    seeds = f"mean of {settings.seeds} seeds" if settings.seeds > 1 else "one seed"
    right.set(xscale="log", xlabel="learning rate", title=f"After {settings.epochs} epochs, {seeds}")
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.axhline(10, color="grey", linewidth=0.8, linestyle=":")
        panel.text(0.02, 11, "guessing", transform=panel.get_yaxis_transform(), color="grey", fontsize="small")
    figure.savefig(path, dpi=120)
