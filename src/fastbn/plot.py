"""Plots with Matplotlib: statistics, accuracy and speed. Every function draws on ``ax`` and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .errors import must

try:
    from matplotlib import colors, ticker
except ImportError as error:
    raise ImportError('fastbn.plot needs Matplotlib: pip install "fastbn[plot]"') from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["accuracy", "bandwidth", "roofline", "scaling", "speedups", "statistics"]

# Of Okabe and Ito: told apart with any colour vision. The first is fastbn's.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS: Final = "os^Dv*"
GRID: Final[dict[str, Any]] = {"alpha": 0.25}
LIMIT: Final[dict[str, Any]] = {"color": "black", "linestyle": "--", "linewidth": 1.2}


def statistics(
    moving: ArrayLike,
    true: ArrayLike | None = None,
    *,
    steps: ArrayLike | None = None,
    channels: int | Sequence[int] = 3,
    momentum: float | None = None,
    name: str = "mean",
    ax: Axes | None = None,
) -> Axes:
    """Draw moving statistics over the steps of a training, bold, beside the true ones, thin.

    Parameters
    ----------
    moving : array_like of shape (steps, channels)
        The moving mean, or variance, after every step.
    true : array_like of shape (steps, channels) or (channels,), optional
        What it should be: of the whole data at each step, or of data that do not change.
    steps : array_like of shape (steps,), optional
        Where the rows belong; 1, 2, ... by default.
    channels : int or sequence of int, default: 3
        Which channels to show, or how many: those whose true (or else moving) statistic moved most.
    momentum : float, optional
        Marks the horizon of the moving average, 1 / (1 - momentum) steps, where that is among the steps.
    name : str, default: "mean"
        What the statistic is: the label of the y axis. A "variance" is drawn on a logarithmic one.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If shapes do not fit, there are no steps, or a channel is not one of those there are.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> from fastbn import plot
    >>> rng, bn, moving = np.random.default_rng(0), fastbn.BatchNorm(2, momentum=0.9), []
    >>> for _ in range(50):
    ...     y = bn(rng.normal([3, -1], 2, (64, 2)), training=True)
    ...     moving.append(bn.moving_mean.copy())
    >>> ax = plot.statistics(moving, [3, -1], momentum=0.9)
    >>> ax.get_ylabel()
    'mean'
    """
    rows = np.asarray(moving, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(must("moving", "have shape (steps, channels)", rows.shape))
    if not len(rows):
        raise ValueError(must("moving", "have at least one step", f"shape {rows.shape}"))
    truth = None if true is None else np.asarray(true, dtype=np.float64)
    if truth is not None and truth.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(must("true", f"have shape {rows.shape} or {rows.shape[1:]}", truth.shape))
    at = np.arange(1, len(rows) + 1) if steps is None else np.asarray(steps)
    if at.shape != rows.shape[:1]:
        raise ValueError(must("steps", f"have shape {rows.shape[:1]}", at.shape))
    if isinstance(channels, int | np.integer):
        most = checks.count(channels, "channels")
        moved = np.ptp(rows if truth is None or truth.ndim == 1 else truth, axis=0)
        chosen = [int(c) for c in np.argsort(moved, kind="stable")[::-1][:most]]
    else:
        chosen = [int(c) for c in channels]
    for channel in chosen:
        if not 0 <= channel < rows.shape[1]:
            raise ValueError(must("channels", f"be from 0 to {rows.shape[1] - 1}", channel))
    ax = _axes(ax)
    for i, channel in enumerate(chosen):
        colour = COLOURS[i % len(COLOURS)]
        if truth is not None:
            line = np.broadcast_to(truth, rows.shape)[:, channel]
            ax.plot(at, line, color=colour, linewidth=0.8, alpha=0.6)
        ax.plot(at, rows[:, channel], color=colour, linewidth=1.8, label=f"channel {channel}")
    if momentum is not None and momentum < 1 and at.min() <= 1 / (1 - momentum) <= at.max():
        label = f"1 / (1 - {momentum:g}) steps"
        ax.axvline(1 / (1 - momentum), color="gray", linewidth=1.2, linestyle=":", label=label)
    ax.set(xlabel="training step", ylabel=name)
    if name == "variance":
        ax.set_yscale("log")
    ax.margins(x=0.01)
    ax.grid(**GRID)
    ax.legend(fontsize="small", ncols=2, handlelength=1.2, columnspacing=1)
    return ax


def accuracy(
    condition: ArrayLike,
    errors: Mapping[str, ArrayLike],
    *,
    bound: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw errors in ulp against the condition number of the data, for one implementation or several.

    Parameters
    ----------
    condition : array_like of shape (n,)
        Condition numbers, such as ``sqrt(1 + mean**2 / variance)``, by which the plain formula of a variance loses.
    errors : mapping of str to array_like of shape (n,)
        The error of each implementation in units of the last place of the result. An error of 0 is drawn at the lower
        edge, a tenth of an ulp; NaN is left out.
    bound : array_like of shape (n,), optional
        An error that is promised, in the same units.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> from fastbn import plot
    >>> ax = plot.accuracy([1, 1e3, 1e6], {"fastbn": [0.4, 0.3, 0.5], "E[x^2] - E[x]^2": [2, 1e6, 1e12]})
    >>> ax.get_xscale(), ax.get_yscale()
    ('log', 'log')
    """
    at = _one_dimensional("condition", condition)
    series = _series("errors", errors, at.shape)
    limit = None if bound is None else _series("bound", {"bound": bound}, at.shape)["bound"]
    ax = _axes(ax)
    floor = 0.1
    for i, (who, values) in enumerate(series.items()):
        ax.plot(at, np.maximum(values, floor), label=who, **_style(i))
    if limit is not None:
        ax.plot(at, limit, label="bound", **LIMIT)
    ax.set(xscale="log", yscale="log", xlabel="condition number", ylabel="error (ulp)")
    ax.set_ylim(bottom=0.8 * floor)
    ax.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    ax.grid(**GRID)
    ax.legend(fontsize="small")
    return ax


