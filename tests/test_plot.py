"""`fastbn.plot`: what is drawn is the data that were given, on the axes that were given."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastbn import plot


@pytest.fixture
def ax():
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.subplots()


@pytest.fixture(autouse=True)
def agg(monkeypatch):
    """Figures that a function makes itself need no display, and are closed."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def lines(ax):
    return {line.get_label(): np.array(line.get_data()) for line in ax.lines if not line.get_label().startswith("_")}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


NAN = float("nan")
CALLS = {
    "statistics": ([[[0, 1], [1, 2]]], {}),
    "accuracy": ([[1, 10], {"a": [1, 2]}], {}),
    "bandwidth": ([[1024, 2048], {"a": [1, 2]}], {}),
    "roofline": ([{"a": ([0.5], [1])}], {"bandwidth": 10}),
    "scaling": ([[1, 2], {"a": [2, 1]}], {}),
    "speedups": ([[[2, 0.5]]], {"rows": ["x"], "columns": ["y", "z"]}),
}


def test_there_is_a_call_of_every_function():
    assert sorted(CALLS) == sorted(plot.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_axes_are_returned_and_drawn(name, ax):
    arguments, options = CALLS[name]
    assert getattr(plot, name)(*arguments, **options, ax=ax) is ax
    ax.figure.canvas.draw()
    new = getattr(plot, name)(*arguments, **options)
    assert isinstance(new, matplotlib.axes.Axes)
    assert new is not ax
    new.figure.canvas.draw()


def test_statistics(ax, rng):
    moving, true = rng.random((2, 20, 5))
    true[:, 3] *= 10
    plot.statistics(moving, true, channels=2, name="variance", momentum=0.9, ax=ax)
    most = np.argsort(np.ptp(true, axis=0))[::-1][:2]
    assert most[0] == 3
    assert legend(ax) == [f"channel {c}" for c in most] + ["1 / (1 - 0.9) steps"]
    drawn = lines(ax)
    for channel in most:
        np.testing.assert_array_equal(drawn[f"channel {channel}"], [np.arange(1, 21), moving[:, channel]])
    thin = [line for line in ax.lines if line.get_linewidth() < 1 and len(line.get_xdata()) == 20]
    assert {tuple(line.get_ydata()) for line in thin} == {tuple(true[:, c]) for c in most}
    assert ax.get_ylabel() == "variance"
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "training step"
    np.testing.assert_allclose(drawn["1 / (1 - 0.9) steps"][0], 10)


def test_statistics_of_chosen_channels_and_steps(ax):
    plot.statistics([[1, 2], [3, 4]], [1.5, 2.5], channels=[1], steps=[10, 20], momentum=0.5, ax=ax)
    np.testing.assert_array_equal(lines(ax)["channel 1"], [[10, 20], [2, 4]])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2.5, 2.5])
    assert legend(ax) == ["channel 1"]  # the horizon of 2 steps is not among them
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize("count", [2, np.int64(2), np.uint8(2)], ids=repr)
def test_statistics_of_a_number_of_channels(ax, count):
    plot.statistics([[1, 2, 3], [1, 3, 5]], channels=count, ax=ax)
    assert legend(ax) == ["channel 2", "channel 1"]


def test_accuracy(ax):
    plot.accuracy([1, 100], {"fastbn": [0, 2], "other": [3, 4e5]}, bound=[1, 10], ax=ax)
    assert legend(ax) == ["fastbn", "other", "bound"]
    drawn = lines(ax)
    np.testing.assert_array_equal(drawn["fastbn"], [[1, 100], [0.1, 2]])
    np.testing.assert_array_equal(drawn["other"], [[1, 100], [3, 4e5]])
    np.testing.assert_array_equal(drawn["bound"], [[1, 100], [1, 10]])
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 0.1