def bandwidth(
    nbytes: ArrayLike,
    values: Mapping[str, ArrayLike],
    *,
    limit: ArrayLike | None = None,
    ylabel: str = "GB/s",
    ax: Axes | None = None,
) -> Axes:
    """Draw what an operation reaches against the size of its array, both logarithmic.

    Parameters
    ----------
    nbytes : array_like of shape (n,)
        Sizes of x in bytes.
    values : mapping of str to array_like of shape (n,)
        GB/s, or what `ylabel` says, of each contender; NaN where one was not measured.
    limit : array_like of shape (n,), optional
        What memory allows.
    ylabel : str, default: "GB/s"
        Label of the y axis.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If shapes do not fit, or there is nothing to draw.

    Examples
    --------
    >>> from fastbn import plot
    >>> ax = plot.bandwidth([2**16, 2**22], {"fastbn": [40, 30]}, limit=[60, 35])
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['bandwidth limit', 'fastbn']
    """
    at = _one_dimensional("nbytes", nbytes)
    series = _series("values", values, at.shape)
    roof = None if limit is None else _series("limit", {"limit": limit}, at.shape)["limit"]
    drawn = [*series.values()] if roof is None else [*series.values(), roof]
    if not any((_positive(at) & _positive(line)).any() for line in drawn):  # logarithmic axes need one
        raise ValueError(must("values", "have a positive number at a positive size", "none"))
    ax = _axes(ax)
    if roof is not None:
        ax.plot(at, roof, label="bandwidth limit", **LIMIT)
    for i, (who, line) in enumerate(series.items()):
        there = np.isfinite(line)
        ax.plot(at[there], line[there], label=who, **_style(i))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(base=16, numticks=20))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: _bytes(size)))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set(xlabel="size of x", ylabel=ylabel)
    ax.grid(**GRID)
    ax.legend(fontsize="small")
    return ax