def test_bandwidth(ax):
    nan = float("nan")
    sizes = [2**10, 2**20, 2**30]
    plot.bandwidth(sizes, {"fastbn": [1, 2, 3], "NumPy": [1, nan, nan]}, limit=[2, 3, 4], ylabel="GB/s", ax=ax)
    assert legend(ax) == ["bandwidth limit", "fastbn", "NumPy"]
    np.testing.assert_array_equal(lines(ax)["NumPy"], [[2**10], [1]])
    plot.bandwidth(sizes, {"NumPy": [nan] * 3}, limit=[2, 3, 4]).figure.canvas.draw()
    ax.figure.canvas.draw()
    labels = {tick.get_text() for tick in ax.get_xticklabels()}
    assert {"1 KB", "16 KB", "1 MB", "1 GB"} & labels
    assert [plot._bytes(size) for size in (512, 2**10, 2**22, 2**40)] == ["512 B", "1 KB", "4 MB", "1024 GB"]


def test_roofline(ax):
    plot.roofline({"train": ([0.75, 0.75], [7, 6]), "inference": ([0.375], [3])}, bandwidth=10, peak=40, ax=ax)
    assert legend(ax) == ["memory, 10 GB/s", "processor, 40 G operations/s", "train", "inference"]
    at, roof = lines(ax)["memory, 10 GB/s"]
    np.testing.assert_allclose(roof, np.minimum(10 * at, 40))
    assert at.min() < 0.375
    assert at.max() > 4  # where both roofs meet
    np.testing.assert_array_equal(lines(ax)["train"], [[0.75, 0.75], [7, 6]])


def test_roofline_without_a_peak(ax):
    plot.roofline({"train": ([0.75], [7])}, bandwidth=10, ax=ax)
    at, roof = lines(ax)["memory, 10 GB/s"]
    np.testing.assert_allclose(roof, 10 * at)
    assert legend(ax) == ["memory, 10 GB/s", "train"]


def test_scaling(ax):
    plot.scaling([1, 2, 4], {"train": [8, 4, 2], "inference": [3, 2, 2]}, limit=[2, 1.5, 1], ax=ax)
    assert legend(ax) == ["train", "inference", "bandwidth limit", "linear"]
    drawn = lines(ax)
    np.testing.assert_array_equal(drawn["train"][1], [1, 2, 4])
    np.testing.assert_array_equal(drawn["inference"][1], [1, 1.5, 1.5])
    np.testing.assert_allclose(drawn["bandwidth limit"][1], [1, 4 / 3, 2])
    np.testing.assert_array_equal(drawn["linear"][1], [1, 2, 4])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4"]
    assert ax.get_ylabel() == "times as fast as with one thread"


def test_scaling_from_two_threads(ax):
    plot.scaling([2, 4], {"train": [8, 4]}, ax=ax)
    assert ax.get_ylabel() == "times as fast as with 2 threads"


def test_speedups(ax):
    grid = np.array([[1, 2, 120.4], [0.1, np.nan, 16]])
    plot.speedups(grid, rows=[1, 64], columns=["a", "b", "c"], label="faster", ax=ax)
    np.testing.assert_array_equal(ax.images[0].get_array(), grid)
    assert [text.get_text() for text in ax.texts] == ["1.0", "2.0", "120", "0.1", "16.0"]
    assert [text.get_color() for text in ax.texts] == ["black", "black", "white", "white", "white"]
    assert ax.images[0].norm.vmin == 1 / 16
    assert ax.images[0].norm.vmax == 16
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1", "64"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b", "c"]
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "faster"
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["1/16x", "1/4x", "1x", "4x", "16x"]


def test_speedups_without_a_bar(ax):
    plot.speedups([[1]], rows=[1], columns=[1], colorbar=False, ax=ax)
    assert ax.figure.axes == [ax]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        ("statistics", [[1, 2]], {}, r"moving must have shape \(steps, channels\), got \(2,\)"),
        ("statistics", [[[1, 2]], [1, 2, 3]], {}, r"true must have shape \(1, 2\) or \(2,\), got \(3,\)"),
        ("statistics", [[[1, 2]]], {"steps": [1, 2]}, r"steps must have shape \(1,\), got \(2,\)"),
        ("statistics", [[[1, 2]]], {"channels": [2]}, "channels must be from 0 to 1, got 2"),
        ("statistics", [[[1, 2]]], {"channels": -1}, "channels must be at least 0, got -1"),
        ("statistics", [np.ones((0, 3))], {}, r"moving must have at least one step, got shape \(0, 3\)"),
        ("statistics", [np.ones((0, 3))], {"channels": [0], "momentum": 0.9}, "at least one step"),
        ("accuracy", [[], {}], {}, r"condition must be one-dimensional and not empty, got shape \(0,\)"),
        ("accuracy", [[1], {"a": [1, 2]}], {}, r"errors\['a'\] must have shape \(1,\), got \(2,\)"),
        ("accuracy", [[1], {"a": [1]}], {"bound": [1, 2]}, r"bound must have shape \(1,\), got \(2,\)"),
        ("bandwidth", [[1], {"a": [1, 2]}], {}, r"values\['a'\] must have shape \(1,\), got \(2,\)"),
        ("bandwidth", [[1], {"a": [1]}], {"limit": []}, r"limit must have shape \(1,\), got \(0,\)"),
        ("bandwidth", [[1], {"a": [NAN]}], {}, "values must have a positive number at a positive size, got none"),
        ("bandwidth", [[1], {}], {}, "values must have a positive number at a positive size, got none"),
        ("bandwidth", [[0, 1], {"a": [1, 0]}], {}, "values must have a positive number at a positive size, got none"),
        ("roofline", [{"a": ([1, 0], [1, 1])}], {"bandwidth": 1}, r"points\['a'\]\[0\] must be positive .*, got 0.0"),
        ("roofline", [{"a": ([NAN], [1])}], {"bandwidth": 1}, r"points\['a'\]\[0\] must be positive .*, got nan"),
        ("roofline", [{}], {"bandwidth": 0}, "bandwidth must be positive, got 0"),
        ("roofline", [{}], {"bandwidth": 1, "peak": -1}, "peak must be positive, got -1"),
        ("roofline", [{"a": ([1], [1, 2])}], {"bandwidth": 1}, r"points\['a'\] must have shape \(1,\), got \(2,\)"),
        ("scaling", [[[1]], {}], {}, r"threads must be one-dimensional and not empty, got shape \(1, 1\)"),
        ("scaling", [[1], {"a": 2}], {}, r"times\['a'\] must have shape \(1,\), got \(\)"),
        ("speedups", [[[1]]], {"rows": [1, 2], "columns": [1]}, r"grid must have shape \(2, 1\), got \(1, 1\)"),
        ("speedups", [[[1]]], {"rows": [1], "columns": [1], "most": 1}, "most must be above 1 and finite, got 1"),
        ("speedups", [[[1]]], {"rows": [1], "columns": [1], "most": np.inf}, "above 1 and finite, got inf"),
    ],
)
def test_messages(name, arguments, options, message, ax):
    for where in ({"ax": ax}, {}):
        with pytest.raises(ValueError, match=message):
            getattr(plot, name)(*arguments, **options, **where)
    assert not ax.lines
    assert not matplotlib.pyplot.get_fignums()


@pytest.mark.parametrize("name", plot.__all__)
def test_docstrings(name):
    function = getattr(plot, name)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(function), {}, name, None, None)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
    for parameter in inspect.signature(function).parameters:
        assert parameter in inspect.getdoc(function)


def test_matplotlib_is_asked_for():
    program = "import sys; sys.modules['matplotlib'] = None\nimport fastbn.plot"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert 'ImportError: fastbn.plot needs Matplotlib: pip install "fastbn[plot]"' in done.stderr


def test_matplotlib_stays_without_a_window():
    """With axes that are given, pyplot is not imported: it would look for a display."""
    program = """
import sys
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from fastbn import plot
figure = Figure()
FigureCanvasAgg(figure)
plot.speedups([[2]], rows=[1], columns=[1], ax=figure.subplots())
plot.scaling([1], {"a": [1]}, ax=figure.subplots())
figure.canvas.draw()
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False"]