def roofline(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    bandwidth: float,
    peak: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what is computed in a second against arithmetic intensity, below the roof that the machine sets.

    Parameters
    ----------
    points : mapping of str to a pair of array_like
        For each kind of point, operations per byte that must be moved, and giga operations per second.
    bandwidth : float
        GB/s that memory gives: the slanted roof.
    peak : float, optional
        Giga operations per second of the processor: the flat roof.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If shapes do not fit, or a roof or an intensity is not positive.

    Examples
    --------
    >>> from fastbn import plot
    >>> ax = plot.roofline({"inference": ([0.25, 0.25], [4.1, 4.6])}, bandwidth=20, peak=60)
    >>> ax.get_xlabel()
    'operations per byte'
    """
    for name, height in (("bandwidth", bandwidth), ("peak", peak)):
        if height is not None and not height > 0:
            raise ValueError(must(name, "be positive", height))
    pairs = {}
    for who, (x, y) in points.items():
        at = _one_dimensional(f"points[{who!r}][0]", x)
        if not _positive(at).all():
            raise ValueError(must(f"points[{who!r}][0]", "be positive and finite", at[~_positive(at)][0]))
        pairs[who] = at, _series("points", {who: y}, at.shape)[who]
    ax = _axes(ax)
    every = np.concatenate([at for at, _ in pairs.values()]) if pairs else np.ones(1)
    left, right = every.min() / 4, every.max() * 4
    if peak is not None:
        right = max(right, 4 * peak / bandwidth)
    edge = np.geomspace(left, right, 200)
    roof = bandwidth * edge if peak is None else np.minimum(bandwidth * edge, peak)
    ax.plot(edge, roof, color="black", linewidth=1.4, label=f"memory, {bandwidth:.0f} GB/s", zorder=1)
    if peak is not None:
        ax.plot([], [], " ", label=f"processor, {peak:.0f} G operations/s")
    for i, (who, (at, rates)) in enumerate(pairs.items()):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(at, rates, linestyle="", markersize=6, alpha=0.8, label=who, **style)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="G operations/s")
    ax.margins(x=0)
    ax.grid(**GRID)
    ax.legend(fontsize="small", loc="lower right")
    return ax


def scaling(
    threads: ArrayLike,
    times: Mapping[str, ArrayLike],
    *,
    limit: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many times as fast operations are with more threads.

    Parameters
    ----------
    threads : array_like of shape (n,)
        Numbers of threads; the first is what others are compared with.
    times : mapping of str to array_like of shape (n,)
        The time of each operation, in any unit.
    limit : array_like of shape (n,), optional
        The time that memory alone would take.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> from fastbn import plot
    >>> ax = plot.scaling([1, 2, 4], {"train": [9, 5, 3], "inference": [4, 2.4, 2]}, limit=[3, 2, 1.8])
    >>> [float(speed) for speed in ax.lines[0].get_ydata()]
    [1.0, 1.8, 3.0]
    """
    at = _one_dimensional("threads", threads)
    series = _series("times", times, at.shape)
    roof = None if limit is None else _series("limit", {"limit": limit}, at.shape)["limit"]
    ax = _axes(ax)
    for i, (who, time) in enumerate(series.items()):
        ax.plot(at, time[0] / time, label=who, **_style(i))
    if roof is not None:
        ax.plot(at, roof[0] / roof, label="bandwidth limit", **LIMIT)
    ax.plot(at, at / at[0], color="gray", linewidth=0.8, linestyle=":", label="linear")
    ax.set_xticks(at, [f"{n:g}" for n in at])
    first = "one thread" if at[0] == 1 else f"{at[0]:g} threads"
    ax.set(xlabel="threads", ylabel=f"times as fast as with {first}")
    ax.grid(**GRID)
    ax.legend(fontsize="small")
    return ax


def speedups(
    grid: ArrayLike,
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    most: float = 16.0,
    colorbar: bool = True,
    label: str = "times as fast",
    ax: Axes | None = None,
) -> Axes:
    """Draw a heat map of speed-ups: blue above 1, red below, as saturated for 4x as for 1/4.

    Parameters
    ----------
    grid : array_like of shape (rows, columns)
        The speed-ups; NaN where there is none.
    rows, columns : sequence
        What the rows (from below) and the columns (from the left) are.
    most : float, default: 16
        The speed-up of the darkest blue, and, turned over, of the darkest red.
    colorbar : bool, default: True
        Whether to draw the colour bar.
    label : str, default: "times as fast"
        Label of the colour bar.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If shapes do not fit, or `most` is not above 1, or infinite.

    Examples
    --------
    >>> from fastbn import plot
    >>> ax = plot.speedups([[8, 3], [1.2, 0.8]], rows=[1, 64], columns=[49, 3136])
    >>> [text.get_text() for text in ax.texts]
    ['8.0', '3.0', '1.2', '0.8']
    """
    cells = np.asarray(grid, dtype=np.float64)
    if cells.shape != (len(rows), len(columns)):
        raise ValueError(must("grid", f"have shape {(len(rows), len(columns))}", cells.shape))
    if not 1 < most < np.inf:
        raise ValueError(must("most", "be above 1 and finite", most))
    ax = _axes(ax)
    norm = colors.LogNorm(1 / most, most)
    image = ax.imshow(cells, norm=norm, cmap="RdBu", aspect="auto", origin="lower")
    for (i, j), cell in np.ndenumerate(cells):
        if np.isfinite(cell):
            dark = abs(np.log(cell)) > 0.6 * np.log(most)
            text = f"{cell:.1f}" if cell < 99.5 else f"{cell:.0f}"
            ax.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    if colorbar:
        figure = ax.figure
        bar = figure.colorbar(image, ax=ax, label=label, extend="both")
        ticks = [n for n in (1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64) if 1 / most <= n <= most]
        bar.set_ticks(ticks, labels=[f"{n:g}x" if n >= 1 else f"1/{1 / n:g}x" for n in ticks])
        bar.minorticks_off()
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Return ax, or the axes of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot  # here, for it chooses a way to show figures

    new: Axes = pyplot.subplots(layout="constrained")[1]
    return new


def _style(i: int) -> dict[str, Any]:
    """Return how the i-th contender looks; the first is on top."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 5 if i == 0 else 4,
        "linewidth": 2.2 if i == 0 else 1.4,
        "zorder": 3 if i == 0 else 2,
    }


def _one_dimensional(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(must(name, "be one-dimensional and not empty", f"shape {array.shape}"))
    return array


def _positive(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which values a logarithmic axis has a place for."""
    return (values > 0) & np.isfinite(values)


def _series(name: str, values: Mapping[str, ArrayLike], shape: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
    arrays = {who: np.asarray(line, dtype=np.float64) for who, line in values.items()}
    for who, line in arrays.items():
        if line.shape != shape:
            where = name if name == who else f"{name}[{who!r}]"
            raise ValueError(must(where, f"have shape {shape}", line.shape))
    return arrays


def _bytes(size: float) -> str:
    """Return a size with a unit: 64 KB."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024 or unit == "GB":
            break
        size /= 1024
    return f"{size:g} {unit}"
